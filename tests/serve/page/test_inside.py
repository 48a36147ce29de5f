"""Look inside and Compare, in a browser."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from serve.page.double import WORDS, colour_of
from serve.page.test_create import QUIET, pixels_of

LUMA = (0.3, 0.59, 0.11)


@pytest.fixture
def page(open_page, double):
    """At an image's inside: words "a", "red", "circle", each looked at in a row of block 1's 4 x 4 map."""
    page = open_page(QUIET.replace("a+red+circle+on+white", "a+red+circle"))
    page.get_by_role("link", name="Look inside").click()
    page.get_by_role("button", name="Look inside").click()
    page.wait_for_selector(".inside")
    assert [task.body.seed for task in double.asked if task.kind == "inside"] == [7]
    return page


def canvas(page, which: str = ".beside canvas") -> np.ndarray:
    return pixels_of(page.locator(which).first.evaluate("node => node.toDataURL()")).astype(float)


def brightest_row(page, which: str = ".beside canvas") -> int:
    """Of the four rows of a block's map."""
    return int((canvas(page, which) @ LUMA).reshape(4, 16, 64).mean((1, 2)).argmax())


def test_a_word_shows_where_it_is_looked_at_and_which_expert_it_takes(page):
    for place, (word, expert) in enumerate((("a", 1), ("red", 2), ("circle", 1))):
        page.locator(".word", has_text=word).nth(0).click()
        assert brightest_row(page) == place and brightest_row(page, ".tile canvas") == place
        assert page.locator(".tile").first.locator(".meta").last.text_content() == f"expert {expert} of 4"
    assert page.locator(".tile").nth(1).locator(".meta").last.text_content() == ""  # the block without a mixture
    assert "mostly" in page.locator(".beside canvas").get_attribute("aria-label")


def test_an_expert_shows_which_words_it_serves(page):
    page.get_by_role("button", name=re.compile("block 1, expert 1.*a · circle")).click()
    assert page.locator(".word[aria-pressed=true]").all_text_contents() == ["a", "circle"]
    rows = (canvas(page) @ LUMA).reshape(4, 16, 64).mean((1, 2))
    assert set(np.argsort(rows)[-2:]) == {0, 2}  # the rows of both words, and not that of "red"
    assert page.get_by_role("button", name=re.compile("block 1, expert 3.*–")).is_disabled()
    page.get_by_role("button", name=re.compile("block 1, expert 1.*a · circle")).click()
    assert page.locator(".word[aria-pressed=true]").all_text_contents() == ["red"]


def test_the_slider_goes_over_the_steps(page):
    page.get_by_label("The image alone").check()
    assert (canvas(page)[0, 0] == colour_of(9)).all()  # the last of three estimates
    slider = page.get_by_label("Step", exact=True)
    slider.focus()
    page.keyboard.press("Home")
    assert (canvas(page)[0, 0] == colour_of(7)).all()
    assert slider.get_attribute("aria-valuetext") == "1 of 3, pure noise"
    page.keyboard.press("ArrowRight")
    assert (canvas(page)[0, 0] == colour_of(8)).all() and "σ 2.00" in slider.get_attribute("aria-valuetext")
    assert page.locator(".times td.now").all_text_contents() == ["2"]
    page.get_by_role("button", name="Play").click()
    page.wait_for_function("() => document.querySelector('.beside output').textContent.startsWith('3 of 3')")


def test_regions_and_edges_are_shown_where_a_block_has_them(page):
    page.get_by_label("Regions").check()
    page.locator(".word", has_text="red").click()
    assert brightest_row(page) == 1
    page.locator(".tile").nth(1).click()
    assert "not in block 2" in page.locator(".beside .meta:not(.scale)").text_content()
    page.locator(".tile").nth(0).click()
    page.get_by_label("Edges").check()
    assert brightest_row(page) == 0  # the double's edges are the first word's map


def test_both_sides_of_a_comparison_get_the_same_prompt_and_seeds(open_page, double):
    double.models = [WORDS, replace(WORDS, id="other")]
    page = open_page(QUIET + "&n=2")
    page.get_by_role("link", name="Compare").click()
    page.get_by_label("Model of B").select_option("other")
    page.get_by_role("group", name="A", exact=True).get_by_label("Steps").fill("9")
    page.get_by_role("button", name="Compare").click()
    page.wait_for_selector(".trio figure:nth-child(2)")
    asked = double.bodies("images")[-4:]
    assert [(body.seed, body.model) for body in asked] == [*((7, "scenes"), (7, "other"), (8, "scenes"), (8, "other"))]
    assert [body.num_inference_steps for body in asked] == [9, 4, 9, 4]
    assert {body.prompt for body in asked} == {"a red circle on white"}
    assert page.locator(".trio figcaption").first.text_content() == "seed 7: 0.0 of 255 apart in the mean"
