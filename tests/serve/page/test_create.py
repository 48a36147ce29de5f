"""Create, in a browser: what is asked for is generated, seen as it forms, cancelled, kept, and asked for again."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from urllib.parse import urlencode

import numpy as np
import pytest
from PIL import Image
from serve.page.double import CLASSES, WORDS, colour_of

QUIET = "#/create?prompt=a+red+circle+on+white&seed=7&locked=1"  # a link: nothing is generated before it is asked for


def pixels_of(source: str) -> np.ndarray:
    """Of a data URI: (H, W, 3)."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).convert("RGB"))


def shown(page) -> list[np.ndarray]:
    """The images on the stage."""
    sources = page.eval_on_selector_all(".stage .frame img", "found => found.map((img) => img.src)")
    return [pixels_of(source) for source in sources]


def refuse(page, status: int, problem: dict) -> None:
    """The next image that is asked for."""
    answer = {"status": status, "json": problem, "headers": {"Retry-After": "1"}}
    page.route("**/v1/images?*", lambda route: route.fulfill(**answer), times=1)


def generated(page) -> None:
    page.wait_for_selector(".stage .actions")


def test_who_comes_without_a_link_sees_the_first_example_form(open_page, double):
    page = open_page()
    generated(page)
    assert (shown(page)[0][0, 0] == colour_of(3)).all()
    assert double.bodies("images")[0].prompt == "a red circle on white"
    assert page.locator(".history .thumbs li").count() == 1


def test_a_link_restores_every_setting_and_generates_nothing_by_itself(open_page, double):
    settings = {
        "prompt": "two <b>stars</b> & a heart",
        "negative_prompt": "grey",
        "seed": "41",
        "locked": "1",
        "n": "3",
        "sampler": "ddim",
        "num_inference_steps": "9",
        "guidance_scale": "2.5",
        "guidance_rescale": "0.25",
        "eta": "0.5",
        "width": "96",
        "height": "48",
    }
    page = open_page(f"#/create?{urlencode(settings)}")
    page.wait_for_timeout(300)  # examples are drawn when they are seen; nothing on the stage is
    for name in (
        "prompt",
        "negative_prompt",
        "seed",
        "sampler",
        "num_inference_steps",
        "guidance_scale",
        "eta",
        "width",
    ):
        assert page.locator(f".panel [data-field={name}] :is(input, textarea, select)").input_value() == settings[name]
    assert page.locator(".stage .empty").is_visible()
    assert not [body for body in double.bodies("images") if body.seed == 41]
    page.get_by_role("button", name="Generate").click()
    generated(page)
    made = [body for body in double.bodies("images") if body.prompt == settings["prompt"]]
    assert [body.seed for body in made] == [41, 42, 43]
    sent = made[0].model_dump(include={*settings} - {"n"})
    assert {name: str(value) for name, value in sent.items()} == {name: settings[name] for name in sent} and len(
        sent
    ) == 10
    page.get_by_role("button", name="Again").click()
    page.wait_for_function("() => document.querySelectorAll('.history .thumbs li').length === 4")
    last = double.bodies("images")[-1]
    assert last == made[0]
    reopened = open_page(page.evaluate("() => location.hash"))
    assert reopened.locator("[data-field=prompt] textarea").input_value() == settings["prompt"]


def test_an_image_is_seen_as_it_forms_and_escape_cancels_it(open_page, double):
    double.held = 7
    page = open_page(QUIET)
    page.get_by_role("button", name="Generate").click()
    page.wait_for_function("() => document.querySelector('.told').textContent === 'Step 2 of 4'")
    forming = np.array([int(128 + (value - 128) * 2 / 4) for value in colour_of(7)])
    page.wait_for_function("() => document.querySelector('.stage .frame img').alt === 'forming'")
    assert (shown(page)[0] == forming).all()
    assert page.locator("progress").evaluate("bar => bar.value") == pytest.approx(0.5)
    page.keyboard.press("Escape")
    page.wait_for_selector(".stage .empty")
    assert page.locator("#status").text_content() == "Cancelled."
    page.wait_for_timeout(100)
    assert [task.body.seed for task in double.stopped] == [7]
    assert page.locator(".history").is_hidden()
    double.held = None
    page.get_by_role("button", name="Generate").click()
    generated(page)
    assert (shown(page)[0] == colour_of(7)).all()


