"""Who reaches the page: by keys alone, on a telephone, with a screen reader, in light and dark, without a network."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from serve.page.double import FOLDER
from serve.page.test_create import QUIET, generated

AXE = Path(__file__).with_name("node_modules") / "axe-core" / "axe.min.js"
VIEWS = ("create", "edit/inpaint", "edit/paint", "edit/reweight", "inside", "compare")
FILES = sorted(path for path in FOLDER.rglob("*") if path.is_file())


def filled(page, view: str) -> None:
    """The view, with as much in it as there can be."""
    page.goto(page.url.split("#")[0] + f"#/{view}")
    page.wait_for_timeout(50)
    if view.startswith("edit") and page.locator(".picker .thumbs button").count():
        page.locator(".picker .thumbs button").first.click()
    if "paint" in view:
        page.locator(".painter canvas").wait_for()
        page.get_by_role("button", name="Left half").click()
    if view == "edit/paint":
        page.get_by_role("button", name="Remove blue star").click()
    if view == "edit/reweight":
        page.get_by_label("red").fill("2")
    if view != "create":
        page.locator(".panel .primary").click()
        page.wait_for_selector(".stage :is(.halves, .inside)")


def test_everything_is_reached_by_keys_alone(open_page, double):
    page = open_page(QUIET)

    def tab_to(what: str, most: int = 60) -> None:
        for _ in range(most):
            page.keyboard.press("Tab")
            if page.evaluate(f"() => document.activeElement.matches({what!r})"):
                break
        else:
            raise AssertionError(f"Tab never comes to {what}")
        style = "() => getComputedStyle(document.activeElement).outlineStyle"
        assert page.evaluate(style) != "none", f"no sign of focus on {what}"

    tab_to("[data-field=prompt] textarea")
    page.keyboard.press("Control+A")
    page.keyboard.type("a blue star")
    page.keyboard.press("Enter")
    generated(page)
    assert double.bodies("images")[-1].prompt == "a blue star"
    assert page.evaluate("() => document.activeElement.matches('textarea')")  # it stays where the person was
    tab_to(".actions button[title='What the network did']")
    page.keyboard.press("Enter")
    page.wait_for_selector(".inside")
    tab_to(".word:nth-child(3)")
    page.keyboard.press(" ")
    assert page.locator(".word[aria-pressed=true]").text_content() == "star"
    tab_to("input[type=range][aria-valuetext]")
    page.keyboard.press("Home")
    assert page.locator(".beside output").text_content().startswith("1 of 3")
    page.keyboard.press("Control+Home")
    page.locator("body").evaluate("() => document.activeElement.blur()")
    tab_to("[data-view=edit]")
    page.keyboard.press("Enter")
    page.wait_for_selector(".picker")
    tab_to(".picker .thumbs button")
    page.keyboard.press("Enter")
    page.wait_for_selector(".painter canvas")
    tab_to(".painter canvas")
    page.keyboard.press(" ")
    page.locator("body").evaluate("() => document.activeElement.blur()")
    tab_to(".panel .primary")
    page.keyboard.press("Enter")
    page.wait_for_selector(".halves")
    assert double.bodies("edits/inpaint")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_a_telephone(open_page, scheme):
    page = open_page(viewport={"width": 360, "height": 740}, has_touch=True, color_scheme=scheme)
    generated(page)
    for view in VIEWS:
        filled(page, view)
        assert page.evaluate("() => document.documentElement.scrollWidth") <= 360, view
        assert page.locator(".primary:visible").bounding_box()["width"] >= 100
        small = page.eval_on_selector_all(
            "button, a.button, select",
            "all => all.filter((one) => one.offsetParent && one.offsetHeight < 28).map((one) => one.textContent)",
        )
        assert not small, f"{view}: too small for a finger: {small}"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_fault(open_page, scheme):
    if not AXE.is_file():
        pytest.skip("no axe-core (npm ci --prefix tests/serve/page): accessibility is not checked by it")
    page = open_page(color_scheme=scheme)
    generated(page)
    for view in VIEWS:
        filled(page, view)
        page.evaluate(AXE.read_text(encoding="utf-8"))
        found = page.evaluate("async () => (await axe.run()).violations")
        bad = [
            f"{one['id']}: {one['help']}: {one['nodes'][0]['html'][:150]}"
            for one in found
            if one["impact"] in ("serious", "critical")
        ]
        assert not bad, f"{view}: {bad}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(FOLDER).as_posix())
def test_the_files_name_no_other_address_and_make_no_markup_of_data(file):
    text = file.read_text(encoding="utf-8")
    assert not re.findall(r"(?:https?:)?//[a-z][\w.-]+\.[a-z]{2,}", text.replace("http://www.w3.org/2000/svg", ""))
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|\bcookie", text)
    assert not re.search(r"<[^>]+\s(?:style|on\w+)=", text)  # what the content security policy would refuse
    long = [number for number, line in enumerate(text.splitlines(), 1) if len(line) > 120 and file.suffix != ".svg"]
    assert not long and text.count("\n") <= 400, f"lines over 120 characters: {long}"
