"""The page before the model that comes with the package: what a person sees after `make serve`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from serve.conftest import running
from serve.page.test_create import generated, pixels_of, shown

pytestmark = pytest.mark.slow  # half a second an image where nothing else runs
PROMPT = "a red circle left of a blue square on a yellow background"
ASKED = f"#/create?prompt={PROMPT.replace(' ', '+')}&seed=1&locked=1"


@pytest.fixture
def address() -> Iterator[Callable[[], str]]:
    from raphael.serve.info import Catalogue
    from raphael.serve.models import open_models
    from raphael.serve.server import local_perform

    models = open_models(["scenes"], "cpu")
    with contextlib.ExitStack() as stack:
        served = stack.enter_context(running(Catalogue((models["scenes"].info,)), local_perform(models)))
        yield lambda: f"{served.url}/"


def near(image: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return (np.abs(image.astype(int) - colour) < 70).all(-1)


def test_a_word_is_looked_at_where_its_object_is_and_a_masked_object_goes(open_page):
    page = open_page(ASKED)
    page.set_default_timeout(120_000)
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
