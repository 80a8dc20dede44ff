"""Shape from focus, the classical method that every other one here is printed beside; numpy and cv2 only."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

WINDOWS_PX = (9, 15, 25)
FloatArray = NDArray[np.floating]


def focus_measure(frames: FloatArray, window_px: int) -> NDArray[np.float32]:
    """Sum-modified Laplacian of each frame over a square window, (S, H, W), from linear frames (S, H, W, 3)."""
    second = np.array([[-1.0, 2.0, -1.0]], np.float32)
    measures = []
    for frame in np.asarray(frames, np.float32).mean(-1):
        modified = np.abs(cv2.filter2D(frame, -1, second)) + np.abs(cv2.filter2D(frame, -1, second.T))
        measures.append(cv2.blur(modified, (window_px, window_px)))
    return np.stack(measures)


def shape_from_focus(frames: FloatArray, focus_dpt: FloatArray, window_px: int) -> NDArray[np.float32]:
    """Inverse depth (H, W): peak of the focus measure, by a parabola through its logarithm in dioptres, median 5x5."""
    order = np.argsort(focus_dpt)
    focus = np.asarray(focus_dpt, np.float64)[order]
    measure = np.log(focus_measure(frames[order], window_px) + 1e-9)
    best = measure.argmax(0)
    peak = focus[best]
    if len(focus) >= 3:
        middle = np.clip(best, 1, len(focus) - 2)
        y0, y1, y2 = (np.take_along_axis(measure, (middle + o)[None], 0)[0] for o in (-1, 0, 1))
        x0, x1, x2 = (focus[middle + o] for o in (-1, 0, 1))
        left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
        bend = (right - left) / (x2 - x0)
        vertex = (x0 + x1) / 2 - left / (2 * np.where(bend < 0, bend, -1.0))
        peak = np.where((best == middle) & (bend < 0), np.clip(vertex, focus[0], focus[-1]), peak)
    return cv2.medianBlur(peak.astype(np.float32), 5)


def sharpest_frame(frames: FloatArray, window_px: int) -> NDArray[np.float32]:
    """All-in-focus image by picking the frame with the largest focus measure at each pixel, (H, W, 3)."""
    best = focus_measure(frames, window_px).argmax(0)
    picked = np.take_along_axis(np.asarray(frames, np.float32), best[None, ..., None], axis=0)[0]
    return np.asarray(picked, np.float32)
