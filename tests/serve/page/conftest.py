"""Chromium without a window, driven by Playwright, before a server that paints flat colours (double.py)."""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from serve.conftest import running
from serve.page.double import Double

NAMES = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]
CONTEXT = {"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce"}
WAIT_MS = 20000  # on a machine that does much else; nothing waits for it where all is well


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright (make browser): the page is not driven")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("no chromium on PATH (make browser): the page is not driven in a browser")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=OPTIONS)
        yield browser
        browser.close()


@pytest.fixture
def double() -> Double:
    return Double()


@pytest.fixture
def address(double: Double) -> Iterator[Callable[[], str]]:
    """address() of a server that begins when it is first asked for: what a test sets before holds for it."""
    with contextlib.ExitStack() as stack:
        begin = lambda: stack.enter_context(running(double.catalogue, double, token=double.token))  # noqa: E731
        served = functools.cache(begin)
        yield lambda: f"{served().url}/"


@pytest.fixture
def open_page(chromium: Any, address: Callable[[], str]) -> Iterator[Callable[..., Any]]:
    """open_page(anchor="", **options of a context): a person's browser at the page, with nothing kept from before.

    Afterwards no page may have said an error on its console, met an exception, or asked another origin for anything;
    what a test provoked it takes out of open_page.faults.
    """
    contexts: list[Any] = []
    faults: list[str] = []

    def outside(url: str) -> bool:
        return urlsplit(url).scheme not in ("data", "blob") and urlsplit(url).netloc != urlsplit(address()).netloc

    def open_page(anchor: str = "", **options: Any) -> Any:
        context = chromium.new_context(**CONTEXT | options)
        context.set_default_timeout(WAIT_MS)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda asked: faults.append(asked.url) if outside(asked.url) else None)
        page.goto(address() + anchor)
        page.wait_for_selector("main .view, main .notice, dialog")
        return page

    open_page.faults = faults  # type: ignore[attr-defined]
    yield open_page
    for context in contexts:
        context.close()
    assert not faults, faults
