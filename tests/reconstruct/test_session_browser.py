"""`daif session` driven by a real browser with real keys; screenshots go to DAIF_ARTIFACTS or a temporary folder."""

import contextlib
import os
import shutil
import time
from pathlib import Path

import pytest

from tests.reconstruct.session_server import session

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")

CAMERA = "simulated:motorcycle?width=240"
SIZES = {"laptop": (1366, 768), "tablet": (1024, 768), "portrait": (820, 1180)}
OPTIONS = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory):
    named = os.environ.get("DAIF_ARTIFACTS")
    folder = Path(named) if named else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class Screen:
    """A page with its log; `wait` polls, because the page's policy forbids the eval that playwright waits with."""

    def __init__(self, page, artefacts):
        self.page, self.artefacts = page, artefacts
        self.errors, self.requests = [], []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: self.requests.append(request.url))

    def wait(self, expression, seconds=120.0):
        deadline = time.monotonic() + seconds
        while not self.page.evaluate(f"Boolean({expression})"):
            assert time.monotonic() < deadline, f"{expression} stayed false; {self.page.evaluate('state')}"
            time.sleep(0.1)

    def shot(self, name):
        for size, (width, height) in SIZES.items():
            self.page.set_viewport_size({"width": width, "height": height})
            self.page.wait_for_timeout(250)
            self.page.screenshot(path=self.artefacts / f"session-{name}-{size}.png")
            # nothing may stick out to the side, at any size
            assert self.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (name, size)
        self.page.set_viewport_size({"width": 1366, "height": 768})


@contextlib.contextmanager
def screen(server, artefacts):
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        page = browser.new_page(viewport={"width": 1366, "height": 768})
        shown = Screen(page, artefacts)
        page.goto(server.url)
        shown.wait("state && state.camera.state === 'idle' && last")
        yield shown
        browser.close()


def mark(shown):
    """Both ends, by keys alone."""
    keyboard = shown.page.keyboard
    for key, which in (("ArrowLeft", "near"), ("ArrowRight", "far")):
        keyboard.down("Shift")
        for _ in range(20):
            keyboard.press(key)
        keyboard.up("Shift")
        keyboard.press("ArrowRight" if which == "near" else "ArrowLeft")
        keyboard.press(which[0])
        shown.wait(f"state.marks.{which}")
    shown.wait("state.plan && !state.plan.problem")


def test_a_whole_session_by_keyboard(tmp_path, artefacts):
    """Marks, plan, sweep, depth on screen, an unplugged camera, resume."""
    with (
        session(tmp_path / "studio", CAMERA + "&fault=disconnect@8x4", "--method", "plane-sweep") as server,
        screen(server, artefacts) as shown,
    ):
        page = shown.page
        page.keyboard.press("?")
        assert page.is_visible("#help")
        page.keyboard.press("Escape")
        mark(shown)
        assert page.locator("#range circle").count() == page.evaluate("state.plan.count")
        wide_open = page.evaluate("state.plan.frames[0].typical_m")
        page.fill("#f-number", "8")
        page.keyboard.press("Enter")
        shown.wait(f"state.plan.frames[0].typical_m > {1.5 * wide_open}")
        page.fill("#f-number", "2.8")
        page.fill("#count", "6")
        shown.wait("state.plan.count === 6 && state.wishes.f_number === null")
        page.evaluate("document.activeElement.blur()")
        shown.shot("marked")
        page.keyboard.press(" ")
        shown.wait("state.takes.length && state.takes[0].result")
        shown.wait("document.querySelector('#depth').complete && document.querySelector('#depth').naturalWidth > 0")
        assert page.locator("#strip figure").count() == 6
        assert "Take 1" in page.inner_text("#result")
        shown.shot("depth")
        page.keyboard.press(" ")
        shown.wait("state.takes.length > 1 && state.takes[1].status === 'unfinished'")
        assert "Resume" in page.inner_text("#takes")
        shown.shot("unplugged")
        page.click("#takes button:has-text('Resume')")
        shown.wait("state.takes[1].status === 'complete'")
        page.fill("#takes input[type=text] >> nth=0", "second light on")
        page.keyboard.press("Enter")
        shown.wait("state.takes[1].note === 'second light on'")
        assert shown.errors == []
        assert {url.partition("/?")[0] for url in shown.requests} and all(
            url.startswith((server.base, "ws" + server.base[4:], "data:", "blob:")) for url in shown.requests
        )


def test_a_camera_that_is_not_there_is_said_and_tried_again(tmp_path, artefacts):
    with (
        session(tmp_path, CAMERA + "&fault=not_found@0", "--method", "plane-sweep") as server,
        playwright.sync_playwright() as driver,
    ):
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        shown = Screen(browser.new_page(viewport={"width": 1366, "height": 768}), artefacts)
        shown.page.goto(server.url)
        shown.wait("state && state.camera.state === 'gone'")
        assert "no simulated camera is connected" in shown.page.inner_text("#cover")
        shown.shot("no-camera")
        shown.page.click("#connect")
        shown.wait("state.camera.state === 'idle' && last")
        browser.close()


@pytest.mark.slow
def test_fine_tuning_from_the_page(tmp_path, artefacts):
    """Two takes, a short run on the first, before and after on the second; accepted if it was better."""
    with (
        session(tmp_path, CAMERA, "--method", "network", "--train-steps", "40") as server,
        screen(server, artefacts) as shown,
    ):
        page = shown.page
        mark(shown)
        for number in (1, 2):
            page.keyboard.press(" ")
            shown.wait(f"state.takes.length === {number} && state.takes[{number - 1}].result", 300)
        page.check("#takes input[type=checkbox] >> nth=1")
        page.click("#train")
        shown.wait("state.training && state.training.lines.length")
        shown.shot("training")
        shown.wait("state.training.state !== 'running'", 900)
        assert page.evaluate("state.training.state") == "finished", page.evaluate("state.training")
        assert "mean" in page.inner_text("#training-text")
        if page.evaluate("state.training.better"):
            shown.wait("state.training.before && state.training.after", 300)
            shown.shot("trained")
            page.click("#train-accept")
            shown.wait("state.method.includes('fine-tuned')")
        else:
            shown.shot("trained")
            page.click("#train-discard")
            shown.wait("!state.training")
