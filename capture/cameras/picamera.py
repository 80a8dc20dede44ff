"""The Raspberry Pi camera through picamera2: focus in dioptres, set and read back by the driver.

picamera2 comes with Raspberry Pi OS (apt: python3-picamera2). No Pi was at hand: this file was tried against a
stand-in of picamera2's interface only (tests/capture/test_camera_picamera.py). The driver's dioptres are best effort,
third-party modules are off by a factor of two (notes/capture.md 3.2): calibrate.
"""

from __future__ import annotations

import math
import time
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from capture.cameras.base import (
    CameraClosed,
    CameraInfo,
    CameraInUse,
    CameraNotFound,
    Capabilities,
    ControlRejected,
    ExposureSettings,
    FocusLimit,
    FocusRange,
    FocusReport,
    Frame,
    UnsupportedControl,
    home_by_moving,
)

MANUAL_FOCUS = 0  # libcamera's AfModeManual
MOVE_TIMEOUT_S = 3.0
READBACK_DPT = 0.05  # what picamera2's own test accepts
FRESH_FRAMES = 3  # controls take effect some frames later


class PicameraCamera:
    """One Pi camera; a `Camera`."""

    def __init__(self, index: int = 0) -> None:
        self._index = index
        self._camera: Any = None

    def open(self) -> CameraInfo:
        self.close()
        try:
            from picamera2 import Picamera2
        except ImportError:
            raise CameraNotFound(
                "picamera2 is not installed; on Raspberry Pi OS: sudo apt install python3-picamera2", stage="open"
            ) from None
        if self._index >= len(Picamera2.global_camera_info()):
            raise CameraNotFound(f"there is no Pi camera {self._index}", stage="open")
        try:
            camera = Picamera2(self._index)
        except RuntimeError as error:
            raise CameraInUse("the Pi camera cannot be acquired", stage="open", native_text=str(error)) from None
        # one configuration for preview and picture: a mode switch overwrites the controls
        camera.configure(camera.create_still_configuration({"format": "BGR888"}, buffer_count=2))
        camera.start()
        self._camera = camera
        focus = "LensPosition" in camera.camera_controls
        capabilities = Capabilities(
            focus="absolute" if focus else "manual",
            focus_unit="dioptre" if focus else "m",
            focus_readback=focus,
            preview=True,
            exposure_lock=True,
            settle_s=0.1,
        )
        model = str(camera.camera_properties.get("Model", "Pi camera"))
        return CameraInfo("Raspberry Pi", model, "", "picamera2", capabilities)

    def lock_exposure(self, settings: ExposureSettings) -> ExposureSettings:
        camera = self._open("lock_exposure")
        if settings.f_number is not None or settings.white_balance is not None:
            raise UnsupportedControl(
                "a Pi camera has no aperture, and its white balance is locked as it is", stage="lock_exposure"
            )
        now = camera.capture_metadata()
        time_us = now["ExposureTime"] if settings.exposure_time_s is None else round(settings.exposure_time_s * 1e6)
        gain = now["AnalogueGain"] if settings.iso is None else settings.iso / 100.0
        camera.set_controls(
            {
                "AeEnable": False,
                "AwbEnable": False,
                "ExposureTime": int(time_us),
                "AnalogueGain": float(gain),
                "ColourGains": tuple(now["ColourGains"]),
            }
        )
        after = self._fresh_metadata()
        if abs(after["ExposureTime"] - time_us) > max(0.06 * time_us, 50):
            raise ControlRejected(
                f"exposure was set to {time_us} us and reads back {after['ExposureTime']} us", stage="lock_exposure"
            )
        return ExposureSettings(after["ExposureTime"] * 1e-6, after["AnalogueGain"] * 100.0)

    def set_live_view(self, on: bool) -> None:
        self._open("set_live_view")

    def focus_range(self) -> FocusRange:
        camera = self._open("focus_range")
        if "LensPosition" not in camera.camera_controls:
            raise UnsupportedControl("this Pi camera has no focus motor", stage="focus_range")
        low, high, _ = camera.camera_controls["LensPosition"]
        return FocusRange(float(high), float(low), 0.01, "dioptre", "device")

    def home(self, end: Literal["near", "far"] = "near") -> FocusReport:
        return home_by_moving(self, end)

    def move_focus(self, target: float) -> FocusReport:
        camera = self._open("move_focus")
        limits = self.focus_range()
        if not limits.contains(target):
            raise FocusLimit(
                f"focus {target:g} dpt is outside this lens's {limits.near:g} to {limits.far:g}", stage="move_focus"
            )
        camera.set_controls({"AfMode": MANUAL_FOCUS, "LensPosition": float(target)})
        deadline = time.monotonic() + MOVE_TIMEOUT_S
        position = self._fresh_metadata().get("LensPosition", math.nan)
        while abs(position - target) > READBACK_DPT and time.monotonic() < deadline:
            position = camera.capture_metadata().get("LensPosition", math.nan)
        return FocusReport(target, float(position), False, time.time())

    def position(self) -> float | None:
        position = self._open("position").capture_metadata().get("LensPosition")
        return None if position is None else float(position)

    def grab(self, timeout_s: float) -> Frame:
        camera = self._open("grab")
        self._fresh_metadata()
        started_s = time.time()
        request = camera.capture_request(wait=timeout_s)
        try:
            image, metadata = request.make_array("main"), request.get_metadata()
        finally:
            request.release()
        position = metadata.get("LensPosition", math.nan)
        return Frame(
            image=np.ascontiguousarray(image),  # libcamera's BGR888 is R, G, B in memory
            transfer="srgb",
            started_s=started_s,
            finished_s=time.time(),
            exposure_time_s=metadata.get("ExposureTime", math.nan) * 1e-6,
            iso=metadata.get("AnalogueGain", math.nan) * 100.0,
            focus_position=position,
            metadata={"sensor_timestamp_ns": metadata.get("SensorTimestamp")},
        )

    def preview(self) -> NDArray[np.uint8]:
        image = self._open("preview").capture_array("main")
        factor = max(1, image.shape[1] // 640)
        return np.ascontiguousarray(image[::factor, ::factor])

    def close(self) -> None:
        camera, self._camera = self._camera, None
        if camera is not None:
            camera.stop()
            camera.close()

    def __enter__(self) -> PicameraCamera:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, stage: str) -> Any:
        if self._camera is None:
            raise CameraClosed(f"the camera is not open, {stage} needs open() first", stage=stage)
        return self._camera

    def _fresh_metadata(self) -> dict[str, Any]:
        """Metadata of a frame whose exposure began after now."""
        for _ in range(FRESH_FRAMES):
            metadata = self._camera.capture_metadata()
        return dict(metadata)
