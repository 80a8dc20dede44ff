"""`daif session` driven by a real browser with real keys; screenshots go to DAIF_ARTIFACTS or a temporary folder."""

import contextlib
import os
import shutil
import time
from pathlib import Path

import pytest

from capture.stack import FocalStack
from tests.reconstruct.session_server import session

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")

ROOT = Path(__file__).resolve().parents[2]
CAMERA = "simulated:motorcycle?width=240"
SIZES = {"laptop": (1366, 768), "tablet": (1180, 820), "upright": (820, 1180), "small": (1024, 768)}
OPTIONS = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
# nothing sticks out, at any size: no scrolling of the page; the button that counts and the takes are in sight
FITS = """[
  document.documentElement.scrollWidth <= innerWidth, document.documentElement.scrollHeight <= innerHeight,
  (state.sweep ? $("stop") : $("sweep")).getBoundingClientRect().bottom <= innerHeight,
  ((box) => Math.min(box.top + 100, box.bottom) <= innerHeight)($("takes-panel").getBoundingClientRect())]"""


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory):
    named = os.environ.get("DAIF_ARTIFACTS")
    folder = Path(named) if named else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield browser
        browser.close()


class Screen:
    """A page with its log; `wait` polls, because the page's policy forbids the eval that playwright waits with."""

    def __init__(self, page, server, artefacts):
        self.page, self.server, self.artefacts = page, server, artefacts
        self.errors, self.requests = [], []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        page.on("response", lambda answer: answer.status < 400 or self.errors.append(f"{answer.status} {answer.url}"))
        page.on("request", lambda request: self.requests.append(request.url))
        page.goto(server.url)

    def wait(self, expression, seconds=120.0):
        deadline = time.monotonic() + seconds
        while not self.page.evaluate(f"Boolean({expression})"):
            assert time.monotonic() < deadline, f"{expression} stayed false; {self.page.evaluate('state')}"
            time.sleep(0.1)

    def shot(self, name, sizes=SIZES):
        """Screenshots at every size; everything that counts is in sight at each of them."""
        for size in sizes:
            width, height = SIZES[size]
            self.page.set_viewport_size({"width": width, "height": height})
            self.page.wait_for_timeout(200)
            self.page.screenshot(path=self.artefacts / f"session-{name}-{size}.png")
            assert self.page.evaluate(FITS) == [True] * 4, (name, size)
        self.page.set_viewport_size({"width": 1366, "height": 768})

    def is_quiet(self):
        """No error in the browser's log, and nobody was asked but the session itself."""
        own = (self.server.base, "ws" + self.server.base[4:], "data:", "blob:")
        assert self.errors == []
        assert self.requests and [url for url in self.requests if not url.startswith(own)] == []


@contextlib.contextmanager
def screen(browser, server, artefacts):
    context = browser.new_context(viewport={"width": 1366, "height": 768})
    yield Screen(context.new_page(), server, artefacts)
    context.close()


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


