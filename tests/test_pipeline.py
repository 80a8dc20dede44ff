"""From the shutter to metres without touching a file: `daif capture` on libgphoto2, then `daif reconstruct`.

Real: libgphoto2, the sweep, the stack, alignment, reconstruction. Faked: the lens (see tests/capture/virtual_dslr.py).
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from capture.plan import command_sweep
from reconstruct import result
from tests.capture.scene_of_rig import STRIP_DEPTH_M, STRIP_WIDTH_PX

ROOT = Path(__file__).resolve().parents[1]
RIG = ROOT / "tests" / "capture" / "virtual_dslr.py"


def has_virtual_camera():
    gphoto2 = pytest.importorskip("gphoto2")
    return any(Path(gphoto2.__file__).parent.rglob("vusb*.so"))


@pytest.mark.skipif(not has_virtual_camera(), reason="this gphoto2 has no virtual USB port")
def test_from_capture_to_depth(tmp_path):
    rig = tmp_path / "rig"
    rig.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DAIF_RIG": str(rig)}

    def daif(*arguments):
        command = [sys.executable, str(RIG), *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250, cwd=rig)
        assert done.returncode == 0, done.stderr
        return done

    plan, stack, out = tmp_path / "plan.yaml", tmp_path / "boards.h5", tmp_path / "out"
    command_sweep(tuple(range(0, 300, 29)), "step").write(plan)
    daif("capture", "--camera", "gphoto2:", "--plan", plan, "-o", stack, "--settle", "0", "--exif-distances",
         "--lens", "50mm f/8 24um")  # fmt: skip
    daif("reconstruct", stack, "-o", out, "--method", "plane-sweep", "--device", "cpu")

    answer = result.load(out / "boards")
    assert answer.metric
    for board, depth_m in enumerate(STRIP_DEPTH_M):
        columns = slice(board * STRIP_WIDTH_PX + 12, (board + 1) * STRIP_WIDTH_PX - 12)
        found_dpt = np.median(answer.inverse_depth_dpt[:, columns])
        assert abs(found_dpt - 1 / depth_m) < 0.05, (board, found_dpt)
