"""`daif session` with a lens that only a hand can turn: the simulated camera without its motor.

The hand is the file that DAIF_RING names: it holds the distance in metres to which the ring is turned.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from capture.cameras.base import CameraInfo, UnsupportedControl
from capture.cameras.simulated import SimulatedCamera, simulated_camera
from capture.errors import UsageError
from reconstruct import session
from reconstruct.cli import main


class HandTurned:
    """`camera` behind a lens without a motor."""

    def __init__(self, camera: SimulatedCamera) -> None:
        self._camera = camera

    def __getattr__(self, name: str) -> Any:
        if name in ("focus_range", "home", "move_focus"):
            raise UnsupportedControl("this lens has no motor", stage=name)
        if name in ("preview", "grab"):
            self._camera.move_focus(1 / float(Path(os.environ["DAIF_RING"]).read_text()))
        return getattr(self._camera, name)

    def open(self) -> CameraInfo:
        info = self._camera.open()
        by_hand = replace(info.capabilities, focus="manual", focus_unit="m", focus_readback=False)
        return replace(info, capabilities=by_hand, battery="15%")

    def position(self) -> None:
        return None


def open_by_hand(uri: str, *, manual_focus: bool) -> HandTurned:
    if not manual_focus:
        raise UsageError("this lens needs --manual-focus")
    return HandTurned(simulated_camera("procedural-3", {"width": "96", "max_coc_px": "10"}))


if __name__ == "__main__":
    session.open_camera = open_by_hand  # type: ignore[assignment]
    sys.argv[0] = "daif"
    main()
