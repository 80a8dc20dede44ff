"""What stands in front of the virtual DSLR, without importing libgphoto2 into the test's own process."""

from __future__ import annotations

import cv2
import numpy as np

from capture.scenes import Scene

STRIP_DEPTH_M = (0.75, 1.3, 3.0)
STRIP_WIDTH_PX, HEIGHT_PX = 56, 120


def scene() -> Scene:
    """Three boards side by side, nearest first, with fine texture everywhere."""
    width = STRIP_WIDTH_PX * len(STRIP_DEPTH_M)
    noise = np.random.default_rng(3).normal(size=(HEIGHT_PX, width, 3)).astype(np.float32)
    texture = cv2.GaussianBlur(noise, (0, 0), 0.8)
    aif = np.clip(0.45 + 0.35 * texture / texture.std(), 0.02, 0.95).astype(np.float32)
    depth_m = np.repeat(np.array(STRIP_DEPTH_M, np.float32), STRIP_WIDTH_PX)
    return Scene(aif, np.tile(depth_m, (HEIGHT_PX, 1)), "three boards")