def test_a_whole_session_by_keyboard(browser, tmp_path, artefacts):
    """Marks, plan, sweep, depth on screen, an unplugged camera, resume, a note; opened again it is all there."""
    folder = tmp_path / "studio"
    camera = CAMERA + "&latency_s=0.1&fault=disconnect@8x4"
    with session(folder, camera, "--method", "plane-sweep") as server, screen(browser, server, artefacts) as shown:
        page, press = shown.page, shown.page.keyboard.press
        shown.wait("state && state.camera.state === 'idle' && last")
        press("?")
        assert page.is_visible("#help")
        press("Escape")
        shown.shot("idle")
        mark(shown)
        assert page.locator("#range circle").count() == page.evaluate("state.plan.count")
        wide_open = page.evaluate("state.plan.frames[0].typical_m")
        page.fill("#f-number", "8")
        press("Enter")
        shown.wait(f"state.plan.frames[0].typical_m > {1.5 * wide_open}")
        page.fill("#f-number", "2.8")
        page.fill("#count", "6")
        shown.wait("state.plan.count === 6 && state.wishes.f_number === null")
        page.evaluate("document.activeElement.blur()")
        shown.shot("marked")
        press(" ")
        shown.wait("state.sweep && state.sweep.done > 1")
        shown.shot("sweeping", ["laptop"])
        shown.wait("state.takes.length && state.takes[0].result && !state.takes[0].look")
        shown.wait("document.querySelector('#depth').complete && document.querySelector('#depth').naturalWidth > 0")
        assert page.locator("#strip figure").count() == 6
        assert "Take 1" in page.inner_text("#result") and " m to " in page.inner_text("#depth-note")
        shown.shot("depth")
        press("d")
        assert page.is_visible("#zoomed")
        press("d")
        press(" ")
        shown.wait("state.takes.length > 1 && state.takes[1].status === 'unfinished'")
        shown.wait("state.camera.state === 'idle'")
        assert "the camera stopped answering" in page.inner_text("#takes")
        shown.shot("unplugged")
        press("r")
        shown.wait("state.takes[1].status === 'complete' && state.takes[1].result && !state.takes[1].look")
        press("m")
        page.keyboard.type("second light on")
        press("Enter")
        shown.wait("state.takes[1].note === 'second light on'")
        shown.shot("resumed")
        shown.is_quiet()
        server.stop()
        shown.wait("document.querySelector('#connection').textContent.includes('does not answer')")
    with session(folder, CAMERA, "--method", "plane-sweep") as server, screen(browser, server, artefacts) as shown:
        shown.wait(
            "state && state.camera.state === 'idle' && last && document.querySelector('#depth').naturalWidth > 0"
        )
        page = shown.page
        assert page.locator("#takes .take").count() == 2
        assert page.input_value("#takes input[type=text] >> nth=0") == "second light on"
        page.keyboard.press("PageDown")
        assert page.inner_text("#result-title") == "Take 1"
        shown.shot("reopened")
        shown.is_quiet()


def test_a_camera_that_is_not_there_is_said_and_tried_again(browser, tmp_path, artefacts):
    with session(tmp_path, CAMERA + "&fault=not_found@0") as server, screen(browser, server, artefacts) as shown:
        shown.wait("state && state.camera.state === 'gone'")
        assert "no simulated camera is connected" in shown.page.inner_text("#cover")
        shown.shot("no-camera", ["laptop", "upright"])
        shown.page.click("#connect")
        shown.wait("state.camera.state === 'idle' && last")


def test_a_lens_turned_by_hand_is_asked_for_frame_by_frame(browser, tmp_path, artefacts):
    """Live view stays in sight beside the question, the space bar answers it; a low battery is said."""
    ring = tmp_path / "ring"
    ring.write_text("1.5")
    program = (str(ROOT / "tests" / "reconstruct" / "hand_turned.py"),)
    environment = {"PYTHONPATH": str(ROOT), "DAIF_RING": str(ring)}
    with (
        session(tmp_path / "out", "x:", "--manual-focus", program=program, env=environment) as server,
        screen(browser, server, artefacts) as shown,
    ):
        page = shown.page
        shown.wait("state && state.camera.state === 'idle' && last")
        assert "the battery is low (15%)" in page.inner_text("#notices")
        assert not page.is_visible("#mark-near") and "type the near and far distance" in page.text_content("#range")
        for which, metres in (("near", "1.2"), ("far", "2.4")):
            page.fill(f"#{which}-m", metres)
            page.keyboard.press("Enter")
            shown.wait(f"state.marks.{which}")
        page.fill("#count", "3")
        shown.wait("state.plan.count === 3")
        page.evaluate("document.activeElement.blur()")
        page.keyboard.press(" ")
        for number in (1, 2, 3):
            shown.wait(f"state.question && state.question.startsWith('frame {number} of 3')")
            distance = page.inner_text("#question").split()[-2]
            ring.write_text(distance)
            if number == 2:
                assert page.is_visible("#view") and not page.is_visible("#cover")
                shown.shot("by-hand", ["laptop", "upright"])
            page.keyboard.press(" ")
            shown.wait(f"!state.question || !state.question.startsWith('frame {number} of 3')")
        shown.wait("state.takes[0].status === 'complete'")
        shown.is_quiet()
    with FocalStack.open(tmp_path / "out" / "takes" / "001.h5") as stack:
        assert stack.focus_distance_m[[0, -1]].tolist() == pytest.approx([1.2, 2.4])


@pytest.mark.slow
def test_fine_tuning_from_the_page(browser, tmp_path, artefacts):
    """Two takes, a short run on the first, before and after on the second; accepted if it was better."""
    with (
        session(tmp_path, CAMERA, "--method", "network", "--train-steps", "40") as server,
        screen(browser, server, artefacts) as shown,
    ):
        page = shown.page
        shown.wait("state && state.camera.state === 'idle' && last")
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
