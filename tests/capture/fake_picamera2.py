"""A stand-in of picamera2's interface, as far as capture/cameras/picamera.py uses it; no Pi was at hand."""

from __future__ import annotations

import sys
import types
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

LENS_LAG = 0.5  # share of the way that is left after each frame


class Picamera2:
    """One camera whose lens and controls arrive some frames after they were set."""

    def __init__(self, index: int) -> None:
        self.camera_controls = {"LensPosition": (0.0, 12.0, 1.0), "ExposureTime": (100, 100000, 10000)}
        self.camera_properties = {"Model": "imx708"}
        self._wanted: dict[str, Any] = {
            "LensPosition": 1.0,
            "ExposureTime": 10000,
            "AnalogueGain": 1.0,
            "ColourGains": (1.8, 1.6),
        }
        self._lens = 1.0
        self._frames = 0
        self.running = False

    @staticmethod
    def global_camera_info() -> list[dict[str, Any]]:
        return [{"Model": "imx708"}]

    def create_still_configuration(self, main: dict[str, str], buffer_count: int) -> dict[str, Any]:
        assert main["format"] == "BGR888"
        return {"main": main}

    def configure(self, configuration: dict[str, Any]) -> None:
        self.configuration = configuration

    def start(self) -> None:
        self.running = True

    def stop(self) -> None:
        self.running = False

    def close(self) -> None:
        assert not self.running

    def set_controls(self, controls: dict[str, Any]) -> None:
        self._wanted.update(controls)

    def capture_metadata(self) -> dict[str, Any]:
        assert self.running
        self._frames += 1
        self._lens += (self._wanted["LensPosition"] - self._lens) * (1.0 - LENS_LAG)
        return {**self._wanted, "LensPosition": self._lens, "SensorTimestamp": self._frames * 33_000_000}

    def capture_array(self, stream: str) -> Any:
        return self.capture_request().make_array(stream)

    def capture_request(self, wait: float = 0.0) -> Any:
        metadata = self.capture_metadata()
        image = self._see()
        return types.SimpleNamespace(
            make_array=lambda stream: image, get_metadata=lambda: metadata, release=lambda: None
        )

    def _see(self) -> NDArray[np.uint8]:
        """A texture, blurred by the lens position, with noise of its own."""
        texture = np.random.default_rng(0).normal(128.0, 25.0, (48, 64, 3))
        blurred = cv2.GaussianBlur(texture, (0, 0), 0.4 + 0.2 * self._lens)
        noise = np.random.default_rng(self._frames).normal(0.0, 1.0, texture.shape)
        return np.clip(blurred + noise, 0, 255).astype(np.uint8)


def install(monkeypatch: Any) -> None:
    """Make `import picamera2` find this stand-in."""
    module = types.ModuleType("picamera2")
    module.Picamera2 = Picamera2  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "picamera2", module)