def test_what_was_not_read_of_a_prompt_is_told_in_a_line_until_the_next_image(open_page, double):
    double.warnings = ["prompt: got 40 tokens, not read: <b>'a star'</b>"]
    page = open_page(QUIET + "&n=2")
    page.get_by_role("button", name="Generate").click()
    generated(page)
    line = page.locator(".work [role=status] .notice")
    assert line.all_text_contents() == ["Prompt: got 40 tokens, not read: <b>'a star'</b>"]  # of two images once
    double.warnings = []
    page.get_by_label("Long prompts").select_option("chunks")
    page.get_by_role("button", name="Generate").click()
    page.wait_for_function("() => document.querySelectorAll('.history .thumbs li').length === 4")
    assert line.count() == 0
    sent = [body.long_prompts for body in double.bodies("images") if body.seed in (7, 8)]
    assert sent == ["cut", "cut", "chunks", "chunks"]


def test_several_images_are_as_many_seeds_and_each_has_its_own_actions(open_page, double):
    page = open_page(QUIET + "&n=4")
    page.get_by_role("button", name="Generate").click()
    generated(page)
    assert [tuple(image[0, 0]) for image in shown(page)] == [colour_of(seed) for seed in (7, 8, 9, 10)]
    page.locator(".stage .cell").nth(2).click()
    assert "seed 9" in page.locator(".stage .meta").text_content()
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    assert download.value.suggested_filename == "a-red-circle-on-white-seed9.png"
    with Image.open(download.value.path()) as image:
        assert image.size == (64, 64) and image.getpixel((0, 0)) == colour_of(9)


def test_an_unlocked_seed_is_another_each_time_and_a_typed_one_is_locked(open_page, double):
    page = open_page(QUIET.replace("&locked=1", ""))
    for _ in range(2):
        before = page.locator(".history .thumbs li").count()
        page.get_by_role("button", name="Generate").click()
        page.wait_for_function(f"() => document.querySelectorAll('.history .thumbs li').length > {before}")
    page.locator("[data-field=seed] input").fill("12")
    assert page.get_by_role("button", name="Lock").get_attribute("aria-pressed") == "true"
    page.get_by_role("button", name="Generate").click()
    page.wait_for_function("() => document.querySelectorAll('.history .thumbs li').length > 2")
    seeds = [body.seed for body in double.bodies("images") if body.seed not in (3, 5)]
    assert len(set(seeds)) == 3 and seeds[-1] == 12


def test_the_history_outlives_the_page_and_can_be_cleared(open_page):
    page = open_page(QUIET)
    page.get_by_role("button", name="Generate").click()
    generated(page)
    page.wait_for_timeout(100)  # for the browser's own store
    page.reload()
    page.wait_for_selector(".history .thumbs li")
    assert (shown(page)[0] == colour_of(7)).all()
    page.get_by_role("button", name="Clear").click()
    page.wait_for_timeout(100)
    page.reload()
    page.wait_for_selector(".stage .empty")
    assert page.locator(".history").is_hidden()


def test_an_example_is_generated_when_it_is_seen_and_when_it_is_pressed(open_page, double):
    page = open_page(QUIET)
    page.locator(".examples").scroll_into_view_if_needed()
    page.wait_for_function("() => [...document.querySelectorAll('.example img')].every((img) => img.alt === '')")
    page.wait_for_timeout(300)
    assert {body.seed for body in double.bodies("images")} == {3, 5}
    page.get_by_role("button", name="a blue star on black").click()
    generated(page)
    assert page.locator("[data-field=prompt] textarea").input_value() == "a blue star on black"
    assert (shown(page)[0] == colour_of(5)).all()


def test_what_a_person_or_a_server_writes_is_text_and_never_markup(open_page, double):
    evil = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    double.models = [WORDS, replace(WORDS, id=evil, examples=({"prompt": evil, "seed": 1},))]
    page = open_page(QUIET)
    page.locator("[data-field=prompt] textarea").fill(evil)
    page.get_by_role("button", name="Generate").click()
    generated(page)
    assert page.locator(".stage .quote").text_content() == evil
    page.get_by_label("Model").select_option(evil)
    page.wait_for_selector(f".example span:text({evil!r})")
    assert page.locator("img[src=x], body script").count() == 0
    assert page.title() == "Create · RAPHAEL"


