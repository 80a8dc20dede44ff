"""Pinhole focal length, principal point and radial distortion, as far as the sweeps determine them.

A frontal board says nothing about focal length (size and distance trade), a tilted one does. What the boards do not
tell comes from the user or the lens data, with its own, larger uncertainty. Intrinsics measured elsewhere come from a
file as OpenCV's and ROS's calibration tools write it, and the boards only check them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, model_validator

from calibration.edges import CalibrationError
from capture.config import MAX_BYTES, parse_yaml
from capture.errors import UsageError
from capture.lens import Intrinsics, Measured

GOOD_RATIO = 0.03  # relative standard error of the focal length up to which the boards are believed
NOMINAL_RATIO = 0.03  # of a focal length written on the lens: rounded, and shorter when focused near
SYSTEMATIC_RATIO = 1e-3  # flatness of the board and the like: never better than this
CORNER_STD_PX = 0.05
PRINCIPAL_POINT_RATIO = 0.01  # of the width; where the sensor sits behind a lens when nothing else is known
FILE_RATIO = 2e-3  # of the focal length and of the width for the centre: such files state no standard errors
SQUARE_PIXEL_RATIO = 5e-3
MAX_REPROJECTION_PX = 0.5  # a board seen through the right intrinsics leaves about 0.05 px
DISTORTION_LENGTHS = (4, 5, 8)  # OpenCV's k1 k2 p1 p2 [k3 [k4 k5 k6]]

FloatArray = NDArray[np.float64]


class _Matrix(BaseModel):
    rows: int = Field(ge=1, le=14)
    cols: int = Field(ge=1, le=14)
    data: list[float]

    @model_validator(mode="after")
    def _full(self) -> _Matrix:
        if len(self.data) != self.rows * self.cols:
            raise ValueError(f"{self.rows} x {self.cols} values were expected, found {len(self.data)}")
        if not np.isfinite(self.data).all():
            raise ValueError("every value must be finite")
        return self


class _CameraFile(BaseModel):
    """What is read of an OpenCV FileStorage or ROS camera_info file; it may hold much more."""

    image_width: int = Field(gt=0)
    image_height: int = Field(gt=0)
    camera_matrix: _Matrix
    distortion_coefficients: _Matrix
    distortion_model: str = "plumb_bob"

    @model_validator(mode="after")
    def _pinhole(self) -> _CameraFile:
        if self.distortion_model not in ("plumb_bob", "rational_polynomial"):
            raise ValueError(
                f"distortion_model is '{self.distortion_model}', which is no pinhole camera; plumb_bob and "
                "rational_polynomial are read"
            )
        matrix = np.array(self.camera_matrix.data)
        if matrix.size != 9:
            raise ValueError(
                f"camera_matrix must be 3 x 3, found {self.camera_matrix.rows} x {self.camera_matrix.cols}"
            )
        (fx, skew, cx), (_, fy, cy), last = matrix.reshape(3, 3)
        if min(fx, fy) <= 0 or abs(skew) > 1e-3 * fx or not np.allclose(last, (0, 0, 1)):
            raise ValueError(f"camera_matrix must be fx 0 cx, 0 fy cy, 0 0 1, found {self.camera_matrix.data}")
        if abs(fx / fy - 1.0) > SQUARE_PIXEL_RATIO:
            raise ValueError(f"pixels must be square, found fx {fx:g} and fy {fy:g} px in camera_matrix")
        if not (0 < cx < self.image_width and 0 < cy < self.image_height):
            raise ValueError(
                f"the principal point ({cx:g}, {cy:g}) of camera_matrix lies outside the image of {self.image_width} x "
                f"{self.image_height} px"
            )
        if len(self.distortion_coefficients.data) not in DISTORTION_LENGTHS:
            raise ValueError(
                f"distortion_coefficients must be 4, 5 or 8 values (k1 k2 p1 p2 k3 k4 k5 k6), found "
                f"{len(self.distortion_coefficients.data)}"
            )
        return self


def read_intrinsics(path: Path, full_size: tuple[int, int]) -> Intrinsics:
    """Intrinsics of images of `full_size` (H, W) from the YAML file of OpenCV's or ROS's camera calibration.

    Focal length and centre get the standard errors that are usual for such files, which state none.

    Raises:
        UsageError: the file is not such a file, or made for images of another shape.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1).decode("utf-8", errors="replace")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}; give OpenCV's camera calibration as YAML") from None
    # OpenCV writes a directive and tags that are no YAML; replaced in place, so that errors name the right line
    text = re.sub(r"\A%YAML:1\.0", "#", text).replace("!!opencv-matrix", "")
    found = parse_yaml(text, _CameraFile, source=str(path))
    height, width = full_size
    factor = width / found.image_width
    if abs(found.image_height * factor - height) > 1.5 + 0.003 * height:
        raise UsageError(
            f"{path}: image_width x image_height is {found.image_width} x {found.image_height} px and the stacks are "
            f"{width} x {height} px, which is not the same picture resized; calibrate the crop that you capture with"
        )
    (fx, _, cx), (_, fy, cy), _ = np.array(found.camera_matrix.data).reshape(3, 3)
    focal = 0.5 * float(fx + fy)
    center_std = FILE_RATIO * found.image_width
    bend = tuple(found.distortion_coefficients.data)
    return Intrinsics(
        focal_length_px=Measured(value=focal, std=FILE_RATIO * focal, source=path.name),
        center_x_px=Measured(value=float(cx), std=center_std, source=path.name),
        center_y_px=Measured(value=float(cy), std=center_std, source=path.name),
        distortion=bend if any(bend) else (),
    ).rescaled(factor)


def check_intrinsics(
    intrinsics: Intrinsics, points_m: Sequence[FloatArray], points_px: Sequence[FloatArray], names: Sequence[str]
) -> float:
    """RMS distance (px) at which the boards' corners lie from where `intrinsics` have them, over the worst view.

    Raises:
        CalibrationError: no pose of a flat board looks like that through these intrinsics.
    """
    camera, bend = camera_matrix(intrinsics), np.asarray(intrinsics.distortion or (0.0,) * 4, np.float64)
    misses = []
    for points, pixels in zip(points_m, points_px, strict=True):
        _, rotation, translation = cv2.solvePnP(points, pixels, camera, bend)
        rotation, translation = cv2.solvePnPRefineLM(points, pixels, camera, bend, rotation, translation)
        back = cv2.projectPoints(points, rotation, translation, camera, bend)[0].reshape(-1, 2)
        misses.append(float(np.sqrt(np.mean(np.sum((back - pixels) ** 2, axis=1)))))
    worst = int(np.argmax(misses))
    if misses[worst] > MAX_REPROJECTION_PX:
        raise CalibrationError(
            "INTRINSICS_DISAGREE",
            f"{names[worst]}: the board's corners lie {misses[worst]:.1f} px from where the intrinsics of "
            f"{intrinsics.focal_length_px.source} can have them (limit {MAX_REPROJECTION_PX:g}), so they are of "
            "another lens, zoom or image size; calibrate them again, or leave --intrinsics out",
        )
    return misses[worst]


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
