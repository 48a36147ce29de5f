"""Edit, in a browser: masks are painted by pointer and by keys, and every kind asks what the server takes."""

from __future__ import annotations

import numpy as np
import pytest
from serve.page.double import BLUE, EDITS, GREEN, RED, SIDE, colour_of
from serve.page.test_create import QUIET, generated, pixels_of

from raphael.edit.paint import COLOURS


def to_edit(page, title: str) -> None:
    page.get_by_role("link", name="Edit", exact=True).click()
    page.get_by_role("link", name=title, exact=True).click()
    page.wait_for_selector(f".intro h2:text-is('{title}')")


def made(page) -> None:
    page.get_by_role("button", name="Apply").click()
    page.wait_for_selector(".stage .halves")


def centre(page, x: float, y: float) -> tuple[float, float]:
    """Of the canvas: shares of its width and height to px of the page."""
    page.locator(".painter canvas").scroll_into_view_if_needed()
    box = page.locator(".painter canvas").bounding_box()
    return box["x"] + x * box["width"], box["y"] + y * box["height"]


def test_a_part_of_an_image_is_painted_over_by_keys_and_inpainted(open_page, double):
    page = open_page(QUIET)
    page.get_by_role("button", name="Generate").click()
    generated(page)
    page.get_by_role("button", name="Edit this").click()
    page.wait_for_selector(".painter canvas")
    page.locator(".painter canvas").focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", " "):  # a dab at 40, 36 of radius 5
        page.keyboard.press(key)
    assert "of the image" in page.locator("#status").text_content()
    made(page)
    (task,) = (task for task in double.asked if task.kind == "edits/inpaint")
    assert task.body.prompt == "a red circle on white" and task.body.seed == 7 and task.body.feather == 4
    assert (task.images["image"] == colour_of(7)).all()  # as the server decoded it
    rows, columns = np.mgrid[:SIDE, :SIDE] + 0.5
    assert (task.images["mask"] == (np.hypot(columns - 40, rows - 36) <= 5)).all()


def test_result_and_source_lie_one_over_the_other_and_keys_move_the_divider(open_page):
    page = open_page(QUIET)
    to_edit(page, "Vary")
    made(page)
    halves = page.locator(".halves")
    sources = {name: halves.locator(f".{name}").get_attribute("src") for name in ("before", "after")}
    assert (pixels_of(sources["before"])[0, 0] == RED).all() and (pixels_of(sources["after"])[0, 0] == GREEN).all()
    divider = page.get_by_label("Before and after")
    divider.focus()
    page.keyboard.press("ArrowLeft")
    assert halves.evaluate("node => node.style.getPropertyValue('--at')") == "49%"
    page.keyboard.press("Home")
    assert divider.get_attribute("aria-valuetext") == "only the result"
    page.get_by_label("without the edit").check()
    assert (pixels_of(halves.locator(".before").get_attribute("src"))[0, 0] == BLUE).all()
    assert page.locator(".trio figcaption").all_text_contents() == [
        *("the source", "the result", "without the edit", "the mask")
    ]


