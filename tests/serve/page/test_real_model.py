"""The page before the model that comes with the package: what a person sees after `make serve`."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import psutil
import pytest
from serve.conftest import running
from serve.page.conftest import CONTEXT
from serve.page.test_create import generated, pixels_of, shown
from truth.tiny_raphael import write_pipeline

from raphael.edit.paint import COLOURS

pytestmark = pytest.mark.slow  # half a second an image where nothing else runs
PROMPT = "a red circle left of a blue square on a yellow background"
ASKED = f"#/create?prompt={PROMPT.replace(' ', '+')}&seed=1&locked=1"
READY_S = 15.0  # from the command to a picture on the page, where nothing else runs
WAIT_MS = 120_000


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """scenes, the same again, and one of random weights, 32 x 32 px."""
    from raphael.serve.models import open_models

    folder = write_pipeline(tmp_path_factory.mktemp("model") / "tiny")
    return open_models(["scenes", "scenes"], "cpu", found=[folder])


@pytest.fixture
def address(models: dict[str, Any]) -> Iterator[Callable[[], str]]:
    from raphael.serve.info import Catalogue
    from raphael.serve.server import local_perform

    catalogue = Catalogue(tuple(served.info for served in models.values()))
    with contextlib.ExitStack() as stack:
        served = stack.enter_context(running(catalogue, local_perform(models)))
        yield lambda: f"{served.url}/"


def near(image: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return (np.abs(image.astype(int) - colour) < 70).all(-1)


def test_a_word_is_looked_at_where_its_object_is_and_a_masked_object_goes(open_page):
    page = open_page(ASKED)
    page.set_default_timeout(WAIT_MS)
    page.get_by_role("button", name="Generate").click()
    generated(page)
    (image,) = shown(page)
    blue, red = near(image, (30, 80, 225)), near(image, (220, 30, 35))
    assert np.argwhere(red)[:, 1].mean() < 32 < np.argwhere(blue)[:, 1].mean()

    page.get_by_role("button", name="Look inside").click()
    page.wait_for_selector(".inside")
    page.locator(".word", has_text="blue").click()
    heat = pixels_of(page.locator(".beside canvas").evaluate("node => node.toDataURL()")).astype(float) @ (
        0.3,
        0.6,
        0.1,
    )
    hot = heat >= np.quantile(heat, 0.9)
    assert (hot & blue).sum() > 0.5 * hot.sum()  # of the tenth that is brightest, most lies on the blue square

    page.go_back()
    page.get_by_role("button", name="Edit this").click()
    page.locator(".painter canvas").wait_for()
    page.get_by_role("button", name="Left half").click()
    page.locator("[data-field=prompt] textarea").fill("a blue square on a yellow background")
    page.get_by_role("button", name="Apply").click()
    page.wait_for_selector(".halves")
    after = pixels_of(page.locator(".halves .after").get_attribute("src"))
    assert (after[:, 40:] == image[:, 40:]).all()  # outside the mask and its soft edge it is the image itself
    assert (after[:, :32] != image[:, :32]).any()


def test_a_running_job_ends_when_it_is_cancelled_and_the_next_one_works(open_page):
    page = open_page(ASKED + "&num_inference_steps=100")
    page.set_default_timeout(WAIT_MS)
    page.get_by_role("button", name="Generate").click()
    page.wait_for_function("() => /^Step [1-9]/.test(document.querySelector('.told').textContent)")
    page.keyboard.press("Escape")
    page.wait_for_selector(".stage .empty")
    cancelled = """async () => /jobs_total\\{kind="images",state="cancelled"\\} 1.0/.test(
        await (await fetch("metrics")).text())"""
    page.wait_for_function(cancelled)
    page.get_by_label("Steps").fill("2")
    page.get_by_role("button", name="Generate").click()
    generated(page)


def test_phrases_are_drawn_where_they_are_painted(open_page):
    page = open_page("#/edit/paint?seed=4&locked=1")
    page.set_default_timeout(WAIT_MS)
    page.get_by_role("button", name="Right half").click()
    page.get_by_label("Paint blue star").check()
    page.get_by_role("button", name="Left half").click()
    page.get_by_role("button", name="Apply").click()
    page.wait_for_selector(".halves")
    result = pixels_of(page.locator(".halves .after").get_attribute("src"))
    blue, red = near(result, (30, 80, 225)), near(result, (220, 30, 35))
    assert np.argwhere(blue)[:, 1].mean() < 32 < np.argwhere(red)[:, 1].mean()
    painted = pixels_of(page.locator(".trio img").first.get_attribute("src"))
    assert (painted[:, 32:] == COLOURS[0]).all() and (painted[:, :32] == COLOURS[1]).all()


def test_models_are_compared_and_chosen(open_page):
    """A model with itself: no pixel apart. One that nobody named is chosen at the head of the page."""
    page = open_page(ASKED.replace("create", "compare"))
    page.set_default_timeout(WAIT_MS)
    page.get_by_label("Model of B").select_option("scenes-2")
    page.get_by_role("button", name="Compare").click()
    page.wait_for_selector(".trio figure")
    assert page.locator(".trio figcaption").text_content() == "seed 1: 0.0 of 255 apart in the mean"
    page.get_by_role("link", name="Create").click()
    page.get_by_label("Model", exact=True).select_option("tiny")
    page.get_by_label("Steps").fill("2")
    page.get_by_role("button", name="Generate").click()
    generated(page)
    assert shown(page)[0].shape == (32, 32, 3) and page.locator(".stage .meta").text_content().startswith("tiny")


def test_a_page_with_a_picture_is_there_soon_after_the_command(chromium, tmp_path):
    """What `make serve` does after `make setup`, by a person whose browser is open."""
    command = [sys.executable, "-m", "raphael.cli", "serve", "--port", "0", "--device", "cpu"]
    begun_s = time.monotonic()
    process = subprocess.Popen(
        command, cwd=tmp_path, text=True, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": os.getcwd()}
    )
    try:
        line = process.stdout.readline()
        ready_s = time.monotonic() - begun_s
        context = chromium.new_context(**CONTEXT)
        page = context.new_page()
        page.set_default_timeout(WAIT_MS)
        page.goto(re.match(r"raphael serve: (\S+)", line)[1])
        generated(page)
        seconds = time.monotonic() - begun_s
        (image,) = shown(page)
        used = psutil.Process(process.pid).cpu_times()
        context.close()
    finally:
        process.terminate()
        process.communicate(timeout=20)
    others = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))  # of the last minute: what one gets of a core
    print(f"ready after {ready_s:.1f} s, a picture on the page after {seconds:.1f} s; load {others:.1f} a core")
    print(f"the server used {used.user + used.system:.1f} s of a core")
    assert image.std() > 10
    assert seconds < READY_S * others
