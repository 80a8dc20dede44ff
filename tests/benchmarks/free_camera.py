"""A camera that costs nothing: it hands over pictures made beforehand, so that only our own work is timed."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from capture.cameras.base import (
    CameraInfo,
    Capabilities,
    ExposureSettings,
    FocusRange,
    FocusReport,
    Frame,
    UnsupportedControl,
)


class FreeCamera:
    """`kind` "webcam": 1080 x 1920 u8 pixels; "pair": a 4000 x 6000 12-bit DNG and a JPEG of that size."""

    def __init__(self, kind: str) -> None:
        rng = np.random.default_rng(0)
        shape = (1080, 1920, 3) if kind == "webcam" else (1000, 1500, 3)
        texture = cv2.GaussianBlur(rng.normal(size=shape).astype(np.float32), (0, 0), 1.5)
        image = np.clip(120 + 60 * texture / texture.std(), 1, 250).astype(np.uint8)
        self._images: list[NDArray[np.uint8]] = []
        self._pairs: list[tuple[tuple[str, bytes], ...]] = []
        if kind == "webcam":
            self._images = [image, cv2.GaussianBlur(image, (0, 0), 2.0)]
        else:
            large = cv2.resize(image, (6000, 4000), interpolation=cv2.INTER_CUBIC)
            self._pairs = [pair_of(cv2.GaussianBlur(large, (0, 0), sigma)) for sigma in (1.0, 4.0, 8.0)]
        self._at = 0.0
        self._count = 0

    def open(self) -> CameraInfo:
        capabilities = Capabilities(focus="absolute", focus_unit="driver", settle_s=0.0)
        return CameraInfo("free", "of charge", "", "benchmark", capabilities)

    def lock_exposure(self, settings: ExposureSettings) -> ExposureSettings:
        return settings

    def set_live_view(self, on: bool) -> None:
        pass

    def focus_range(self) -> FocusRange:
        return FocusRange(0.0, 1000.0, 1.0, "driver", "device")

    def home(self, end: str = "near") -> FocusReport:
        return self.move_focus(0.0)

    def move_focus(self, target: float) -> FocusReport:
        self._at = target
        return FocusReport(target, target, False, time.time())

    def position(self) -> float | None:
        return self._at

    def grab(self, timeout_s: float) -> Frame:
        self._count += 1
        now = time.time()
        if self._images:
            image = self._images[self._count % 2]
            image[0, :, 1] = self._count % 250  # no two pictures of a real sensor are the same
            return Frame(image=image, transfer="srgb", started_s=now, finished_s=now)
        return Frame(image=None, originals=self._pairs[self._count % 3], started_s=now, finished_s=now)

    def preview(self) -> NDArray[np.uint8]:
        raise UnsupportedControl("no live view", stage="preview")

    def close(self) -> None:
        pass

    def __enter__(self) -> FreeCamera:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def pair_of(image: NDArray[np.uint8]) -> tuple[tuple[str, bytes], ...]:
    """(DNG, JPEG) of an image (H, W, 3): an uncompressed 16-bit CFA file of 48 MB at 24 MP, and quality 95."""
    from tests.capture.test_decode import write_dng

    linear = (image.astype(np.float32) / 255.0) ** 2.2
    mosaic = np.empty(image.shape[:2], np.uint16)
    for row, col, channel in ((0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 2)):
        mosaic[row::2, col::2] = 256 + linear[row::2, col::2, channel] * 3800
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.dng"
        write_dng(path, mosaic)
        raw = path.read_bytes()
    jpeg = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
    return (("A.DNG", raw), ("A.JPG", jpeg))
