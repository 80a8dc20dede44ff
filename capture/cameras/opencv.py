"""Webcams through OpenCV (V4L2, Media Foundation, DirectShow), and video files of a sweep; runs in `worker.py`.

What a driver claims is believed only after a test: focus counts as drivable when two different values were written and
the read-back changed. Frames that the driver had buffered before a move are thrown away. On macOS OpenCV has no focus
control at all, so the operator turns the ring. A video file is a camera whose position is the frame number.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from capture.cameras.base import (
    CameraClosed,
    CameraDisconnected,
    CameraInfo,
    CameraInUse,
    CameraNotFound,
    CameraTimeout,
    Capabilities,
    CaptureFailed,
    ControlRejected,
    ExposureSettings,
    FocusLimit,
    FocusRange,
    FocusReport,
    Frame,
    Transfer,
    UnsupportedControl,
    home_by_moving,
)
from capture.cameras.worker import WorkerCamera
from capture.errors import UsageError

logger = logging.getLogger(__name__)

LEAST_BUFFERED = 4  # V4L2 queues 4 frames by default, whatever BUFFERSIZE says
DRIFT_FRAMES, DRIFT_LIMIT, DRIFT_TRIES = 10, 0.005, 5
LOST_AFTER = 5  # reads that fail in a row
DEFAULT_RANGE = (0.0, 255.0, 5.0)  # UVC webcams: 0 is far; used when the driver does not say
V4L2_FOCUS_ABSOLUTE = 0x009A090A
VIDIOC_QUERYCTRL = 0xC0445624
OPTIONS = ("near", "far", "step", "average", "width", "height", "api", "transfer", "settle")


class OpencvCamera:
    """One video device, or one video file; a `Camera`.

    Args:
        source: device number or path of a video file.
        api: "v4l2", "msmf", "dshow", "avfoundation", or "" for the usual one of this system.
        near, far, step: focus range in driver units, where the driver does not say.
        average: frames averaged into one picture; more than one are stored with 16 bits.
        width, height: size to ask for; 0 keeps the driver's.
        transfer: transfer function of the device; webcams do not say, sRGB is the usual one.
        settle_s: least wait after a move.
        manual_focus: leave the motor alone.
        capture_factory: makes the cv2.VideoCapture; tests put a fake here.
    """

    def __init__(
        self,
        source: int | str,
        *,
        api: str = "",
        near: float | None = None,
        far: float | None = None,
        step: float | None = None,
        average: int = 1,
        width: int = 0,
        height: int = 0,
        transfer: Transfer = "srgb",
        settle_s: float = 0.3,
        manual_focus: bool = False,
        capture_factory: Callable[[int | str, int], Any] | None = None,
    ) -> None:
        self._source, self._api = source, api or _usual_api()
        self._given = (near, far, step)
        self._average, self._size = average, (width, height)
        self._transfer, self._settle_s = transfer, settle_s
        self._manual_focus = manual_focus
        self._factory = capture_factory
        self._capture: Any = None
        self._stale = 0  # frames in the driver's queue that are older than the last move
        self._commanded: float | None = None
        self._can_focus = False
        self._restore: list[tuple[int, float]] = []
        self._started = False

    @property
    def _is_file(self) -> bool:
        return isinstance(self._source, str)

    # --- opening and closing

    def open(self) -> CameraInfo:
        import cv2

        self.close()
        factory = self._factory or cv2.VideoCapture
        capture = factory(self._source, cv2.CAP_ANY if self._is_file else _api_number(self._api))
        if not capture.isOpened():
            capture.release()
            self._explain_closed()
        self._capture = capture
        if not self._is_file:
            if all(self._size):
                capture.set(cv2.CAP_PROP_FRAME_WIDTH, self._size[0])
                capture.set(cv2.CAP_PROP_FRAME_HEIGHT, self._size[1])
            capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)
            self._can_focus = not self._manual_focus and self._focus_answers()
        self._commanded = 0.0 if self._is_file else None
        kind: Literal["absolute", "manual"] = "absolute" if self._is_file or self._can_focus else "manual"
        capabilities = Capabilities(
            focus=kind,
            focus_unit="driver" if kind == "absolute" else "m",
            focus_readback=kind == "absolute",
            preview=not self._is_file,
            exposure_lock=not self._is_file,
            settle_s=0.0 if self._is_file else self._settle_s,
        )
        model = Path(str(self._source)).name if self._is_file else f"video device {self._source}"
        return CameraInfo("", model, "", f"opencv {'file' if self._is_file else self._api}", capabilities)

    def _explain_closed(self) -> None:
        if self._is_file:
            raise CameraNotFound(f"{self._source} cannot be opened as a video", stage="open")
        device = Path(f"/dev/video{self._source}")
        if sys.platform.startswith("linux") and device.exists():
            raise CameraInUse(f"{device} exists but cannot be opened: another program holds it", stage="open")
        raise CameraNotFound(f"there is no video device {self._source}", stage="open")

    def _focus_answers(self) -> bool:
        """Whether the lens can be driven: two different values were taken, and the read-back changed."""
        import cv2

        if self._api == "avfoundation":
            logger.info("OpenCV cannot drive the focus on macOS: turn the ring by hand")
            return False
        capture = self._capture
        before = capture.get(cv2.CAP_PROP_FOCUS)
        auto = capture.get(cv2.CAP_PROP_AUTOFOCUS)
        capture.set(cv2.CAP_PROP_AUTOFOCUS, 0)  # first: MSMF writes this value into the focus itself
        limits = self._limits()
        read = []
        for share in (0.25, 0.75):
            value = limits.near + share * (limits.far - limits.near)
            if not capture.set(cv2.CAP_PROP_FOCUS, value):
                return False
            read.append(capture.get(cv2.CAP_PROP_FOCUS))
        if read[0] == read[1]:
            return False
        self._restore += [(cv2.CAP_PROP_FOCUS, before), (cv2.CAP_PROP_AUTOFOCUS, auto)]
        capture.set(cv2.CAP_PROP_FOCUS, before)
        return True

    def close(self) -> None:
        capture, self._capture = self._capture, None
        if capture is None:
            return
        for control, value in self._restore:
            capture.set(control, value)
        self._restore.clear()
        self._commanded, self._stale, self._can_focus = None, 0, False
        capture.release()

    def __enter__(self) -> OpencvCamera:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, stage: str) -> Any:
        if self._capture is None:
            raise CameraClosed(f"the camera is not open, {stage} needs open() first", stage=stage)
        return self._capture

    # --- exposure

    def lock_exposure(self, settings: ExposureSettings) -> ExposureSettings:
        import cv2

        capture = self._open("lock_exposure")
        if settings.f_number is not None or (self._is_file and settings != ExposureSettings()):
            raise UnsupportedControl("a webcam has no aperture to set, and a file no exposure", stage="lock_exposure")
        if self._is_file:
            return settings
        exposure = capture.get(cv2.CAP_PROP_EXPOSURE)
        # V4L2: 1 is manual, 3 aperture priority; elsewhere 0 is manual. Auto goes off before the value is written.
        self._set(cv2.CAP_PROP_AUTO_EXPOSURE, 1.0 if self._api == "v4l2" else 0.0)
        if settings.exposure_time_s is not None:
            exposure = self._exposure_value(settings.exposure_time_s)
        self._lock("exposure", cv2.CAP_PROP_EXPOSURE, exposure, settings.exposure_time_s is not None)
        gain = capture.get(cv2.CAP_PROP_GAIN) if settings.iso is None else settings.iso
        self._lock("gain", cv2.CAP_PROP_GAIN, gain, settings.iso is not None)
        temperature = capture.get(cv2.CAP_PROP_WB_TEMPERATURE)
        self._set(cv2.CAP_PROP_AUTO_WB, 0.0)
        if settings.white_balance is not None:
            try:
                temperature = float(settings.white_balance)
            except ValueError:
                raise ControlRejected(
                    f"white balance {settings.white_balance!r} must be a colour temperature such as 4600",
                    stage="lock_exposure",
                ) from None
        self._lock("white balance", cv2.CAP_PROP_WB_TEMPERATURE, temperature, settings.white_balance is not None)
        self._check_steady()
        value = capture.get(cv2.CAP_PROP_EXPOSURE)
        return ExposureSettings(
            self._exposure_seconds(value), None, None, f"{capture.get(cv2.CAP_PROP_WB_TEMPERATURE):g}"
        )

    def _set(self, control: int, value: float) -> bool:
        before = self._capture.get(control)
        done = bool(self._capture.set(control, value))
        if done and not any(control == known for known, _ in self._restore):
            self._restore.append((control, before))
        return done

    def _lock(self, name: str, control: int, value: float, asked: bool) -> None:
        """Write a value with its automatic off; complain only when the user asked for it and it is not kept."""
        done = self._set(control, value)
        after = self._capture.get(control)
        if asked and (not done or abs(after - value) > max(0.06 * abs(value), 1.0)):
            raise ControlRejected(f"{name} was set to {value:g} and reads back {after:g}", stage="lock_exposure")

    def _check_steady(self) -> None:
        """What counts in the end: the brightness of successive frames does not drift."""
        for _ in range(DRIFT_TRIES):  # the first frames still show the automatic at work, or the lens arriving
            self._drop_stale(LEAST_BUFFERED + 1)
            levels = [float(self._read().mean()) for _ in range(DRIFT_FRAMES)]
            drift = abs(sum(levels[-3:]) - sum(levels[:3])) / 3.0 / max(sum(levels) / DRIFT_FRAMES, 1.0)
            if drift <= DRIFT_LIMIT:
                return
        raise ControlRejected(
            f"the brightness still drifts by {drift:.1%} over {DRIFT_FRAMES} frames with exposure locked",
            stage="lock_exposure",
        )

    def _exposure_value(self, seconds: float) -> float:
        return seconds * 1e4 if self._api == "v4l2" else math.log2(seconds)

    def _exposure_seconds(self, value: float) -> float | None:
        if self._api == "v4l2":
            return value * 1e-4 if value > 0 else None
        return 2.0**value if -20 < value < 5 else None

    # --- focus

    def set_live_view(self, on: bool) -> None:
        self._open("set_live_view")

    def focus_range(self) -> FocusRange:
        self._open("focus_range")
        if not (self._is_file or self._can_focus):
            raise UnsupportedControl("the focus of this camera cannot be driven", stage="focus_range")
        return self._limits()

    def _limits(self) -> FocusRange:
        import cv2

        if self._is_file:
            return FocusRange(0.0, max(self._capture.get(cv2.CAP_PROP_FRAME_COUNT) - 1.0, 1.0), 1.0, "driver", "device")
        near, far, step = self._given
        asked = _v4l2_range(int(self._source)) if self._api == "v4l2" and self._factory is None else None
        low, high, unit = asked or DEFAULT_RANGE
        given = near is not None or far is not None
        return FocusRange(
            near=high if near is None else near,  # larger is nearer on UVC devices
            far=low if far is None else far,
            step=step or unit,
            unit="driver",
            source="device" if asked and not given else "profile",
        )

    def home(self, end: Literal["near", "far"] = "near") -> FocusReport:
        return home_by_moving(self, end)

    def move_focus(self, target: float) -> FocusReport:
        import cv2

        capture = self._open("move_focus")
        limits = self.focus_range()
        if not limits.contains(target):
            raise FocusLimit(
                f"position {target:g} is outside this lens's {limits.near:g} to {limits.far:g}", stage="move_focus"
            )
        if self._is_file:
            self._commanded = float(round(target))
            return FocusReport(target, self._commanded, False, time.time())
        if not capture.set(cv2.CAP_PROP_FOCUS, target):
            raise ControlRejected(f"the driver refused focus {target:g}", stage="move_focus")
        self._stale = max(int(capture.get(cv2.CAP_PROP_BUFFERSIZE)), LEAST_BUFFERED) + 1
        self._commanded = target
        return FocusReport(target, float(capture.get(cv2.CAP_PROP_FOCUS)), False, time.time())

    def position(self) -> float | None:
        import cv2

        capture = self._open("position")
        if self._is_file:
            return self._commanded
        return float(capture.get(cv2.CAP_PROP_FOCUS)) if self._can_focus else None

    # --- pictures

    def grab(self, timeout_s: float) -> Frame:
        import cv2

        capture = self._open("grab")
        if self._is_file:
            capture.set(cv2.CAP_PROP_POS_FRAMES, self._commanded)
        deadline = time.monotonic() + timeout_s
        self._drop_stale(0 if self._is_file else max(self._stale, LEAST_BUFFERED + 1))
        started_s = time.time()
        first = self._read()
        image: NDArray[Any] = first
        if self._average > 1:
            total = first.astype(np.uint32)
            for _ in range(self._average - 1):
                if time.monotonic() > deadline:
                    raise CameraTimeout(f"{self._average} frames did not arrive in {timeout_s:g} s", stage="grab")
                total += self._read(first.shape)
            image = (total * 257 // self._average).astype(np.uint16)
        exposure_s = None if self._is_file else self._exposure_seconds(capture.get(cv2.CAP_PROP_EXPOSURE))
        position = self.position()
        return Frame(
            image=image,
            transfer=self._transfer,
            white_level=65535.0 if self._average > 1 else 255.0,
            started_s=started_s,
            finished_s=time.time(),
            exposure_time_s=math.nan if exposure_s is None else exposure_s,
            focus_position=math.nan if position is None else position,
        )

    def preview(self) -> NDArray[np.uint8]:
        self._open("preview")
        if self._is_file:
            raise UnsupportedControl("a video file has no live view", stage="preview")
        self._drop_stale(self._stale)
        return self._read()

    def _drop_stale(self, count: int) -> None:
        """Throw away frames that the driver had queued before now."""
        for _ in range(count):
            self._capture.grab()
        self._stale = 0

    def _read(self, shape: tuple[int, ...] | None = None) -> NDArray[np.uint8]:
        """Next frame, (H, W, 3) RGB; a single failed read is tried again."""
        for _ in range(LOST_AFTER):
            done, image = self._capture.read()
            if done and image is not None:
                break
        else:
            if self._is_file:
                raise CaptureFailed(f"{self._source} has no frame {self._commanded:g}", stage="grab")
            raise CameraDisconnected(f"{LOST_AFTER} reads in a row failed", stage="grab")
        if image.ndim == 2:
            image = np.repeat(image[..., None], 3, axis=2)
        if shape is not None and image.shape != shape:
            raise CaptureFailed(f"a frame is {image.shape} and the one before {shape}", stage="grab")
        return np.ascontiguousarray(image[..., ::-1])


def opencv_worker(place: str, options: Mapping[str, str], *, manual_focus: bool = False) -> WorkerCamera:
    """The device (a number) or video file at `place` in a worker process."""
    from capture.config import did_you_mean

    arguments: dict[str, Any] = {"source": int(place) if place.isdigit() else place, "manual_focus": manual_focus}
    for name, text in options.items():
        if name not in OPTIONS:
            raise UsageError(f"camera opencv:{place}: unknown option '{name}'{did_you_mean(name, OPTIONS)}")
        if name in ("api", "transfer"):
            allowed = tuple(_APIS) if name == "api" else ("srgb", "linear", "rec709")
            if text not in allowed:
                raise UsageError(f"camera opencv:{place}: {name}={text} must be one of {', '.join(allowed)}")
            arguments[name] = text
            continue
        try:
            number = float(text)
        except ValueError:
            raise UsageError(f"camera opencv:{place}: {name}={text} is not a number") from None
        whole = name in ("average", "width", "height")
        if not math.isfinite(number) or (whole and not 1 <= number <= 65536):
            raise UsageError(f"camera opencv:{place}: {name}={text} is out of range")
        arguments["settle_s" if name == "settle" else name] = int(number) if whole else number
    return WorkerCamera("capture.cameras.opencv:OpencvCamera", arguments)


_APIS = {"v4l2": "CAP_V4L2", "msmf": "CAP_MSMF", "dshow": "CAP_DSHOW", "avfoundation": "CAP_AVFOUNDATION"}


def _usual_api() -> str:
    return {"win32": "msmf", "darwin": "avfoundation"}.get(sys.platform, "v4l2")


def _api_number(api: str) -> int:
    import cv2

    return int(getattr(cv2, _APIS[api]))


def _v4l2_range(device: int) -> tuple[float, float, float] | None:
    """(lowest, highest, step) of focus_absolute, asked from the kernel; OpenCV does not pass it on."""
    import fcntl
    import os
    import struct

    layout = "=II32siiiiI2I"  # struct v4l2_queryctrl
    request = struct.pack(layout, V4L2_FOCUS_ABSOLUTE, 0, b"", 0, 0, 0, 0, 0, 0, 0)
    try:
        descriptor = os.open(f"/dev/video{device}", os.O_RDWR | os.O_NONBLOCK)
        try:
            answer = struct.unpack(layout, fcntl.ioctl(descriptor, VIDIOC_QUERYCTRL, request))
        finally:
            os.close(descriptor)
    except OSError:
        return None
    low, high, step = answer[3:6]
    return (float(low), float(high), float(max(step, 1))) if high > low else None
