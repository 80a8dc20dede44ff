"""`daif session` on libgphoto2's own virtual camera; what is real and what is faked stands in virtual_dslr.py."""

import os
from pathlib import Path

import pytest

from capture.stack import FocalStack
from tests.reconstruct import browser as real
from tests.reconstruct.session_server import Page, idle, session

ROOT = Path(__file__).resolve().parents[2]
RIG = ROOT / "tests" / "capture" / "virtual_dslr.py"


@pytest.fixture
def rig(tmp_path):
    """A running session on a fresh virtual DSLR."""
    if not has_virtual_camera():
        pytest.skip("this gphoto2 has no virtual USB port")
    folder = tmp_path / "rig"
    folder.mkdir()
    environment = {"PYTHONPATH": str(ROOT), "DAIF_RIG": str(folder)}
    with session(tmp_path / "out", "gphoto2:", program=(str(RIG),), env=environment) as server:
        yield server


def has_virtual_camera():
    gphoto2 = pytest.importorskip("gphoto2")
    return any(Path(gphoto2.__file__).parent.rglob("vusb*.so"))


@pytest.mark.skipif(os.name == "nt", reason="libgphoto2 is not for Windows")
def test_a_dslr_without_calibration_is_swept_in_its_steps(rig, tmp_path):
    """Marks by moving the motor, a sweep in its steps, ordered depth without metres; one connection all the time."""
    with rig.page() as connection:
        page = Page(connection)
        state = page.until(idle)
        assert "D750" in state["camera"]["model"] and state["camera"]["unit"] == "step"
        for which, position in (("near", 20.0), ("far", 260.0)):
            page.say(do="focus", to=position)
            page.say(do="mark", which=which)
            page.until(lambda s, which=which, position=position: s["marks"][which] == {"position": position, "m": None})
        page.say(do="plan", count=4)
        plan = page.until(lambda s: s["plan"]["count"] == 4)["plan"]
        assert "without metres" in plan["warnings"][0]
        page.say(do="sweep")
        take = page.until(lambda s: s["takes"] and (s["takes"][0]["result"] or s["takes"][0]["failure"]), 200)["takes"][
            0
        ]
        assert take["frames"] == 4 and take["facts"]["near_m"] is None and not take["failure"]
        page.until(lambda s: s["camera"]["state"] == "idle")
        assert not (tmp_path / "rig" / "exits").exists()
    with FocalStack.open(tmp_path / "out" / "takes" / "001.h5") as stack:
        assert stack.n_frames == 4 and not stack.is_metric and all(stack.original_name)


@real.needs_chromium
@pytest.mark.skipif(os.name == "nt", reason="libgphoto2 is not for Windows")
def test_the_page_says_what_the_virtual_dslr_is_and_lacks(rig, tmp_path):
    """No live view, a battery, positions in steps: in plain words, and the frames appear all the same."""
    artefacts = real.artefacts_folder(tmp_path / "screenshots")
    with real.chromium() as browser, real.screen(browser, rig.url, artefacts) as shown:
        page = shown.page
        shown.wait("state && state.camera.state === 'idle'")
        assert page.inner_text("#cover-text") == "this camera has no live view; its frames appear here"
        assert page.inner_text("#battery").startswith("battery ")
        assert not page.is_visible("#near-m") and page.is_visible("#mark-near")
        for key, which in (("ArrowLeft", "near"), ("ArrowRight", "far")):
            for _ in range(10):
                page.keyboard.press("Shift+" + key)
            page.keyboard.press(which[0])
            shown.wait(f"state.marks.{which}")
        page.fill("#count", "3")
        shown.wait("state.plan.count === 3")
        page.evaluate("document.activeElement.blur()")
        page.keyboard.press(" ")
        shown.wait("state.takes.length && state.takes[0].result && $('depth').naturalWidth > 0", 200)
        assert "ordered, without metres" in page.inner_text("#depth-note")
        assert not page.is_visible("#cover") and page.inner_text("#readout").endswith("steps")
        shown.shot("session-dslr", ["laptop", "upright"])
        shown.asked_only(rig.base, "ws" + rig.base[4:])
