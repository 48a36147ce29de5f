"""The images of docs/guides/serve.md, taken anew from a server that runs:
`python tests/serve/page/take_screenshots.py http://127.0.0.1:8000/ --out docs/images/serve`."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from PIL import Image

PROMPT = "a red circle left of a blue square on a yellow background"
CALM = {"reduced_motion": "reduce"}
DESK = {"viewport": {"width": 1240, "height": 860}}
PHONE = {"viewport": {"width": 360, "height": 740}, "device_scale_factor": 2, "has_touch": True, "color_scheme": "dark"}
BEFORE = (("a purple heart on a white background", 1), ("a yellow star on a green background", 3))
COLOURS = 192  # of a PNG's palette: flat surfaces and images of few colours lose nothing to the eye


def create(page: Any, address: str) -> None:
    for prompt, seed in BEFORE:
        generate(page, address, prompt, seed)
    generate(page, address, PROMPT, 1, n=4)
    page.locator(".examples").scroll_into_view_if_needed()
    page.wait_for_function("() => !document.querySelector('.example[data-made=no]')")


def generate(page: Any, address: str, prompt: str, seed: int, n: int = 1) -> None:
    page.goto(f"{address}#/create?{urlencode({'prompt': prompt, 'seed': seed, 'locked': 1, 'n': n})}")
    page.wait_for_timeout(300)
    page.get_by_role("button", name="Generate").click()
    page.wait_for_function("() => !document.querySelector('.panel .primary').hasAttribute('aria-disabled')")


def phone(page: Any, address: str) -> None:
    generate(page, address, PROMPT, 1)


def edit(page: Any, address: str) -> None:
    generate(page, address, PROMPT, 1)
    page.get_by_role("button", name="Edit this").click()
    canvas = page.locator(".painter canvas")
    canvas.wait_for()
    box = canvas.bounding_box()
    page.locator(".brush input").fill("12")
    page.locator("[data-field=prompt] textarea").fill("a green star left of a blue square on a yellow background")
    x, y = box["x"] + 0.26 * box["width"], box["y"] + 0.5 * box["height"]
    page.mouse.move(x, y - 0.08 * box["height"])
    page.mouse.down()
    page.mouse.move(x, y + 0.08 * box["height"], steps=8)
    page.mouse.up()
    page.get_by_role("button", name="Apply").click()
    page.wait_for_selector(".halves")
    page.get_by_label("Before and after").fill("26")


def paint(page: Any, address: str) -> None:
    page.goto(f"{address}#/edit/paint?seed=4&locked=1")
    page.get_by_role("button", name="Right half").click()
    page.get_by_label("Paint blue star").check()
    page.get_by_role("button", name="Left half").click()
    page.get_by_role("button", name="Apply").click()
    page.wait_for_selector(".halves")


def inside(page: Any, address: str) -> None:
    page.goto(f"{address}#/inside?prompt={PROMPT.replace(' ', '+')}&seed=1&locked=1")
    page.get_by_role("button", name="Look inside").click()
    page.wait_for_selector(".inside")
    page.locator(".word", has_text="blue").click()


def compare(page: Any, address: str) -> None:
    page.goto(f"{address}#/compare?prompt={PROMPT.replace(' ', '+')}&seed=1&locked=1&n=2")
    page.get_by_role("group", name="B", exact=True).get_by_label("Steps").fill("4")
    page.get_by_role("button", name="Compare").click()
    page.wait_for_selector(".trio figure:nth-child(2)")


SHOTS = {  # name: (what is done, the window)
    "create": (create, DESK),
    "edit": (edit, DESK),
    "paint": (paint, DESK),
    "inside": (inside, DESK),
    "compare": (compare, DESK),
    "phone": (phone, PHONE),
}


def main() -> None:
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address", help="of the server, with its slash at the end")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=SHOTS, default=list(SHOTS))
    parser.add_argument("--dark", action="store_true")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        path = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        pages: dict[str, Any] = {}
        for name in asked.only:
            act, window = SHOTS[name]
            scheme = {"color_scheme": "dark"} if asked.dark else {}
            page = pages.setdefault(str(window), browser.new_context(**CALM | window | scheme).new_page())
            page.set_default_timeout(120_000)  # ms
            page.goto(asked.address)
            act(page, asked.address)
            page.locator("body").evaluate("() => document.activeElement.blur() ?? scrollTo(0, 0)")
            file = asked.out / f"{name}.png"
            page.screenshot(path=file, full_page=name != "phone")
            with Image.open(file) as image:
                image.convert("RGB").quantize(COLOURS).save(file, optimize=True)
            print(file, file.stat().st_size)
        browser.close()


if __name__ == "__main__":
    main()
