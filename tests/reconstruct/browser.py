"""A real browser for tests: Debian's chromium through playwright, and a page that keeps its log."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")

SIZES = {"laptop": (1366, 768), "tablet": (1180, 820), "upright": (820, 1180), "small": (1024, 768)}
OPTIONS = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
NOTHING_STICKS_OUT = "document.documentElement.scrollWidth <= innerWidth"


def artefacts_folder(temporary: Path) -> Path:
    """Where screenshots are kept: DAIF_ARTIFACTS, or a folder of this run."""
    folder = Path(os.environ.get("DAIF_ARTIFACTS", temporary))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield browser
        browser.close()


class Screen:
    """A page at `url` with its log; `wait` polls, as the page's policy forbids the eval that playwright waits with.

    Args:
        fits: JavaScript that must be true at every size at which a screenshot is taken.
    """

    def __init__(self, page: Any, url: str, artefacts: Path, fits: str = NOTHING_STICKS_OUT) -> None:
        self.page, self.artefacts, self.fits = page, artefacts, fits
        self.errors: list[str] = []
        self.requests: list[str] = []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        page.on("response", lambda answer: answer.status < 400 or self.errors.append(f"{answer.status} {answer.url}"))
        page.on("request", lambda request: self.requests.append(request.url))
        page.goto(url)

    def wait(self, expression: str, seconds: float = 120.0) -> None:
        deadline = time.monotonic() + seconds
        while not self.page.evaluate(f"Boolean({expression})"):
            assert time.monotonic() < deadline, f"{expression} stayed false; {self.page.inner_text('body')[:2000]}"
            time.sleep(0.1)

    def shot(self, name: str, sizes: Any = SIZES) -> None:
        """Screenshots at every size; `fits` holds at each of them."""
        for size in sizes:
            width, height = SIZES[size]
            self.page.set_viewport_size({"width": width, "height": height})
            self.page.wait_for_timeout(200)
            self.page.screenshot(path=self.artefacts / f"{name}-{size}.png")
            assert self.page.evaluate(self.fits), (name, size)
        self.page.set_viewport_size({"width": 1366, "height": 768})

    def asked_only(self, *own: str) -> None:
        """No error in the browser's log, and no request but to addresses that begin with one of `own`."""
        assert not self.errors, self.errors
        assert self.requests and [url for url in self.requests if not url.startswith((*own, "data:", "blob:"))] == []


@contextlib.contextmanager
def screen(browser: Any, url: str, artefacts: Path, **options: Any) -> Iterator[Screen]:
    """A fresh page, with its own cookies."""
    context = browser.new_context(viewport={"width": 1366, "height": 768})
    context.set_default_timeout(120_000)  # a busy machine is no failure
    yield Screen(context.new_page(), url, artefacts, **options)
    context.close()
