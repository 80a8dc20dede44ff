"""Pinhole focal length, principal point and radial distortion, as far as the sweeps determine them.

A frontal board says nothing about focal length (size and distance trade), a tilted one does. What the boards do not
tell comes from the user or the lens data, with its own, larger uncertainty.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from calibration.edges import CalibrationError
from capture.lens import Intrinsics, Measured

GOOD_RATIO = 0.03  # relative standard error of the focal length up to which the boards are believed
NOMINAL_RATIO = 0.03  # of a focal length written on the lens: rounded, and shorter when focused near
SYSTEMATIC_RATIO = 1e-3  # flatness of the board and the like: never better than this
CORNER_STD_PX = 0.05
PRINCIPAL_POINT_RATIO = 0.01  # of the width; where the sensor sits behind a lens when nothing else is known

FloatArray = NDArray[np.float64]


def estimate_intrinsics(
    points_m: Sequence[FloatArray],
    points_px: Sequence[FloatArray],
    shape: tuple[int, int],
    *,
    given: Measured | None,
) -> tuple[Intrinsics, str]:
    """Intrinsics from views of the board at one focus setting, and one sentence on where they come from.

    Args:
        points_m: corners on the board, (N, 3) per view.
        points_px: where they are in the image, (N, 2) per view.
        shape: (H, W).
        given: focal length in px known from elsewhere; wins when it is surer than the boards.

    Raises:
        CalibrationError: the boards do not tell it and nothing is given.
    """
    height, width = shape
    center = ((width - 1) / 2, (height - 1) / 2)
    start = given.value if given is not None else 1.2 * width
    camera = np.array([[start, 0, center[0]], [0, start, center[1]], [0, 0, 1.0]])
    objects = [points.astype(np.float32) for points in points_m]
    images = [points.astype(np.float32).reshape(-1, 1, 2) for points in points_px]
    fixed = cv2.CALIB_FIX_K2 | cv2.CALIB_FIX_K3 | cv2.CALIB_ZERO_TANGENT_DIST
    common = fixed | cv2.CALIB_USE_INTRINSIC_GUESS | cv2.CALIB_FIX_ASPECT_RATIO | cv2.CALIB_FIX_PRINCIPAL_POINT

    def solve(flags: int) -> tuple[float, FloatArray, FloatArray, FloatArray]:
        rms, matrix, bend, _, _, std, _, _ = cv2.calibrateCameraExtended(
            objects, images, (width, height), camera.copy(), np.zeros(5), flags=flags
        )
        # OpenCV's errors follow from the scatter; what all corners share (print, template) does not scatter
        worse = max(1.0, CORNER_STD_PX / max(float(rms), 1e-6))
        return float(rms), np.asarray(matrix), np.asarray(bend).ravel(), np.asarray(std).ravel() * worse

    _, matrix, bend, std = solve(common)
    distorted = bool(abs(bend[0]) > 3.0 * std[4] and abs(bend[0]) * (width / matrix[0, 0] / 2) ** 2 * width / 2 > 0.2)
    if not distorted:
        _, matrix, bend, std = solve(common | cv2.CALIB_FIX_K1)
    free_center = len(objects) >= 3
    if free_center:
        flags = (common & ~cv2.CALIB_FIX_PRINCIPAL_POINT) | (0 if distorted else cv2.CALIB_FIX_K1)
        _, matrix_free, bend_free, std_free = solve(flags)
        sane = np.hypot(matrix_free[0, 2] - center[0], matrix_free[1, 2] - center[1]) < 0.05 * width
        if sane and max(std_free[2], std_free[3]) < 0.5 * PRINCIPAL_POINT_RATIO * width:
            matrix, bend, std = matrix_free, bend_free, std_free
        else:
            free_center = False
    focal = float(matrix[0, 0])
    # with a fixed aspect ratio OpenCV reports the error at fy and leaves 0 at fx
    focal_std = float(np.hypot(max(std[0], std[1]), SYSTEMATIC_RATIO * focal))
    if not free_center:
        # an off-centre principal point looks like tilt: its usual size is added to the focal length's error
        camera[:2, 2] += 0.5 * PRINCIPAL_POINT_RATIO * width
        moved = solve(common | (0 if distorted else cv2.CALIB_FIX_K1))[1]
        focal_std = float(np.hypot(focal_std, 2.0 * (moved[0, 0] - focal)))
    center_std = PRINCIPAL_POINT_RATIO * width
    told = focal_std < GOOD_RATIO * focal and np.isfinite(focal_std)
    if told and (given is None or focal_std < given.std):
        measured, sentence = (
            Measured(value=focal, std=focal_std, source="boards"),
            "focal length from the tilted boards",
        )
    elif given is not None:
        measured, sentence = given, f"focal length from {given.source}: the boards alone do not tell it"
        if not told:
            distorted, free_center = False, False
    else:
        raise CalibrationError(
            "NO_FOCAL_LENGTH",
            f"the boards do not tell the focal length in pixels (found {focal:.0f} +- {1.96 * focal_std:.0f}) and the "
            "stacks carry no lens data; add a sweep with the board tilted by 45 degrees, or give --focal-px",
        )
    x, y = (matrix[0, 2], matrix[1, 2]) if free_center else center
    x_std, y_std = (std[2], std[3]) if free_center else (center_std, center_std)
    source = "boards" if free_center else "assumed"
    return (
        Intrinsics(
            focal_length_px=measured,
            center_x_px=Measured(value=float(x), std=float(x_std), source=source),
            center_y_px=Measured(value=float(y), std=float(y_std), source=source),
            distortion=tuple(float(b) for b in bend[:5]) if distorted else (),
        ),
        sentence,
    )


def camera_matrix(intrinsics: Intrinsics, scale: float = 1.0) -> FloatArray:
    """3 x 3 camera matrix at a focus setting that magnifies by `scale`."""
    focal = intrinsics.focal_length_px.value * scale
    return np.array([[focal, 0, intrinsics.center_x_px.value], [0, focal, intrinsics.center_y_px.value], [0, 0, 1.0]])
