"""Quick checks of a frame that has just arrived: brightness, clipping, sharpness, and whether anything changed at all.

They see a reduced green channel and a strided sample, so that a 24-megapixel frame costs some tens of milliseconds and
nothing of it has to be kept for the comparison with the next one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from capture.decode import Transfer, to_linear

SUMMARY_WIDTH_PX = 1024
SAMPLE_WIDTH_PX = 512
BOX_PX = 5
# White noise averaged over a box of n pixels keeps 1/n of its variance; structure keeps more. 1 is pure noise.
NOISE_RATIO = 2.0


@dataclass(frozen=True)
class FrameSummary:
    """What is kept of a frame for checks and display.

    Attributes:
        shape: (H, W, C) of the frame.
        mean_level: mean of linear light, 0 to 1.
        clipped_fraction: share of values at the white level.
        focus_measure: energy of detail (mean squared Laplacian over squared mean); higher is sharper.
        green: (h, w) float32, reduced green channel over its mean.
    """

    shape: tuple[int, ...]
    mean_level: float
    clipped_fraction: float
    focus_measure: float
    green: NDArray[np.float32]

    @property
    def is_flat(self) -> bool:
        """A frame without any structure: lens cap, closed shutter, dropped buffer."""
        return float(self.green.std()) < 1e-4


def summarise(image: NDArray[Any], transfer: Transfer, white_level: float) -> FrameSummary:
    """The summary of an image (H, W, C) u8 or u16."""
    channel = image[..., 1] if image.shape[2] == 3 else image[..., 0]
    factor = max(1, -(-image.shape[1] // SUMMARY_WIDTH_PX))
    size = (max(1, channel.shape[1] // factor), max(1, channel.shape[0] // factor))
    green = cv2.resize(np.ascontiguousarray(channel), size, interpolation=cv2.INTER_AREA).astype(np.float32)
    green /= max(float(green.mean()), 1e-6)
    stride = max(1, image.shape[1] // SAMPLE_WIDTH_PX)
    sample = np.ascontiguousarray(image[::stride, ::stride])
    return FrameSummary(
        shape=image.shape,
        mean_level=float(to_linear(sample, transfer, white_level).mean()),
        clipped_fraction=float(np.mean(sample >= white_level)),
        focus_measure=float(np.mean(np.square(cv2.Laplacian(green, cv2.CV_32F)))),
        green=green,
    )


def is_duplicate(before: FrameSummary, after: FrameSummary) -> bool:
    """Whether two frames are the same to the last bit, which two exposures of a real sensor never are."""
    return before.shape == after.shape and bool(np.array_equal(before.green, after.green))


def looks_unchanged(before: FrameSummary, after: FrameSummary) -> bool:
    """Whether two frames differ by no more than noise: their difference is as uncorrelated as noise is."""
    if before.shape != after.shape:
        return False
    difference = after.green - before.green
    difference -= difference.mean()
    variance = float(difference.var())
    if variance == 0.0:
        return True
    averaged = cv2.blur(difference, (BOX_PX, BOX_PX))
    return float(averaged.var()) * BOX_PX * BOX_PX < NOISE_RATIO * variance


def tile_sharpness(green: NDArray[np.float32], rows: int = 12, cols: int = 16) -> NDArray[np.float64]:
    """(rows * cols,) energy of detail per tile of a reduced green channel."""
    energy = np.square(cv2.Laplacian(green, cv2.CV_32F))
    return cv2.resize(energy, (cols, rows), interpolation=cv2.INTER_AREA).astype(np.float64).ravel()


def preview_change(before: NDArray[np.uint8], after: NDArray[np.uint8]) -> float:
    """Mean absolute difference of two previews in grey levels; inf if their sizes differ."""
    if before.shape != after.shape:
        return float("inf")
    return float(np.mean(cv2.absdiff(before, after)))


_BLOCKS = " ▁▂▃▄▅▆▇█"


def sparkline(values: list[float]) -> str:
    """Values as a row of little bars, lowest to highest."""
    known = [value for value in values if np.isfinite(value)]
    if not known:
        return ""
    low, high = min(known), max(known)
    scale = (len(_BLOCKS) - 2) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[1 + round((value - low) * scale)] if np.isfinite(value) else " " for value in values)
