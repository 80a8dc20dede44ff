"""A camera that photographs a `Scene` through its own optics (`capture/optics.py`): a real backend, not a mock.

    simulated:motorcycle                                     absolute focus in dioptres
    simulated:procedural-7?relative=1&backlash=5             a motor that only counts steps, with play in its gear
    simulated:FOLDER?files=jpeg&noise=0.01&fault=disconnect@3,busy@5x2

FOLDER holds rgb.png and depth.png. Options are the fields of `Behaviour`. A fault `NAME@N` strikes once while frame N
(from 0) is being taken, `NAME@NxK` the first K times; `FAULTS` lists the names.
"""

from __future__ import annotations

import re
import time
from collections import OrderedDict
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from capture.cameras.base import (
    CameraBusy,
    CameraClosed,
    CameraCrashed,
    CameraDisconnected,
    CameraError,
    CameraInfo,
    CameraInUse,
    CameraNotFound,
    CameraStorageFull,
    CameraTimeout,
    Capabilities,
    CaptureFailed,
    ControlRejected,
    ExposureSettings,
    FocusLimit,
    FocusNotHomed,
    FocusNotReady,
    FocusRange,
    FocusReport,
    FocusStepTooSmall,
    Frame,
    UnsupportedControl,
)
from capture.config import did_you_mean
from capture.decode import to_srgb8
from capture.errors import UsageError
from capture.lens import Lens, dioptre_to_metre
from capture.optics import (
    CONDITIONS,
    ApertureRenderer,
    Condition,
    Psf,
    SimulatedSweep,
    breathing_magnification,
    expose,
    render_frame,
    simulate_sweep,
    sweep_for_scene,
)
from capture.scenes import Scene, load_scene, motorcycle, procedural_scene

__all__ = [
    "CONDITIONS",
    "FAULTS",
    "Behaviour",
    "Condition",
    "Fault",
    "SimulatedCamera",
    "SimulatedSweep",
    "render_frame",
    "simulate_sweep",
    "simulated_camera",
]

Stage = Literal["open", "lock_exposure", "move_focus", "grab"]

# What can go wrong, when, and what the driver says. None: no error is raised, the frame or the lens shows it.
FAULTS: dict[str, tuple[Stage, CameraError | None]] = {
    "not_found": ("open", CameraNotFound("no simulated camera is connected", stage="open")),
    "in_use": ("open", CameraInUse("another program holds the simulated camera", stage="open")),
    "rejected": ("lock_exposure", ControlRejected("iso was set to 100 and reads back 400", stage="lock_exposure")),
    "unsupported": ("lock_exposure", UnsupportedControl("the camera has no setting for ISO", stage="lock_exposure")),
    "limit": ("move_focus", FocusLimit("the lens is at its stop", stage="move_focus")),
    "step_too_small": (
        "move_focus",
        FocusStepTooSmall("the motor did not move for so small a step", stage="move_focus"),
    ),
    "not_ready": ("move_focus", FocusNotReady("the lens does not move without live view", stage="move_focus")),
    "not_homed": ("move_focus", FocusNotHomed("the lens position was lost", stage="move_focus")),
    "stuck": ("move_focus", None),
    "disconnect": ("grab", CameraDisconnected("the camera stopped answering", stage="grab")),
    "crash": ("grab", CameraCrashed("the driver died", stage="grab")),
    "timeout": ("grab", CameraTimeout("no picture came in time", stage="grab")),
    "busy": ("grab", CameraBusy("the camera is busy", stage="grab")),
    "storage_full": ("grab", CameraStorageFull("the camera's card is full", stage="grab")),
    "capture_failed": ("grab", CaptureFailed("the camera refused to take the picture", stage="grab")),
    "corrupt": ("grab", None),
    "wrong_size": ("grab", None),
    "black": ("grab", None),
    "repeat": ("grab", None),
    "drift": ("grab", None),
}
NEEDS_REOPEN = ("disconnect", "crash", "timeout")
DRIFT_FACTOR = 1.4
CACHED_FRAMES = 16
PREVIEW_WIDTH_PX = 480
BASE_EXPOSURE_S, BASE_ISO = 0.01, 100.0