def test_a_full_queue_is_waited_for_and_a_wrong_value_is_told_at_its_field(open_page, double):
    page = open_page(QUIET)
    page.wait_for_timeout(400)  # until the examples are there
    refuse(page, 429, {"detail": "the queue is full"})
    page.get_by_role("button", name="Generate").click()
    page.wait_for_function("() => document.querySelector('.told').textContent.includes('asked again in 1 s')")
    generated(page)
    page.locator("[data-field=width] input").fill("65")  # the server's own words, at the field that it names
    page.get_by_role("button", name="Generate").click()
    place = page.locator("[data-field=width]")
    place.locator(".fault").wait_for()
    assert place.locator("input").get_attribute("aria-invalid") == "true"
    assert place.locator(".fault").text_content() == "width: got 65 px, expected a multiple of 8 up to 256"
    refuse(page, 503, {"title": "Stopped", "detail": "the server is stopping"})
    page.get_by_role("button", name="Generate").click()
    page.wait_for_selector("[role=alert]:text('the server is stopping')")
    open_page.faults[:] = [said for said in open_page.faults if "status of" not in said]  # the browser's own words


def test_a_stream_of_events_that_breaks_off_costs_nothing(open_page, double):
    page = open_page(QUIET)
    page.wait_for_timeout(400)  # until the examples are there
    first = 'event: queued\ndata: {"state": "queued", "position": 0}\n\nevent: step\ndata: {"st'
    page.route("**/events", lambda route: route.fulfill(body=first, content_type="text/event-stream"))
    page.get_by_role("button", name="Generate").click()
    generated(page)
    assert (shown(page)[0] == colour_of(7)).all()


def test_a_token_is_asked_for_once_and_kept_for_the_tab_alone(open_page, double):
    double.token = "open sesame, please"
    page = open_page(QUIET)
    page.locator("#token").fill("wrong")
    page.keyboard.press("Enter")
    page.wait_for_selector("dialog :text('That was another one')")
    page.locator("#token").fill(double.token)
    page.keyboard.press("Enter")
    page.wait_for_selector(".view")
    page.get_by_role("button", name="Generate").click()
    generated(page)
    assert page.evaluate("() => Object.keys(localStorage).length") == 0
    assert page.evaluate("() => document.cookie") == "" and not page.context.cookies()
    open_page.faults[:] = [said for said in open_page.faults if "401" not in said]  # the browser's own words


def test_a_model_of_classes_is_asked_by_its_classes(open_page, double):
    double.models = [WORDS, CLASSES]
    page = open_page(QUIET)
    page.get_by_label("Model").select_option("classes")
    page.locator("select[name=prompt]").select_option("star")
    page.get_by_role("button", name="Generate").click()
    generated(page)
    asked = [body for body in double.bodies("images") if body.prompt == "star"][-1]
    assert asked.model == "classes" and page.get_by_role("button", name="Look inside").count() == 0
    page.get_by_role("link", name="Look inside").click()
    page.wait_for_selector(".stage .empty:text('reads no words')")
    assert page.get_by_role("button", name="Look inside").is_disabled()
    page.get_by_role("link", name="Edit").click()
    page.wait_for_selector(".kinds a")
    assert page.locator(".kinds a").all_text_contents() == ["From an image", "Vary"]


def test_a_server_that_is_gone_is_said_in_words(open_page):
    page = open_page(QUIET)
    page.wait_for_timeout(400)
    page.route("**/v1/images*", lambda route: route.abort())
    page.get_by_role("button", name="Generate").click()
    page.wait_for_selector("[role=alert]:text('The server does not answer')")
    open_page.faults[:] = [said for said in open_page.faults if "ERR_FAILED" not in said]


def test_events_are_read_alike_however_they_are_cut(open_page):
    """Every two places at which a stream can be cut, with both line ends."""
    page = open_page(QUIET)
    found = page.evaluate(
        """async () => {
          const { eventsOf } = await import("/page/js/api.js");
          const text = ": hello\\n\\nevent: step\\ndata: {\\"a\\":\\ndata: \\u201c1\\u201d}\\n\\n" +
            "data:x\\n\\nevent: lost\\n\\n";
          const texts = [text, text.replaceAll("\\n", "\\r\\n")];
          const read = new Set();
          for (const text of texts) {
            const bytes = new TextEncoder().encode(text);
            for (let at = 0; at <= bytes.length; at += 1) for (let to = at; to <= bytes.length; to += 7) {
              const parts = [bytes.slice(0, at), bytes.slice(at, to), bytes.slice(to)];
              const body = new ReadableStream({ start(to) { parts.forEach((one) => to.enqueue(one)); to.close(); } });
              const events = [];
              for await (const event of eventsOf(body)) events.push(event);
              read.add(JSON.stringify(events));
            }
          }
          return [...read];
        }"""
    )
    assert [json.loads(one) for one in found] == [
        [{"event": "step", "data": '{"a":\n“1”}'}, {"event": "message", "data": "x"}]
    ]
