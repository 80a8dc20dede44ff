"""A lens profile from what a camera's files say: honest, with wide errors, and good for a first depth map.

pupil = f / N, focus = 1 / (EXIF distance - sensor-to-pupil distance), F = f / p. Rounded f-numbers and focal lengths,
and distances counted from the sensor, limit it to some per cent (notes/calibration.md 1.2, 1.3 and 1.5).
"""

from __future__ import annotations

import datetime
from pathlib import Path

import numpy as np

from capture.errors import DataError
from capture.lens import Breathing, FocusTable, Intrinsics, LensProfile, Measured, SourceStack
from capture.stack import FocalStack, file_sha256

PUPIL_RATIO = 0.05  # f and N are rounded, by up to 3 % each
DISTANCE_RATIO = 0.06  # maker notes count in steps of 5.9 %
REPORTED_RATIO = 0.03
PUPIL_PLACE_RATIO = 0.5  # of the focal length: where the entrance pupil sits is not in the files
FOCAL_RATIO = 0.03


def profile_from_exif(path: Path) -> LensProfile:
    """The profile that the header of the stack `path` supports.

    Raises:
        DataError: focal length, f-number, pixel pitch or two focus distances are missing.
    """
    with FocalStack.open(path) as stack:
        lens = stack.lens
        if lens is None:
            raise DataError(
                f"{path} says neither focal length, f-number nor pixel pitch; give them in stack.yaml and import "
                "again, "
                "or calibrate with a board"
            )
        known = np.isfinite(stack.focus_dpt)
        focus = stack.focus_dpt[known]
        if len(np.unique(focus)) < 2:
            raise DataError(
                f"{path} knows the focus distance of {len(np.unique(focus))} frames, and two different ones are "
                "needed; "
                "calibrate with a board, or refine from a scene with --scene"
            )
        position = np.where(np.isfinite(stack.focus_position), stack.focus_position, stack.focus_command)[known]
        in_steps = bool(np.isfinite(position).all()) and stack.focus_unit == "step"
        positions = position if in_steps else focus
        positions, keep = np.unique(positions, return_index=True)
        focus = focus[keep]
        steps = np.diff(focus)
        if not (np.all(steps > 0) or np.all(steps < 0)):
            raise DataError(
                f"{path}: the focus distances do not rise or fall with the motor's position, so they are not from this "
                "sweep; import it with the right stack.yaml"
            )
        source = np.array(stack.focus_distance_source)[known][keep]
        ratio = np.where(source == "exif", DISTANCE_RATIO, REPORTED_RATIO)
        place_dpt = PUPIL_PLACE_RATIO * lens.focal_length_m * focus**2
        std = np.hypot(ratio * focus, place_dpt) + 1e-4
        middle = float(np.median(positions))
        nearest = int(np.argmin(np.abs(positions - middle)))
        scale = (1.0 - lens.focal_length_m * focus[nearest]) / (1.0 - lens.focal_length_m * focus)
        focal = lens.focal_length_m / lens.pixel_pitch_m / (1.0 - lens.focal_length_m * focus[nearest])
        zero = tuple(0.0 for _ in focus)
        return LensProfile(
            grade="exif",
            width_px=stack.width,
            height_px=stack.height,
            pixel_pitch_m=lens.pixel_pitch_m,
            pupil_diameter_m=Measured(value=lens.aperture_m, std=PUPIL_RATIO * lens.aperture_m, source="exif"),
            focus=FocusTable(
                unit="step" if in_steps else "dioptre",
                positions=tuple(map(float, positions)),
                focus_dpt=tuple(map(float, focus)),
                std_dpt=tuple(map(float, std)),
                source="exif",
            ),
            breathing=Breathing(
                reference_position=float(positions[nearest]),
                scale=tuple(map(float, scale)),
                # zoom lenses breathe either way: the prediction is as uncertain as it is large
                scale_std=tuple(map(float, np.abs(scale - 1.0) * 2 + 1e-3)),
                shift_x_px=zero,
                shift_y_px=zero,
                source="thin lens",
            ),
            intrinsics=Intrinsics(
                focal_length_px=Measured(value=float(focal), std=float(FOCAL_RATIO * focal), source="exif"),
                center_x_px=Measured(value=(stack.width - 1) / 2, std=0.01 * stack.width, source="assumed"),
                center_y_px=Measured(value=(stack.height - 1) / 2, std=0.01 * stack.width, source="assumed"),
            ),
            floor_sigma_px=Measured(value=0.5, std=0.3, source="assumed"),
            distance_scale_std=FOCAL_RATIO,
            camera=" ".join(str(stack.camera[k]) for k in ("make", "model") if stack.camera.get(k)),
            f_number=stack.working_f_number,
            sources=(
                SourceStack(
                    file=path.name,
                    sha256=file_sha256(path),
                    n_frames=int(stack.n_frames),
                    distance_m=float(1.0 / np.median(focus)) if np.median(focus) > 0 else 0.0,
                    tilt_deg=0.0,
                ),
            ),
            created=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            warnings=("EXIF: nothing was measured; expect about 5 % in scale and 0.07 dpt in offset",),
        )
