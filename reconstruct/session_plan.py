"""What a session plans between two marks, and what the optics will say about it, ready for the page."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from capture.cameras.base import CameraInfo, FocusRange
from capture.errors import UsageError
from capture.lens import Lens, LensProfile
from capture.plan import FocusSweep, Optic, assess, command_sweep, plan_sweep

FRAMES_WITHOUT_OPTICS = 9


@dataclass(frozen=True)
class Wishes:
    """What the operator has set: marks in the camera's unit, frames (None: from the optics), f-number (None: as is)."""

    near: float | None = None
    far: float | None = None
    count: int | None = None
    f_number: float | None = None

    def changed(self, **values: Any) -> Wishes:
        return replace(self, **values)


def optics_with(optic: Optic | None, f_number: float | None) -> Optic | None:
    """`optic` stopped down to `f_number`; a calibrated profile holds for its own aperture only."""
    if f_number is None or not isinstance(optic, Lens):
        return optic
    return optic.model_copy(update={"f_number": f_number})


def distance_m(position: float | None, info: CameraInfo, optic: Optic | None) -> float | None:
    """The plane of focus in metres at `position` (camera unit), inf allowed; None where nobody knows."""
    if position is None:
        return None
    unit = info.capabilities.focus_unit
    if info.capabilities.focus == "manual" or unit == "m":
        return position
    if unit == "dioptre":
        return _metres(position)
    if isinstance(optic, LensProfile):
        low, high = optic.position_range
        return _metres(float(optic.focus_dpt(min(max(position, low), high))))
    return None


def position_at(metres: float, info: CameraInfo, optic: Optic | None) -> float:
    """The position in the camera's unit that focuses at `metres`; UsageError where nobody knows."""
    unit = info.capabilities.focus_unit
    if info.capabilities.focus == "manual" or unit == "m":
        return metres
    if unit == "dioptre":
        return 1.0 / metres
    if isinstance(optic, LensProfile):
        return float(optic.step_for(1.0 / metres))
    raise UsageError("this camera's positions are not metres; mark with the lens, or give --lens lens.yaml")


def sweep_for(wishes: Wishes, info: CameraInfo, optic: Optic | None) -> FocusSweep | None:
    """The sweep between the marks, None until both are set. Raises UsageError where they make no plan."""
    if wishes.near is None or wishes.far is None:
        return None
    optic = optics_with(optic, wishes.f_number)
    near_m, far_m = (distance_m(position, info, optic) for position in (wishes.near, wishes.far))
    if near_m is None or far_m is None:
        return _in_camera_units(wishes.near, wishes.far, wishes.count or FRAMES_WITHOUT_OPTICS, info)
    if near_m == far_m:
        raise UsageError("both marks are at the same distance; move the focus and mark the other end")
    count = wishes.count if optic is not None else wishes.count or FRAMES_WITHOUT_OPTICS
    return plan_sweep(min(near_m, far_m), max(near_m, far_m), lens=optic, count=count)


def _in_camera_units(first: float, last: float, count: int, info: CameraInfo) -> FocusSweep:
    if first == last:
        raise UsageError("both marks are at the same position; move the focus and mark the other end")
    positions = np.linspace(first, last, count)
    if info.capabilities.focus_unit == "step":
        positions = np.rint(positions)
    return command_sweep(tuple(float(p) for p in positions), info.capabilities.focus_unit)


def plan_facts(
    wishes: Wishes, info: CameraInfo, optic: Optic | None, image_shape: tuple[int, int] | None, seconds_per_frame: float
) -> dict[str, Any]:
    """The plan as the page draws it; `problem` is a sentence where there is none."""
    facts: dict[str, Any] = {"problem": None, "frames": [], "count": None, "warnings": [], "range_px": None}
    try:
        sweep = sweep_for(wishes, info, optic)
        if sweep is None:
            facts["problem"] = "mark the near and the far end of the scene"
            return facts
        facts["count"] = len(sweep)
        facts["seconds"] = len(sweep) * seconds_per_frame
        used = optics_with(optic, wishes.f_number)
        if sweep.spacing == "command":
            facts["frames"] = [{"position": p} for p in sweep]
            facts["warnings"] = ["focus distances unknown: depth will be ordered, without metres; calibrate for metres"]
        elif used is None:
            facts["frames"] = [{"position": position_at(m, info, optic), "m": m} for m in sweep.focus_distance_m]
            facts["warnings"] = ["optics unknown: give --lens to see the precision and the right number of frames"]
        else:
            found = assess(sweep, used, image_shape=image_shape, seconds_per_frame=seconds_per_frame)
            facts["frames"] = [
                {
                    "position": position_at(frame.focus_distance_m, info, optic),
                    "m": frame.focus_distance_m,
                    "step_px": frame.step_px,
                    "typical_m": frame.typical_m,
                    "best_m": frame.bound_m,
                }
                for frame in found.frames
            ]
            facts |= {"range_px": found.range_px, "bytes": found.bytes, "warnings": list(found.warnings)}
    except UsageError as error:
        facts["problem"] = str(error)
    return facts


def scale_facts(limits: FocusRange | None, info: CameraInfo, optic: Optic | None) -> dict[str, Any] | None:
    """Both ends of the lens's travel for the page's scale, or None for a lens turned by hand."""
    if limits is None:
        return None
    return {
        "near": limits.near,
        "far": limits.far,
        "near_m": distance_m(limits.near, info, optic),
        "far_m": distance_m(limits.far, info, optic),
    }


def _metres(dioptre: float) -> float:
    return float("inf") if dioptre <= 0 else 1.0 / dioptre
