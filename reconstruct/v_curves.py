"""V-curves of one reconstruction: how blur falls towards focus and rises behind it, predicted and measured.

The line is what the optics predict for a depth of the scene, kappa |q_s - q|. The points are what each frame shows at
that depth: the disc with which the all-in-focus image must be blurred to look like the frame there. Points beside the
line mean optics that do not fit this lens: calibrate it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from capture.decode import to_linear
from reconstruct.result import Reconstruction

SHARES = (0.1, 0.5, 0.9)  # of the scene's depths, from far to near
STEP_PX = 0.5  # between the discs that are tried; a parabola finds the minimum between them
LEAST_PIXELS = 100
BAND_PX = 1.0  # depths whose blur differs by less count as one


@dataclass(frozen=True)
class VCurve:
    """Blur at one depth. Diameters in px of the stored frame; NaN where a frame shows too little texture to tell.

    Attributes:
        inverse_depth_dpt: the depth.
        focus_dpt, predicted_px: (N,) the line.
        measured_px: (S,) the points, one per frame.
    """

    inverse_depth_dpt: float
    focus_dpt: NDArray[np.float64]
    predicted_px: NDArray[np.float64]
    measured_px: NDArray[np.float64]


def v_curves(result: Reconstruction, frames: Sequence[NDArray[np.uint8]]) -> list[VCurve]:
    """Curves at a far, a middle and a near depth of the scene that have enough pixels; from small sRGB `frames`."""
    height, width = frames[0].shape[:2]
    scale = width / result.aif.shape[1]
    sharp = _luma(cv2.resize(result.aif_srgb8, (width, height), interpolation=cv2.INTER_AREA))
    seen = [_luma(_aligned(frame, result, i, scale)) for i, frame in enumerate(frames)]
    q = cv2.resize(result.inverse_depth_dpt, (width, height), interpolation=cv2.INTER_NEAREST)
    sure = cv2.resize(result.confidence, (width, height), interpolation=cv2.INTER_NEAREST) > 0.5
    kappa = result.kappa_px_per_dpt * scale
    window = np.ones((7, 7), np.uint8)
    even = (cv2.dilate(q, window) - cv2.erode(q, window)) * kappa.mean() < 2 * BAND_PX
    usable = sure & even & np.isfinite(q)
    if not usable.any():
        return []
    widest = float(kappa.max() * np.abs(result.focus_dpt[:, None] - np.percentile(q[usable], [1, 99])).max())
    diameters = np.arange(0.0, widest + 3.0, STEP_PX)
    blurred = [_blurred(sharp, diameter) for diameter in diameters]
    line = np.linspace(result.focus_dpt.min(), result.focus_dpt.max(), 61)
    order = np.argsort(result.focus_dpt)
    gain = np.interp(line, result.focus_dpt[order], result.kappa_px_per_dpt[order])
    curves = []
    for level in np.quantile(q[usable], SHARES):
        here = usable & (np.abs(q - level) * kappa.mean() < BAND_PX)
        if here.sum() >= LEAST_PIXELS:
            measured = np.array([_diameter(frame[here], [b[here] for b in blurred], diameters) for frame in seen])
            curves.append(VCurve(float(level), line, gain * np.abs(line - level), measured / scale))
    return curves


def misfit_px(result: Reconstruction, curves: Sequence[VCurve]) -> float:
    """Median distance of the points from the lines, px of the stored frame; NaN without points."""
    gaps = [
        np.abs(curve.measured_px - result.kappa_px_per_dpt * np.abs(result.focus_dpt - curve.inverse_depth_dpt))
        for curve in curves
    ]
    known = np.concatenate(gaps)[np.isfinite(np.concatenate(gaps))] if gaps else np.empty(0)
    return float(np.median(known)) if known.size else float("nan")


def _luma(srgb: NDArray[np.uint8]) -> NDArray[np.float32]:
    return to_linear(srgb, "srgb", 255.0).mean(axis=2)


def _aligned(frame: NDArray[np.uint8], result: Reconstruction, i: int, scale: float) -> NDArray[np.uint8]:
    """`frame` on the reference's grid, as far as the record knows (`capture/alignment.py`: scale and shift)."""
    alignment = result.record.get("alignment")
    if alignment is None:
        return frame
    size, (dx, dy) = alignment["scales"][i], (shift * scale for shift in alignment["shifts_px"][i])
    height, width = frame.shape[:2]
    x, y = (width - 1) / 2, (height - 1) / 2
    matrix = np.array([[size, 0, x - size * x + dx], [0, size, y - size * y + dy]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return np.asarray(cv2.warpAffine(frame, matrix, (width, height), flags=flags, borderMode=cv2.BORDER_REPLICATE))


def _blurred(image: NDArray[np.float32], diameter: float, fine: int = 8) -> NDArray[np.float32]:
    """`image` blurred by a disc whose rim is smoothed to a fraction 1 / `fine` of a pixel."""
    side = 2 * int(np.ceil(diameter / 2)) + 1
    grid = (np.arange(side * fine) + 0.5) / fine - side / 2
    disc = (np.hypot(grid[:, None], grid) <= max(diameter / 2, 1 / fine)).astype(np.float64)
    kernel = disc.reshape(side, fine, side, fine).sum(axis=(1, 3))
    return cv2.filter2D(image, -1, kernel / kernel.sum(), borderType=cv2.BORDER_REFLECT_101)


def _diameter(
    seen: NDArray[np.float32], blurred: Sequence[NDArray[np.float32]], diameters: NDArray[np.float64]
) -> float:
    """The diameter whose picture explains `seen` best, up to its exposure; NaN where they all do about as well."""
    errors = np.array([np.mean((seen - other * (seen.mean() / max(other.mean(), 1e-6))) ** 2) for other in blurred])
    best = int(errors.argmin())
    if errors.max() < 1.5 * errors[best] + 1e-7:
        return float("nan")
    if not 0 < best < len(errors) - 1:
        return float(diameters[best])
    left, middle, right = errors[best - 1 : best + 2]
    return float(diameters[best] + 0.5 * STEP_PX * (left - right) / max(left - 2 * middle + right, 1e-12))