def test_phrases_are_painted_each_in_its_colour(open_page, double):
    page = open_page()
    generated(page)
    to_edit(page, "Paint with words")
    assert page.locator("[data-field=prompt] textarea").input_value() == "a red circle and a blue star on white"
    page.get_by_role("button", name="Apply").click()
    assert page.locator("[data-field=regions] .fault").text_content() == "Nothing is painted for “red circle”."
    page.get_by_role("button", name="Right half").click()
    page.get_by_label("Paint blue star").check()
    swatches = page.locator(".phrase").evaluate_all("all => all.map((one) => one.style.getPropertyValue('--colour'))")
    assert swatches == ["rgb({} {} {})".format(*colour) for colour in COLOURS[:2]]
    page.get_by_label("Less elsewhere").fill("0.5")
    page.get_by_label("Noise arranged, steps").fill("0")
    page.mouse.move(*centre(page, 0.1, 0.5))
    page.mouse.down()
    page.mouse.move(*centre(page, 0.4, 0.5), steps=3)
    page.mouse.up()
    made(page)
    (task,) = (task for task in double.asked if task.kind == "edits/paint")
    assert (task.body.weight, task.body.away, task.body.arrange) == (0.5, 0.5, 0)
    first, second = task.images["red circle"], task.images["blue star"]
    assert first[:, SIDE // 2 :].all() and not first[:, : SIDE // 2].any()
    rows, columns = np.mgrid[:SIDE, :SIDE] + 0.5
    along = np.clip(columns, 0.1 * SIDE, 0.4 * SIDE)  # a stroke is what lies within the radius of its line
    stroke = np.hypot(columns - along, rows - SIDE / 2) <= 5
    assert (second != stroke).mean() < 0.01
    page.get_by_role("button", name="Undo").click()
    page.get_by_role("button", name="Apply").click()
    assert page.locator("[data-field=regions] .fault").text_content() == "Nothing is painted for “blue star”."
    page.get_by_role("button", name="Remove blue star").click()
    made(page)
    assert [region.phrase for region in double.bodies("edits/paint")[-1].regions] == ["red circle"]


def test_a_file_is_cropped_to_the_models_size_before_it_is_sent(open_page, double, tmp_path):
    from PIL import Image

    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, 40:80] = (250, 20, 20)  # the middle third is what remains
    Image.fromarray(wide).save(tmp_path / "wide.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    page = open_page(QUIET)
    to_edit(page, "From an image")
    page.get_by_role("button", name="Apply").click()
    assert page.locator(".picker .fault").text_content() == "Choose an image first."
    page.get_by_label("Image", exact=True).set_input_files(tmp_path / "broken.png")
    page.wait_for_selector(".picker .fault:text('no image which can be read')")
    page.get_by_label("Image", exact=True).set_input_files(tmp_path / "wide.png")
    page.wait_for_selector(".bench img")
    made(page)
    (task,) = (task for task in double.asked if task.kind == "edits/image")
    sent = task.images["image"]
    assert sent.shape == (SIDE, SIDE, 3) and (np.abs(sent[:, 2:-2].astype(int) - (250, 20, 20)) < 3).all()
    assert task.body.strength == pytest.approx(0.6)


def test_words_are_weighed_by_a_slider_each(open_page, double):
    page = open_page(QUIET)
    to_edit(page, "Weigh words")
    page.locator("[data-field=prompt] textarea").fill("a red heart, a star")
    sliders = page.locator(".factors .field")
    assert sliders.locator("label").all_text_contents() == ["a", "red", "heart", ",", "star"]
    page.get_by_role("button", name="Apply").click()
    assert "at least one word" in page.locator("[data-field=words] > .fault").text_content()
    page.get_by_label("red").fill("2.5")
    made(page)
    assert double.bodies("edits/reweight")[0].words == {"red": 2.5}


@pytest.mark.parametrize("kind", EDITS)
def test_every_kind_asks_only_what_the_server_takes(open_page, double, kind):
    page = open_page()
    generated(page)
    page.goto(page.url.split("#")[0] + f"#/edit/{kind}")
    page.wait_for_selector(".intro h2")
    if page.locator(".picker .thumbs button").count():
        page.locator(".picker .thumbs button").first.click()
        page.wait_for_selector(".bench :is(img, canvas)")
    if kind in ("inpaint", "paint"):
        page.get_by_role("button", name="Left half").click()
    if kind == "paint":
        page.get_by_label("Paint blue star").check()
        page.get_by_role("button", name="Right half").click()
    if kind == "reweight":
        page.get_by_label("red").fill("2")
    made(page)
    (task,) = (task for task in double.asked if task.kind == f"edits/{kind}")
    assert task.body.prompt and ("image" in task.images) == bool(page.locator(".picker").count())
