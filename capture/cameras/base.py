"""The `Camera` protocol, what it hands over (`Frame`, `FocusReport`, ...) and the errors it may raise.

A sweep (`capture/sweep.py`) sees only this file; everything brand-specific stays inside a backend.

What a backend must do
----------------------
* Its class satisfies `Camera`; its driver library is imported inside `open()`, never at module level. The constructor
  touches no hardware. `open()` after `close()`, or after a `CameraDisconnected`, connects afresh.
* Positions are in one unit, `capabilities.focus_unit`, for commands and read-back alike:
  "dioptre" (1/m) or "m" if the camera counts in them, "driver" for absolute numbers of unknown meaning (V4L2, Fuji),
  "step" for relative motors: dead-reckoned steps that are 0 at the near stop after `home()` and grow towards far.
  `focus_range()` names the near and the far end in that unit; `near` may be the larger number.
* `move_focus(target)` is absolute in that unit, whatever the motor does; a relative backend subtracts. It returns when
  the motor has stopped as far as the driver can tell; stillness of the image is measured by the sweep. One-sided
  approach is the sweep's job too (it knows `capabilities.backlash`). A target outside the range raises `FocusLimit`; an
  end stop that was hit on the way is no error, it sets `at_limit` (the count is not to be trusted until `home()`).
* A relative backend raises `FocusNotHomed` from `move_focus` until `home()` was called after `open()`.
* `lock_exposure()` sets what is not None, leaves the rest as it is, switches every automatic off, and returns what it
  read back; a value that reads back differently raises `ControlRejected`, one that it lacks `UnsupportedControl`.
* `grab()` triggers a fresh picture after the call began (no stale buffer) and returns one `Frame`. Either `image` is
  set (cameras without files) or `originals` holds the camera's files, RAW before JPEG, and the sweep decodes them.
* What is to be deleted from the camera's card once it is stored, `grab()` leaves there and names in `Frame.on_card`;
  the sweep gives it to `delete_from_card()` (`HasCard`) when the frame is safe. What is rejected stays on the card.
* `preview()` is cheap, small and 8-bit; cameras without live view raise `UnsupportedControl` (`capabilities.preview`
  is False).
* `close()` is idempotent and never raises: it puts back every setting that was changed and lets the device go.
* Any call on a camera that is not open raises `CameraClosed`.
* Native errors become one of the classes below with `native_code` and `native_text`; nothing else may escape.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from capture.errors import DaifError
from capture.lens import Lens

FocusKind = Literal["absolute", "relative", "manual"]
FocusUnit = Literal["dioptre", "m", "step", "driver"]
Transfer = Literal["linear", "srgb", "rec709", "unknown"]
Recovery = Literal["stop", "retry", "reopen", "live_view"]


@dataclass(frozen=True)
class Capabilities:
    """What a camera can do, as far as its driver and profile say.

    Attributes:
        focus: "absolute", "relative" (motor steps, dead-reckoned) or "manual" (the operator turns the ring).
        focus_unit: unit of every position of this camera.
        focus_readback: `position()` is measured by the device, not dead-reckoned or commanded.
        needs_live_view: focus moves only while live view is on.
        preview: `preview()` works.
        raw: `grab()` can bring a RAW file.
        exposure_lock: exposure and white balance can be fixed and read back.
        end_stop_signal: the driver says when the lens has reached its stop.
        backlash: play of the gear in `focus_unit`; the sweep overshoots by more than this and comes back.
        settle_s: least wait after a move before a picture.
    """

    focus: FocusKind
    focus_unit: FocusUnit
    focus_readback: bool = False
    needs_live_view: bool = False
    preview: bool = False
    raw: bool = False
    exposure_lock: bool = False
    end_stop_signal: bool = False
    backlash: float = 0.0
    settle_s: float = 0.5


@dataclass(frozen=True)
class CameraInfo:
    """Who answered at `open()`; `lens` and `battery` (its own words) only where they are known."""

    make: str
    model: str
    serial: str
    driver: str
    capabilities: Capabilities
    lens: Lens | None = None
    battery: str | None = None


@dataclass(frozen=True)
class ExposureSettings:
    """Exposure to lock (None: keep what the camera has now), or what was read back (None: not known).

    `white_balance` is a driver's word ("Daylight", "4600"); numbers are seconds, ISO and f-number.
    """

    exposure_time_s: float | None = None
    iso: float | None = None
    f_number: float | None = None
    white_balance: str | None = None


@dataclass(frozen=True)
class FocusRange:
    """Where the lens can go, in `unit`; `near` is the position of nearest focus and may be the larger number."""

    near: float
    far: float
    step: float
    unit: FocusUnit
    source: Literal["device", "profile", "discovered"]

    def contains(self, position: float) -> bool:
        """Whether `position` lies between the ends, with a tolerance of half a step."""
        low, high = sorted((self.near, self.far))
        return low - 0.5 * self.step <= position <= high + 0.5 * self.step


@dataclass(frozen=True)
class FocusReport:
    """One finished lens move.

    Attributes:
        commanded: target in the camera's unit.
        position: what the device reads back, or the dead-reckoned count; None where it is unknown.
        at_limit: an end stop was reached during the move.
        finished_s: time.time() when the driver called the move done.
        travelled: `home()` only: distance from where the lens stood to the stop, None if it cannot be known.
    """

    commanded: float
    position: float | None
    at_limit: bool = False
    finished_s: float = 0.0
    travelled: float | None = None


@dataclass
class Frame:
    """One picture, as the camera gave it; exactly one of `image` and `originals` may be missing.

    Attributes:
        image: (H, W, C) uint8 or uint16, RGB order, C = 1 or 3; None when `originals` are to be decoded.
        transfer: transfer function of `image`; of `originals` only where the backend knows better than the file.
        white_level: value of `image` that means 1.0 (255, 65535, 4095...).
        originals: the camera's own files as (name, bytes), RAW first.
        on_card: (folder, name) of files to delete from the camera once this frame is stored.
        started_s, finished_s: time.time() around the exposure and transfer.
        exposure_time_s, f_number, iso: as read back for this frame; NaN unknown.
        focus_position: device read-back after the exposure; NaN unknown.
        focus_distance_m: distance that the camera itself reports, from the front principal plane; NaN unknown.
        focus_distance_source: "", "exif", "reported", "simulated" or "operator".
        metadata: anything else worth keeping; JSON-serialisable.
    """

    image: NDArray[np.uint8] | NDArray[np.uint16] | None
    transfer: Transfer = "unknown"
    white_level: float = 255.0
    originals: tuple[tuple[str, bytes], ...] = ()
    on_card: tuple[tuple[str, str], ...] = ()
    started_s: float = 0.0
    finished_s: float = 0.0
    exposure_time_s: float = math.nan
    f_number: float = math.nan
    iso: float = math.nan
    focus_position: float = math.nan
    focus_distance_m: float = math.nan
    focus_distance_source: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class Camera(Protocol):
    """A camera whose focus can be driven, or asked for; see the module's text for each backend's duties."""

    def open(self) -> CameraInfo:
        """Connect and return who answered."""

    def lock_exposure(self, settings: ExposureSettings) -> ExposureSettings:
        """Fix exposure, ISO, aperture and white balance; returns the values read back."""

    def set_live_view(self, on: bool) -> None:
        """Switch live view (mirror up); a no-op where the camera has none to switch."""

    def focus_range(self) -> FocusRange:
        """Both ends of the lens's travel."""

    def home(self, end: Literal["near", "far"] = "near") -> FocusReport:
        """Drive to an end stop; a relative camera counts from there (0 at near)."""

    def move_focus(self, target: float) -> FocusReport:
        """Drive to `target` in the camera's unit and report where the lens went."""

    def position(self) -> float | None:
        """Where the lens stands, in the camera's unit; None if not known."""

    def grab(self, timeout_s: float) -> Frame:
        """Take a fresh picture; raises `CameraTimeout` after `timeout_s`."""

    def preview(self) -> NDArray[np.uint8]:
        """Latest live-view picture, (h, w, 3) uint8 RGB in the display's transfer function."""

    def close(self) -> None:
        """Restore changed settings and let the device go; idempotent, never raises."""

    def __enter__(self) -> Camera: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@runtime_checkable
