"""How the image grows and shifts with focus, joined over all sweeps into one smooth curve of the motor position.

Every sweep tells its frames' geometry relative to its own sharpest frame; the curve log(scale) = g(position), and
likewise the shifts, are what the sweeps have in common. Scale may grow or shrink towards near focus: zoom lenses do
either (notes/real-stacks.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.edges import CalibrationError, Similarity

MAX_DEGREE = 3
MOVED_PX, MOVED_COC_RATIO = 0.3, 0.05

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class BreathingCurve:
    """Polynomials (Chebyshev on [-1, 1] of `low` to `high`) of log scale and of the two shifts."""

    low: float
    high: float
    reference: float  # position at which scale is 1 and shift 0
    coefficients: FloatArray  # (3, degree + 1): log scale, shift x, shift y
    log_scale_covariance: FloatArray
    residual_px: float  # scatter of frames about the curve, at a typical board corner

    def _design(self, position: Any) -> FloatArray:
        return _basis(position, self.low, self.high, self.coefficients.shape[1] - 1) - _basis(
            self.reference, self.low, self.high, self.coefficients.shape[1] - 1
        )

    def scale(self, position: Any) -> FloatArray:
        """Magnification relative to the reference position."""
        return np.exp(self._design(position) @ self.coefficients[0])

    def scale_std(self, position: Any) -> FloatArray:
        """Standard error of `scale`."""
        design = self._design(position)
        return self.scale(position) * np.sqrt(
            np.maximum(np.einsum("...j,jk,...k->...", design, self.log_scale_covariance, design), 0.0)
        )

    def shift_px(self, position: Any) -> FloatArray:
        """(..., 2) shift of the image centre."""
        return self._design(position) @ self.coefficients[1:].T


def fit_breathing(
    positions: Sequence[FloatArray],
    geometry: Sequence[Sequence[Similarity | None]],
    names: Sequence[str],
    arms_px: Sequence[float],
    coc_px: Sequence[FloatArray],
) -> BreathingCurve:
    """The curve that the frames of all sweeps agree on; `CalibrationError` when a board moved.

    Args:
        positions: motor positions of every sweep's frames.
        geometry: of every frame relative to its sweep's sharpest one.
        arms_px: typical distance of each sweep's corners from the image centre, to turn scale into pixels.
        coc_px: blur of every sweep's frames: a blurred board is placed less well.
    """
    rows = [
        (k, float(positions[k][i]), np.log(similarity.scale), similarity.shift_x_px, similarity.shift_y_px)
        for k, frames in enumerate(geometry)
        for i, similarity in enumerate(frames)
        if similarity is not None
    ]
    table = np.array(rows)
    sweep, position, values = table[:, 0].astype(int), table[:, 1], table[:, 2:].copy()
    low, high = float(position.min()), float(position.max())
    reference = 0.5 * (low + high)
    degree = min(MAX_DEGREE, max(1, len(np.unique(position)) - 3))
    basis = _basis(position, low, high, degree) - _basis(reference, low, high, degree)
    # a sweep's own sharpest frame is its zero, so every sweep has an offset in log scale and in shift
    design = np.column_stack([basis[:, 1:], sweep[:, None] == np.arange(len(geometry))[None, :]]).astype(np.float64)
    arm = np.asarray(arms_px, np.float64)[sweep]
    to_px = np.column_stack([arm, np.ones(len(table)), np.ones(len(table))])
    blur = np.array([coc_px[k][i] for k, frames in enumerate(geometry) for i, g in enumerate(frames) if g is not None])
    precise = arm / arm.max() / (1.0 + 0.1 * blur)  # a small board tells scale less well
    weight = np.ones(len(table))
    for _ in range(6):
        root = (np.sqrt(weight) * precise)[:, None]
        solution = np.linalg.lstsq(design * root, values * root, rcond=None)[0]
        left = (values - design @ solution) * to_px
        error = np.sqrt(np.sum(left**2, axis=1))
        weight = 1.0 / (1.0 + (error / max(3.0 * float(np.median(error)), 0.02)) ** 2)
    worst = int(np.argmax(error - MOVED_COC_RATIO * blur))
    if error[worst] > MOVED_PX + MOVED_COC_RATIO * blur[worst] and error[worst] > 5.0 * float(np.median(error)):
        k = int(sweep[worst])
        frame = int(np.argmin(np.abs(positions[k] - position[worst])))
        raise CalibrationError(
            "MOVED",
            f"{names[k]}: the board is {error[worst]:.1f} px from where the other frames have it in frame {frame}; "
            "board and camera must stand still during a sweep, so capture it again",
        )
    coefficients = np.zeros((3, degree + 1))
    coefficients[:, 1:] = solution[:degree].T
    dof = max(len(table) - design.shape[1], 1)
    scatter = float(np.sqrt(np.sum(weight * error**2) / dof))
    covariance = np.zeros((degree + 1, degree + 1))
    normal = np.linalg.pinv(design.T @ (design * (weight * precise**2)[:, None]), hermitian=True)
    covariance[1:, 1:] = normal[:degree, :degree] * (scatter / arm.max()) ** 2
    return BreathingCurve(low, high, reference, coefficients, covariance, scatter)


def _basis(position: Any, low: float, high: float, degree: int) -> FloatArray:
    unit = (2.0 * np.asarray(position, np.float64) - low - high) / max(high - low, 1e-12)
    return np.asarray(np.polynomial.chebyshev.chebvander(unit, degree), np.float64).reshape(*unit.shape, degree + 1)
