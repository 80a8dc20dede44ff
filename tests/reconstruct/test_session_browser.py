"""`daif session` driven by a real browser with real keys; screenshots go to DAIF_ARTIFACTS or a temporary folder."""

from pathlib import Path

import pytest

from capture.stack import FocalStack
from tests.reconstruct import browser as real
from tests.reconstruct.session_server import session

pytestmark = real.needs_chromium

ROOT = Path(__file__).resolve().parents[2]
CAMERA = "simulated:motorcycle?width=240"
# at any size: no scrolling of the page; the button that counts and the takes are in sight
FITS = """(({ bottom, top }) =>
  document.documentElement.scrollWidth <= innerWidth && document.documentElement.scrollHeight <= innerHeight
  && (state.sweep ? $("stop") : $("sweep")).getBoundingClientRect().bottom <= innerHeight
  && Math.min(top + 100, bottom) <= innerHeight)($("takes-panel").getBoundingClientRect())"""


def screen(browser, server, artefacts):
    return real.screen(browser, server.url, artefacts, fits=FITS)


def is_quiet(shown, server):
    """Nobody was asked but the session itself."""
    shown.asked_only(server.base, "ws" + server.base[4:])


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
        shown.shot("session-idle")
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
        shown.shot("session-marked")
        press(" ")
        shown.wait("state.sweep && state.sweep.done > 1")
        shown.shot("session-sweeping", ["laptop"])
        shown.wait("state.takes.length && state.takes[0].result && !state.takes[0].look")
        shown.wait("document.querySelector('#depth').complete && document.querySelector('#depth').naturalWidth > 0")
        assert page.locator("#strip figure").count() == 6
        assert "Take 1" in page.inner_text("#result") and " m to " in page.inner_text("#depth-note")
        shown.shot("session-depth")
        press("d")
        assert page.is_visible("#zoomed")
        press("d")
        press(" ")
        shown.wait("state.takes.length > 1 && state.takes[1].status === 'unfinished'")
        shown.wait("state.camera.state === 'idle'")
        assert "the camera stopped answering" in page.inner_text("#takes")
        shown.shot("session-unplugged")
        press("r")
        shown.wait("state.takes[1].status === 'complete' && state.takes[1].result && !state.takes[1].look")
        press("m")
        page.keyboard.type("second light on")
        press("Enter")
        shown.wait("state.takes[1].note === 'second light on'")
        shown.shot("session-resumed")
        is_quiet(shown, server)
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
        shown.shot("session-reopened")
        is_quiet(shown, server)


def test_a_camera_that_is_not_there_is_said_and_tried_again(browser, tmp_path, artefacts):
    with session(tmp_path, CAMERA + "&fault=not_found@0") as server, screen(browser, server, artefacts) as shown:
        shown.wait("state && state.camera.state === 'gone'")
        assert "no simulated camera is connected" in shown.page.inner_text("#cover")
        shown.shot("session-no-camera", ["laptop", "upright"])
        shown.page.click("#connect")
        shown.wait("state.camera.state === 'idle' && last")


def test_a_lens_turned_by_hand_is_asked_for_frame_by_frame(browser, tmp_path, artefacts):
    """Live view stays in sight beside the question, the space bar answers it; a low battery is said."""
    ring = tmp_path / "ring"

    def turn(metres):  # at once: the live view reads the ring at any moment
        turned = ring.with_suffix(".new")
        turned.write_text(metres)
        turned.replace(ring)

    turn("1.5")
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
            turn(distance)
            if number == 2:
                assert page.is_visible("#view") and not page.is_visible("#cover")
                shown.shot("session-by-hand", ["laptop", "upright"])
            page.keyboard.press(" ")
            shown.wait(f"!state.question || !state.question.startsWith('frame {number} of 3')")
        shown.wait("state.takes[0].status === 'complete'")
        is_quiet(shown, server)
    with FocalStack.open(tmp_path / "out" / "takes" / "001.h5") as stack:
        assert stack.focus_distance_m[[0, -1]].tolist() == pytest.approx([1.2, 2.4])


def test_fine_tuning_is_offered_judged_accepted_or_not_kept(browser, tmp_path, artefacts):
    """Not better: nothing is kept. Better: before and after on the take that was not trained on, then accepted."""
    program = (str(ROOT / "tests" / "reconstruct" / "quick_training.py"),)
    environment = {"PYTHONPATH": str(ROOT)}
    with (
        session(tmp_path, "simulated:motorcycle?width=160", program=program, env=environment) as server,
        screen(browser, server, artefacts) as shown,
    ):
        page, press = shown.page, shown.page.keyboard.press
        shown.wait("state && state.camera.state === 'idle' && last")
        mark(shown)
        page.fill("#count", "4")
        shown.wait("state.plan.count === 4")
        page.evaluate("document.activeElement.blur()")
        for number in (1, 2):
            press(" ")
            shown.wait(f"state.takes.length === {number} && state.takes[{number - 1}].result")
        assert not page.is_visible("#training")
        press("PageUp")
        press("PageDown")
        press("x")
        assert page.inner_text("#train") == "Fine-tune on 1 take"
        page.click("#train")
        shown.wait("state.training && state.training.state === 'running'")
        press(" ")  # the camera does not wait for the training
        shown.wait("state.takes.length === 3 && state.takes[2].frames > 0")
        shown.wait("state.training.state === 'finished'")
        assert "nothing is kept" in page.inner_text("#training") and "+10.0 %" in page.inner_text("#training-text")
        assert not page.is_visible("#train-accept")
        page.click("#train-discard")
        shown.wait("!state.training && state.takes[2].result")
        assert page.evaluate("state.method") == "plane sweep"
        page.click("#train")
        shown.wait("state.training && state.training.before && state.training.after")
        shown.wait("$('before').naturalWidth > 0 && $('after').naturalWidth > 0")
        assert "take 3 (not trained on)" in page.inner_text("#training-pair")
        shown.shot("session-trained")
        page.click("#train-accept")
        shown.wait("state.method.includes('fine-tuned here')")
        is_quiet(shown, server)


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
        shown.shot("session-training")
        shown.wait("state.training.state !== 'running'", 900)
        assert page.evaluate("state.training.state") == "finished", page.evaluate("state.training")
        assert "mean" in page.inner_text("#training-text")
        if page.evaluate("state.training.better"):
            shown.wait("state.training.before && state.training.after", 300)
            shown.shot("session-trained")
            page.click("#train-accept")
            shown.wait("state.method.includes('fine-tuned')")
        else:
            shown.shot("session-trained")
            page.click("#train-discard")
            shown.wait("!state.training")