class Fault(BaseModel):
    """`name` strikes the first `times` tries of frame `frame`, counted from 0 (for "open" and "lock_exposure" too)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    frame: int = Field(ge=0)
    times: int = Field(1, ge=1)

    @field_validator("name")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in FAULTS:
            raise ValueError(f"there is no fault '{value}'{did_you_mean(value, list(FAULTS))}")
        return value


class Behaviour(BaseModel):
    """What kind of camera is simulated; every field is an option of the `simulated:` URI.

    Attributes:
        width: the scene is resized to this many columns.
        max_coc_px: blur of the farthest point in the nearest frame; it fixes the lens.
        relative: focus is a motor that counts steps from the near stop; otherwise it is set in dioptres.
        steps: travel of the motor from stop to stop.
        curve: how far the map from steps to dioptres is from a straight line (-0.9 to 0.9); it stays monotone.
        backlash: play of the gear in steps; the lens follows exactly when approached from the near side.
        noise: noise of a white pixel in linear light (`capture.optics.Condition`).
        bits: 8 or 16 bits a channel.
        psf: shape of the aperture.
        breathing: relative change of image scale, and of blur with it, from the far to the near end of the range;
            f x (range in dioptres) for a lens that moves as a unit.
        drift: relative change of the lamp's brightness from frame to frame.
        latency_s: time that a picture takes.
        live_view: the lens moves only while live view is on.
        files: "none" hands over pixels; "jpeg" or "png" hand over a file as DSLRs do.
        seed: of noise.
        fault: what goes wrong: "disconnect@3,busy@5x2".
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    width: int = Field(320, ge=16, le=8192)
    max_coc_px: float = Field(16.0, gt=0, le=200)
    relative: bool = False
    steps: int = Field(1000, ge=10)
    curve: float = Field(0.3, ge=-0.9, le=0.9)
    backlash: float = Field(0.0, ge=0)
    noise: float = Field(0.0, ge=0, le=1)
    bits: Literal[8, 16] = 8
    psf: Psf = "disc"
    breathing: float = Field(0.0, ge=-0.2, le=0.2)
    drift: float = Field(0.0, ge=-0.5, le=0.5)
    latency_s: float = Field(0.0, ge=0)
    live_view: bool = False
    files: Literal["none", "jpeg", "png"] = "none"
    seed: int = 0
    fault: tuple[Fault, ...] = ()

    @field_validator("bits", mode="before")
    @classmethod
    def _bits_from_text(cls, value: object) -> object:
        return int(value) if isinstance(value, str) and value.isdigit() else value

    @field_validator("fault", mode="before")
    @classmethod
    def _faults_from_text(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        faults = []
        for text in value.split(","):
            match = re.fullmatch(r"(\w+)@(\d+)(?:x(\d+))?", text.strip())
            if match is None:
                raise ValueError(f"'{text}' is not NAME@FRAME or NAME@FRAMExTIMES")
            name, frame, times = match.groups()
            faults.append(Fault(name=name, frame=int(frame), times=int(times or 1)))
        return tuple(faults)


def simulated_camera(place: str, options: dict[str, str]) -> SimulatedCamera:
    """The camera of `simulated:PLACE?OPTIONS`; raises UsageError for a scene or an option that there is not."""
    try:
        behaviour = Behaviour.model_validate(options)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            text = f"there is no option '{name}'{did_you_mean(name, list(Behaviour.model_fields))}"
        else:
            text = f"option '{name}': {first['msg'].removeprefix('Value error, ')}, got {options.get(name)!r}"
        raise UsageError(f"camera 'simulated:{place}': {text}") from None
    return SimulatedCamera(named_scene(place, behaviour.width), behaviour=behaviour)


def named_scene(name: str, width: int) -> Scene:
    """Scene "motorcycle", "procedural-SEED", or of a folder, `width` pixels wide."""
    drawn = re.fullmatch(r"procedural-(\d+)", name)
    if drawn:
        return procedural_scene(int(drawn[1]), width * 3 // 4, width)
    if name == "motorcycle":
        scene = motorcycle()
    elif name and Path(name).is_dir():
        scene = load_scene(name)
    else:
        raise UsageError(
            f"camera 'simulated:{name}': the scene is motorcycle, procedural-SEED, or a folder with rgb.png and "
            f"depth.png, and {name!r} is none of these"
        )
    return scene.resized(round(scene.height * width / scene.width), width)


class SimulatedCamera:
    """`scene` seen by a camera of some `behaviour`.

    Args:
        scene: what stands before the camera.
        lens: its optics at the scene's size; by default chosen for `behaviour.max_coc_px`.
        near_dpt, far_dpt: focus settings at the lens's stops; by default a little beyond the scene's range.

    Blur is kappa_px_per_dpt(q_s) (q_s - q): as for any real lens of constant pupil, kappa is the diameter of the pupil
    times the focal length in px at which the frame shows the scene. `lens` predicts both for a lens that moves as a
    unit, and those agree when `behaviour.breathing` is that lens's own.
    """

    def __init__(
        self,
        scene: Scene,
        lens: Lens | None = None,
        behaviour: Behaviour | None = None,
        *,
        near_dpt: float | None = None,
        far_dpt: float | None = None,
    ) -> None:
        self.scene = scene
        self.behaviour = behaviour or Behaviour()
        fitting, focus_dpt = sweep_for_scene(scene, 2, self.behaviour.max_coc_px)
        self.lens = lens or fitting
        margin_dpt = 0.1 * float(focus_dpt[1] - focus_dpt[0])
        self.near_dpt = float(focus_dpt[1]) + margin_dpt if near_dpt is None else near_dpt
        self.far_dpt = max(float(focus_dpt[0]) - margin_dpt, 0.0) if far_dpt is None else far_dpt
        self._renderer: ApertureRenderer | None = None
        self._views: OrderedDict[float, NDArray[np.float32]] = OrderedDict()
        self._struck: dict[Fault, int] = {}
        self._rng = np.random.default_rng(self.behaviour.seed)
        self._frames_taken = 0
        self._last: Frame | None = None
        self._live_view = False
        self._open = False
        self._connected = False
        self._count: float | None = None  # what the driver believes; steps, None before home()
        self._motor = 0.35 * self.behaviour.steps  # where the gear stands, in steps from the near stop
        self._lens = self._motor  # where the glass stands: anywhere in the gear's play
        self._exposure = self._default_exposure()

    def open(self) -> CameraInfo:
        self._strike("open")
        self._open = self._connected = True
        self._live_view = False
        if self.behaviour.relative:
            self._count = None
        capabilities = Capabilities(
            focus="relative" if self.behaviour.relative else "absolute",
            focus_unit="step" if self.behaviour.relative else "dioptre",
            focus_readback=not self.behaviour.relative,
            needs_live_view=self.behaviour.live_view,
            preview=True,
            exposure_lock=True,
            end_stop_signal=True,
            backlash=self.behaviour.backlash if self.behaviour.relative else 0.0,
            settle_s=0.0,
        )
        return CameraInfo("daif", "simulated", "0001", "simulated", capabilities, self.lens)

    def lock_exposure(self, settings: ExposureSettings) -> ExposureSettings:
        self._check()
        self._strike("lock_exposure")
        if settings.f_number not in (None, self._exposure.f_number):
            raise ControlRejected(
                f"f/{settings.f_number:g} was asked for and this lens has a fixed f/{self._exposure.f_number:g}",
                stage="lock_exposure",
            )
        changed = {name: value for name, value in vars(settings).items() if value is not None}
        self._exposure = ExposureSettings(**{**vars(self._exposure), **changed})
        return self._exposure

    def set_live_view(self, on: bool) -> None:
        self._check()
        self._live_view = on

    def focus_range(self) -> FocusRange:
        self._check()
        if self.behaviour.relative:
            return FocusRange(0.0, float(self.behaviour.steps), 1.0, "step", "device")
        step_dpt = (self.near_dpt - self.far_dpt) / self.behaviour.steps
        return FocusRange(self.near_dpt, self.far_dpt, step_dpt, "dioptre", "device")

    def home(self, end: Literal["near", "far"] = "near") -> FocusReport:
        self._check()
        self._check_live_view()
        before = self._as_position(self._motor)
        self._drive(0.0 if end == "near" else float(self.behaviour.steps))
        self._count = self._motor
        at = self._as_position(self._motor)
        return FocusReport(at, at, True, time.time(), abs(before - at))  # counted until the stop answered

    def move_focus(self, target: float) -> FocusReport:
        self._check()
        self._check_live_view()
        limits = self.focus_range()
        if not limits.contains(target):
            raise FocusLimit(
                f"{target:g} is outside the lens's {limits.near:g} to {limits.far:g} {limits.unit}", stage="move_focus"
            )
        if self.behaviour.relative and self._count is None:
            raise FocusNotHomed("the position of the lens is not known before home()", stage="move_focus")
        stuck = self._strike("move_focus") == "stuck"
        if self.behaviour.relative:
            steps = round(target) - float(self._count or 0.0)
            self._count = float(round(target))
            stopped = not stuck and self._drive(self._motor + steps)
            return FocusReport(target, self._count, stopped, time.time())
        if not stuck:
            self._motor = self._lens = self._step_for(target)
        return FocusReport(target, self._as_position(self._motor), False, time.time())

    def position(self) -> float | None:
        self._check()
        if self.behaviour.relative:
            return self._count
        return self._as_position(self._motor)

    def grab(self, timeout_s: float) -> Frame:
        self._check()
        fault = self._strike("grab")
        started_s = time.time()
        if self.behaviour.latency_s > timeout_s:
            time.sleep(timeout_s)
            raise CameraTimeout(f"no picture within {timeout_s:g} s", stage="grab")
        time.sleep(self.behaviour.latency_s)
        if fault == "repeat" and self._last is not None:
            return self._last
        light = self._view() * np.float32(self._brightness() * (DRIFT_FACTOR if fault == "drift" else 1.0))
        if fault == "black":
            light = np.zeros_like(light)
        if fault == "wrong_size":
            light = np.ascontiguousarray(light[::2, ::2])
        image = expose(light, self._rng, self.behaviour.noise, self.behaviour.bits)
        if fault == "corrupt" and self.behaviour.files == "none":
            image = image[: image.shape[0] // 2]  # the transfer broke off
        originals = self._as_file(image, truncated=fault == "corrupt")
        focus_dpt = self._focus_dpt()
        frame = Frame(
            image=None if originals else image,
            transfer="srgb",
            white_level=float(np.iinfo(image.dtype).max),
            originals=originals,
            started_s=started_s,
            finished_s=time.time(),
            exposure_time_s=self._exposure.exposure_time_s or np.nan,
            f_number=self._exposure.f_number or np.nan,
            iso=self._exposure.iso or np.nan,
            focus_position=np.nan if self.behaviour.relative else focus_dpt,
            focus_distance_m=np.nan if self.behaviour.relative else dioptre_to_metre(focus_dpt),
            focus_distance_source="" if self.behaviour.relative else "simulated",
            metadata={"true_focus_dpt": focus_dpt},
        )
        self._frames_taken += 1
        self._last = frame
        return frame

    def preview(self) -> NDArray[np.uint8]:
        self._check()
        light = self._view() * np.float32(self._brightness())
        width = min(PREVIEW_WIDTH_PX, light.shape[1])
        size = (width, max(round(width * light.shape[0] / light.shape[1]), 1))
        return to_srgb8(cv2.resize(light, size, interpolation=cv2.INTER_AREA))

    def close(self) -> None:
        self._open = self._connected = False
        self._exposure = self._default_exposure()

    def __enter__(self) -> SimulatedCamera:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def focus_dpt_at(self, step: float) -> float:
        """Focus setting with the glass at `step` from the near stop: what a calibration should find."""
        share = step / self.behaviour.steps
        share += self.behaviour.curve * share * (1 - share)
        return self.near_dpt + share * (self.far_dpt - self.near_dpt)

    @property
    def focal_px(self) -> float:
        """Pinhole focal length in px at mid focus, where the scene is shown at its own scale."""
        middle_dpt = 0.5 * (self.near_dpt + self.far_dpt)
        return float(self.lens.image_distance_m(middle_dpt)) / self.lens.pixel_pitch_m

    def magnification(self, focus_dpt: float) -> float:
        """Image scale at `focus_dpt`, 1 at mid focus."""
        ends_dpt = np.array([self.far_dpt, self.near_dpt, focus_dpt])
        return float(breathing_magnification(ends_dpt, self.behaviour.breathing)[2])

    def kappa_px_per_dpt(self, focus_dpt: float) -> float:
        """Blur gain A F_i: the pupil keeps its size, and blur grows as the image does (design section 2)."""
        return self.lens.aperture_m * self.focal_px * self.magnification(focus_dpt)

    def _step_for(self, focus_dpt: float) -> float:
        """The inverse of `focus_dpt_at`."""
        steps = np.linspace(0, self.behaviour.steps, 4 * self.behaviour.steps + 1)
        shares = steps / self.behaviour.steps
        shares = shares + self.behaviour.curve * shares * (1 - shares)
        share = (self.near_dpt - focus_dpt) / (self.near_dpt - self.far_dpt)
        return float(np.interp(share, shares, steps))

    def _as_position(self, step: float) -> float:
        return step if self.behaviour.relative else self.focus_dpt_at(step)

    def _focus_dpt(self) -> float:
        return self.focus_dpt_at(self._lens)

    def _drive(self, target: float) -> bool:
        """Turn the gear to `target` or to the stop before it, and say whether it hit the stop; the glass follows."""
        steps = float(self.behaviour.steps)
        self._motor = min(max(target, 0.0), steps)
        self._lens = min(max(self._lens, self._motor), self._motor + self.behaviour.backlash, steps)
        if self._motor == 0.0:
            self._lens = 0.0  # the stop takes up the play
        return self._motor != target

    def _view(self) -> NDArray[np.float32]:
        """Noiseless linear light at the present focus."""
        focus_dpt = self._focus_dpt()
        if focus_dpt not in self._views:
            if self._renderer is None:
                ends = [self.kappa_px_per_dpt(end) for end in (self.near_dpt, self.far_dpt)]
                self._renderer = ApertureRenderer(self.scene, max(ends))
            kappa, magnification = self.kappa_px_per_dpt(focus_dpt), self.magnification(focus_dpt)
            view = self._renderer.frame(focus_dpt, kappa, psf=self.behaviour.psf, magnification=magnification)
            self._views[focus_dpt] = view
            if len(self._views) > CACHED_FRAMES:
                self._views.popitem(last=False)
        return self._views[focus_dpt]

    def _brightness(self) -> float:
        exposure = self._exposure
        gain = (exposure.exposure_time_s or BASE_EXPOSURE_S) / BASE_EXPOSURE_S * (exposure.iso or BASE_ISO) / BASE_ISO
        return gain * (1 + self.behaviour.drift) ** self._frames_taken

    def _default_exposure(self) -> ExposureSettings:
        return ExposureSettings(BASE_EXPOSURE_S, BASE_ISO, self.lens.f_number, "Daylight")

    def _as_file(self, image: NDArray[Any], *, truncated: bool) -> tuple[tuple[str, bytes], ...]:
        kind = self.behaviour.files
        if kind == "none":
            return ()
        if kind == "jpeg" and image.dtype == np.uint16:
            image = (image >> 8).astype(np.uint8)
        options = [cv2.IMWRITE_JPEG_QUALITY, 97] if kind == "jpeg" else []
        data = cv2.imencode(".jpg" if kind == "jpeg" else ".png", image[..., ::-1], options)[1].tobytes()
        name = f"SIM_{self._frames_taken:04d}.{'JPG' if kind == 'jpeg' else 'PNG'}"
        return ((name, data[: len(data) // 2] if truncated else data),)

    def _check(self) -> None:
        if not self._open:
            raise CameraClosed("the camera is not open, it needs open() first")
        if not self._connected:
            raise CameraDisconnected("the camera stopped answering", stage="any")

    def _check_live_view(self) -> None:
        if self.behaviour.live_view and not self._live_view:
            raise FocusNotReady("the lens does not move without live view", stage="move_focus")

    def _strike(self, stage: Stage) -> str | None:
        """The fault that is due now: raised if it is an error, else its name, else None."""
        for fault in self.behaviour.fault:
            due_stage, error = FAULTS[fault.name]
            if due_stage != stage or fault.frame != self._frames_taken or self._struck.get(fault, 0) >= fault.times:
                continue
            self._struck[fault] = self._struck.get(fault, 0) + 1
            if error is None:
                return fault.name
            self._connected = self._connected and fault.name not in NEEDS_REOPEN
            raise type(error)(error.message, stage=stage, native_text="simulated")
        return None
