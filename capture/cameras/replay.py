"""A folder of photographs played back as a camera: recorded sweeps through the live path.

With `stack.yaml` that knows distances, the camera counts in dioptres; otherwise in frame numbers ("driver"). Moving the
focus selects the photograph that lies nearest to the target, and the files are delivered as they are.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from capture.cameras.base import (
    CameraClosed,
    CameraDisconnected,
    CameraInfo,
    CameraNotFound,
    Capabilities,
    ExposureSettings,
    FocusLimit,
    FocusRange,
    FocusReport,
    Frame,
    Transfer,
    UnsupportedControl,
)
from capture.errors import DataError
from capture.lens import Lens


class ReplayCamera:
    """The photographs of `folder` as a `Camera`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: list[Path] = []
        self._positions = np.empty(0)
        self._unit: Literal["dioptre", "driver"] = "driver"
        self._transfer: Transfer = "unknown"
        self._at: float | None = None

    def open(self) -> CameraInfo:
        from capture.config import load_yaml
        from capture.importer import StackFile, image_names

        if not self.folder.is_dir():
            raise CameraNotFound(f"the folder {self.folder} to replay does not exist", stage="open")
        lens: Lens | None = None
        self._files = [self.folder / name for name in image_names(self.folder)]
        self._unit, self._positions = "driver", np.arange(float(len(self._files)))
        self._transfer = "unknown"
        description = self.folder / "stack.yaml"
        if description.is_file():
            recorded = load_yaml(description, StackFile)
            self._transfer = recorded.transfer or "unknown"
            lens = recorded.lens if isinstance(recorded.lens, Lens) else None
            if recorded.frames:
                self._files = [self.folder / frame.file for frame in recorded.frames]
                self._positions = np.arange(float(len(self._files)))
                distances = [frame.focus_distance_m for frame in recorded.frames]
                known = [distance for distance in distances if distance is not None]
                if len(known) == len(distances):
                    self._unit, self._positions = "dioptre", 1.0 / np.array(known)
        if len(self._files) < 2:
            raise DataError(f"{self.folder} has {len(self._files)} images and a sweep needs two or more")
        self._at = float(self._positions[0])
        capabilities = Capabilities(
            focus="absolute", focus_unit=self._unit, focus_readback=True, exposure_lock=True, settle_s=0.0
        )
        return CameraInfo("replay", self.folder.name, "", "replay", capabilities, lens)

    def lock_exposure(self, settings: ExposureSettings) -> ExposureSettings:
        self._open()
        if settings != ExposureSettings():
            raise UnsupportedControl("recorded photographs have the exposure that they have", stage="lock_exposure")
        return settings

    def set_live_view(self, on: bool) -> None:
        self._open()

    def focus_range(self) -> FocusRange:
        self._open()
        low, high = float(self._positions.min()), float(self._positions.max())
        near, far = (high, low) if self._unit == "dioptre" else (low, high)
        step = (high - low) / (len(self._files) - 1)
        return FocusRange(near, far, step, self._unit, "device")

    def home(self, end: Literal["near", "far"] = "near") -> FocusReport:
        limits = self.focus_range()
        before = self._open()
        self._at = limits.near if end == "near" else limits.far
        return FocusReport(self._at, self._at, True, time.time(), abs(before - self._at))

    def move_focus(self, target: float) -> FocusReport:
        self._open()
        limits = self.focus_range()
        if not limits.contains(target):
            raise FocusLimit(
                f"{target:g} is outside the recorded {limits.near:g} to {limits.far:g} {limits.unit}",
                stage="move_focus",
            )
        self._at = float(self._positions[np.abs(self._positions - target).argmin()])
        return FocusReport(target, self._at, False, time.time())

    def position(self) -> float | None:
        return self._open()

    def grab(self, timeout_s: float) -> Frame:
        at = self._open()
        path = self._files[int(np.abs(self._positions - at).argmin())]
        started_s = time.time()
        try:
            data = path.read_bytes()
        except OSError as error:
            raise CameraDisconnected(f"{path} cannot be read: {error.strerror}", stage="grab") from None
        known = self._unit == "dioptre"
        return Frame(
            image=None,
            transfer=self._transfer,
            originals=((path.name, data),),
            started_s=started_s,
            finished_s=time.time(),
            focus_position=at,
            focus_distance_m=(math.inf if at == 0 else 1.0 / at) if known else math.nan,
            focus_distance_source="recorded" if known else "",
        )

    def preview(self) -> NDArray[np.uint8]:
        self._open()
        raise UnsupportedControl("a replayed folder has no live view", stage="preview")

    def close(self) -> None:
        self._at = None

    def __enter__(self) -> ReplayCamera:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> float:
        if self._at is None:
            raise CameraClosed("the camera is not open, it needs open() first")
        return self._at
