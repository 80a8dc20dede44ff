"""`daif session` on libgphoto2's own virtual camera; what is real and what is faked stands in virtual_dslr.py."""

import os
from pathlib import Path

import pytest

from capture.stack import FocalStack
from tests.reconstruct.session_server import Page, idle, session

ROOT = Path(__file__).resolve().parents[2]
RIG = ROOT / "tests" / "capture" / "virtual_dslr.py"


def has_virtual_camera():
    gphoto2 = pytest.importorskip("gphoto2")
    return any(Path(gphoto2.__file__).parent.rglob("vusb*.so"))


@pytest.mark.skipif(os.name == "nt", reason="libgphoto2 is not for Windows")
def test_a_dslr_without_calibration_is_swept_in_its_steps(tmp_path):
    """Marks by moving the motor, a sweep in its steps, ordered depth without metres."""
    if not has_virtual_camera():
        pytest.skip("this gphoto2 has no virtual USB port")
    rig = tmp_path / "rig"
    rig.mkdir()
    environment = {"PYTHONPATH": str(ROOT), "DAIF_RIG": str(rig)}
    options = ("--method", "plane-sweep")
    with (
        session(tmp_path / "out", "gphoto2:", *options, program=(str(RIG),), env=environment) as server,
        server.page() as connection,
    ):
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
    with FocalStack.open(tmp_path / "out" / "takes" / "001.h5") as stack:
        assert stack.n_frames == 4 and not stack.is_metric and all(stack.original_name)