class HasCard(Protocol):
    """A camera that can delete pictures from its card."""

    def delete_from_card(self, files: tuple[tuple[str, str], ...]) -> None:
        """Delete `Frame.on_card` of a frame that is stored."""


def home_by_moving(camera: Camera, end: Literal["near", "far"]) -> FocusReport:
    """`home()` of a lens that knows where it is: a move to the `end` of its scale."""
    limits, before = camera.focus_range(), camera.position()
    report = camera.move_focus(limits.near if end == "near" else limits.far)
    travelled = None if before is None else abs(before - report.commanded)
    return replace(report, at_limit=True, travelled=travelled)


class CameraError(DaifError):
    """A camera failed; the text is one sentence that ends with what to do.

    Attributes:
        recovery: what the sweep tries by itself: "retry" the call, "reopen" the camera and re-home, switch "live_view"
            on, or "stop" and leave it to the user.
        stage: what was being done ("open", "move_focus", "grab", ...).
        native_code, native_text: what the driver said.
        where, outcome: added by the sweep: which frame it was, and what is safe.
    """

    exit_code = 4
    recovery: ClassVar[Recovery] = "stop"
    advice: ClassVar[str] = ""

    def __init__(self, message: str, *, stage: str = "", native_code: int | None = None, native_text: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.stage = stage
        self.native_code = native_code
        self.native_text = native_text
        self.where = ""
        self.outcome = ""

    def __str__(self) -> str:
        where = f"{self.where}: " if self.where else ""
        native = f" ({self.native_text})" if self.native_text and self.native_text not in self.message else ""
        return f"{where}{self.message}{native}" + "".join(f"; {part}" for part in (self.advice, self.outcome) if part)

    def __reduce__(self) -> tuple[Any, ...]:  # crosses the worker's pipe whole
        return _rebuild, (type(self), self.message, self.stage, self.native_code, self.native_text)


def _rebuild(
    kind: type[CameraError], message: str, stage: str, native_code: int | None, native_text: str
) -> CameraError:
    return kind(message, stage=stage, native_code=native_code, native_text=native_text)


class CameraNotFound(CameraError):
    """No such camera is connected, or its driver is not installed."""

    advice = "connect it and switch it on, then look with `daif cameras`"


class CameraInUse(CameraError):
    """Another program holds the camera."""

    advice = "eject it in the file manager or close the other program (on GNOME: gio mount -s gphoto2), then try again"


class CameraDisconnected(CameraError):
    """The camera stopped answering: cable, battery or sleep."""

    recovery = "reopen"
    advice = "check cable and battery, and switch the camera's auto power-off off"


class CameraBusy(CameraError):
    """The camera asks to be left alone for a moment."""

    recovery = "retry"
    advice = "wait until its buffer is written and no menu is open"


class CameraTimeout(CameraError):
    """A call did not come back within its deadline."""

    recovery = "reopen"
    advice = "switch the camera off and on if it does not recover by itself"


class CameraCrashed(CameraError):
    """The driver's process died (segmentation fault, out of memory)."""

    recovery = "reopen"
    advice = "the driver is restarted by itself; if it keeps happening, update libgphoto2"


class UnsupportedControl(CameraError):
    """The camera has no such setting or function."""


class ControlRejected(CameraError):
    """A setting reads back differently from what was asked for."""

    advice = "set it on the camera (mode dial M, lens switch, white balance) or leave that option out"


class FocusLimit(CameraError):
    """The position asked for lies beyond the lens's stop."""

    advice = "plan a sweep within the lens's range (`daif cameras` prints it)"


class FocusStepTooSmall(CameraError):
    """The motor does not make a step this small."""

    advice = "plan fewer frames"


class FocusNotReady(CameraError):
    """The lens does not move in this state; most bodies need live view."""

    recovery = "live_view"
    advice = "switch live view on and set the lens to AF where the body drives focus only then"


class FocusNotHomed(CameraError):
    """The dead-reckoned position is not known."""

    recovery = "reopen"


class FocusStuck(CameraError):
    """The lens was told to move and the picture did not change: it lost steps, or its switch is on manual."""

    recovery: ClassVar[Recovery] = "reopen"
    advice = "check that the lens is free to move and that its switch allows driving"


class CameraStorageFull(CameraError):
    """The camera's card or buffer is full."""

    advice = "empty the card (or let daif delete what it has downloaded: --delete-from-camera), then --resume"


class CaptureFailed(CameraError):
    """The camera refused to take the picture."""

    recovery = "retry"
    advice = "check focus mode, card and flash readiness"


class CorruptFrame(CameraError):
    """The picture that arrived cannot be decoded, or has another size than the others."""

    recovery = "retry"
    advice = "check cable and card"


class ExposureDrift(CameraError):
    """Brightness changed between frames although exposure is locked."""

    recovery = "retry"  # somebody walked past, a lamp flickered
    advice = "keep the light steady and the exposure manual, or allow it with --allow-drift"


class CameraClosed(CameraError):
    """The camera was used before `open()` or after `close()`."""
