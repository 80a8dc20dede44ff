"""Runs a `FocusSweep` on a camera into a focal stack that no fault short of a broken disk can take frames from.

Per frame: approach from the near side, wait until the picture stands still, take it, check it, store the camera's own
files and the pixels, and only then move on. Faults are retried as their class says (`CameraError.recovery`), at the
same frame, a bounded number of times; whatever happens, the lens goes back to where it stood, the camera is released
and the stack stays resumable. Procedure: notes/capture.md 2.2; errors: 7.2; manner of stopping: ecosystem.md 4.1.
"""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capture.cameras.base import (
    Camera,
    CameraBusy,
    CameraError,
    CameraInfo,
    CameraInUse,
    CameraNotFound,
    CorruptFrame,
    ExposureDrift,
    ExposureSettings,
    FocusRange,
    FocusReport,
    FocusStuck,
    Frame,
    HasCard,
    UnsupportedControl,
)
from capture.decode import Decoded, decode_image
from capture.errors import DataError, StoppedError, UsageError
from capture.exif import exif_block, from_sensor_plane, read_exif
from capture.lease import Lease
from capture.lens import Lens, LensProfile
from capture.output import check_output
from capture.plan import FocusSweep, place_frames
from capture.quality import (
    FrameSummary,
    is_duplicate,
    looks_unchanged,
    preview_change,
    summarise,
    tile_sharpness,
)
from capture.stack import FocalStack, StackWriter, check_free_space, check_unfinished, partial_path

logger = logging.getLogger(__name__)

BUSY_WAITS_S = (0.1, 0.2, 0.4, 0.8, 1.5, 2.0, 2.0, 2.0)  # 9 s in all
RETRY_WAITS_S = (0.2, 1.0, 2.0)  # one per attempt after the first
REOPEN_WAITS_S = (0.0, 1.0, 2.0, 4.0, 8.0)  # a body that was unplugged needs some seconds to appear again
STILL_POLL_S = 0.05
DRIFT_WARN, DRIFT_STOP = 0.05, 0.20  # relative change of mean linear brightness against the first frame
CLIPPED_WARN = 0.02
SAME_EXPOSURE = 0.06  # of a logarithm, as between what is asked of a camera and its nearest choice
UNCHANGED_STOP = 3  # moves in a row that changed nothing that could be seen
DARK_LEVEL = 1e-3


@dataclass(frozen=True)
class SweepOptions:
    """How to run a sweep.

    Attributes:
        exposure: what to lock; None entries keep what the camera has.
        settle_s: least wait after a move; None takes the camera's own.
        max_settle_s: longest wait for the picture to stand still.
        grab_timeout_s: longest wait for one picture, beyond its exposure time.
        allow_drift: keep frames whose brightness changed.
        prefer: which of the camera's files becomes the stack's frame when both are there.
        exif_distances: take the focus distance from the camera's files; coarse (notes/capture.md 2.3).
        board: description of the calibration board in the scene, stored in the stack.
        overwrite: replace an existing stack.
    """

    exposure: ExposureSettings = field(default_factory=ExposureSettings)
    settle_s: float | None = None
    max_settle_s: float = 3.0
    grab_timeout_s: float = 30.0
    allow_drift: bool = False
    prefer: str = "raw"
    exif_distances: bool = False
    board: dict[str, Any] | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class SweepProgress:
    """What a listener is told after every frame, and before the first (`index` -1)."""

    index: int
    n_done: int
    n_frames: int
    position: float
    unit: str
    focus_measure: tuple[float, ...]
    message: str = ""


@dataclass
class SweepResult:
    """A finished sweep: where it is, and what was noticed on the way."""

    path: Path
    n_frames: int
    seconds: float
    warnings: list[str] = field(default_factory=list)


class SweepInterrupted(StoppedError):
    """Before the end; the stack is resumable."""


class StopRequest:
    """First signal: finish the frame in hand; second: stop at once.

    Used as a context manager, which catches SIGINT and SIGTERM while it is active (main thread only).
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self.at_once = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.signal_number is not None

    def request(self) -> None:
        """Stop after the frame in hand, asked for by the program itself."""
        self.signal_number = signal.SIGINT

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None and not self.at_once:
            self.at_once = True
            raise KeyboardInterrupt
        if self.signal_number is None:
            self.signal_number = number
            logger.warning("finishing this frame; once more stops at once")


def run_sweep(
    camera: Camera,
    sweep: FocusSweep,
    path: Path,
    *,
    lens: Lens | LensProfile | None = None,
    options: SweepOptions | None = None,
    resume: bool = False,
    stop: StopRequest | None = None,
    on_progress: Callable[[SweepProgress], None] | None = None,
    prompt: Callable[[str], None] | None = None,
) -> SweepResult:
    """Take the frames of `sweep` into the stack `path`.

    Args:
        lens: a calibrated profile turns metres into motor steps; plain optics are stored for the record.
        resume: continue the partial stack of the same plan.
        stop: asked between frames whether to end early.
        prompt: shows the operator what to do and returns when it is done; needed for lenses turned by hand.

    Raises:
        CameraError: the camera could not be brought to take a frame; frames before it are safe.
        SweepInterrupted: `stop` was requested; the stack is resumable.
        UsageError, LockedError, DataError, NoSpaceError: as in `StackWriter`.
    """
    asked = StopRequest() if stop is None else stop
    return _Runner(camera, sweep, path, lens, options or SweepOptions(), asked, on_progress, prompt).run(resume)


def positions_for(
    sweep: FocusSweep, info: CameraInfo, limits: FocusRange | None, lens: Lens | LensProfile | None
) -> NDArray[np.float64]:
    """(S,) targets of `sweep` in the camera's own unit.

    Raises:
        UsageError: the plan and the camera do not speak of the same thing, or a frame lies outside the lens's range.
    """
    capabilities = info.capabilities
    unit = capabilities.focus_unit
    if sweep.spacing == "command":
        targets = np.array(list(sweep))
        if sweep.unit != unit:
            raise UsageError(
                f"the plan counts in {sweep.unit} and {info.model} in {unit}; plan with --unit {unit} or in metres"
            )
    elif capabilities.focus == "manual" or unit == "m":
        targets = sweep.focus_distance_m
    elif unit == "dioptre":
        targets = sweep.focus_dpt
    elif isinstance(lens, LensProfile):
        targets = np.asarray(lens.step_for(sweep.focus_dpt), np.float64)
    else:
        raise UsageError(
            f"the plan is in metres and {info.model} counts in {unit}: give --lens with the lens.yaml of a "
            f"calibration, or plan in its units (daif plan --positions 0:200:11 --unit {unit})"
        )
    if limits is not None:
        outside = [float(target) for target in targets if not limits.contains(float(target))]
        if outside:
            raise UsageError(
                f"the plan asks for {unit} {outside[0]:g} and this lens goes from {limits.near:g} to {limits.far:g}; "
                f"plan within that"
            )
    return targets


class _Runner:
    """One sweep in progress."""

    def __init__(
        self,
        camera: Camera,
        sweep: FocusSweep,
        path: Path,
        lens: Lens | LensProfile | None,
        options: SweepOptions,
        stop: StopRequest,
        on_progress: Callable[[SweepProgress], None] | None,
        prompt: Callable[[str], None] | None,
    ) -> None:
        self.camera, self.sweep, self.path, self.lens, self.options = camera, sweep, path, lens, options
        self.stop, self.on_progress, self.prompt = stop, on_progress, prompt
        self.info: CameraInfo | None = None
        self.limits: FocusRange | None = None
        self.targets = np.empty(0)
        self.writer: StackWriter | None = None
        self.start: float | None = None  # where the lens stood before us
        self.at: float | None = None  # where we sent it last; None when that is not known
        self.previews = False
        self.still_level = 0.0
        self.previous: FrameSummary | None = None
        self.odd_shape: tuple[int, ...] | None = None  # of the last picture that did not fit the others
        self.odd_drift: float | None = None
        self.stop_look: FrameSummary | None = None  # live view at the stop, until the lens has left it
        self.doubted_stop = False
        self.first_level: float | None = None
        self.sharpness: dict[int, float] = {}
        self.unchanged: list[int] = []
        self.white_balance: tuple[float, ...] | None = None  # of RAW files: every frame is developed like the first
        self.begun: Begun | None = None  # of a resumed stack, until it is compared with the camera
        self.warnings: list[str] = []
        self.early_events: list[tuple[str, dict[str, Any]]] = []  # of the time before there is a stack

    # --- the whole sweep

    def run(self, resume: bool) -> SweepResult:
        began = time.monotonic()
        with contextlib.ExitStack() as cleanup:
            if resume:
                self.sweep = planned(self.path, self.sweep)
                self.writer = cleanup.enter_context(StackWriter.resume(self.path, plan=self._plan_data()))
                self._continue(read_begun(self.path))
            else:
                self._check_target()
            cleanup.callback(self.camera.close)
            try:
                self._connect()
                cleanup.callback(self._return_lens)
                if self.sweep.spacing == "adaptive":
                    self.sweep = self._scout()
                    self.targets = positions_for(self.sweep, self._info, self.limits, self.lens)
                self._tell(-1, "")
                try:
                    self._take_all(cleanup)
                except _OddFirstFrame:
                    self._start_over()
                    self._take_all(cleanup)
                assert self.writer is not None
                final = self.writer.finish()
                if self.writer.distance_problem:
                    self.warnings.append(self.writer.distance_problem)
            except CameraError as error:
                if not error.outcome:
                    error.outcome = self._outcome()
                raise
            except KeyboardInterrupt:
                number = self.stop.signal_number or signal.SIGINT
                raise SweepInterrupted(f"stopped at once; {self._outcome()}", number) from None
        return SweepResult(final, len(self.sweep), time.monotonic() - began, self.warnings)

    def _continue(self, begun: Begun) -> None:
        """Take over what a resumed stack was begun with, and refuse another lens."""
        self.first_level, self.white_balance, self.begun = begun.first_level, begun.white_balance, begun
        if self.lens is None:
            self.lens = begun.lens
        elif self.lens != begun.lens:
            had = "no lens" if begun.lens is None else "another lens"
            raise UsageError(
                f"{partial_path(self.path)} was begun with {had}; resume without --lens, or start a new stack"
            )

    def _check_like_begun(self, info: CameraInfo, locked: ExposureSettings) -> None:
        """Refuse to continue a stack with another camera or another exposure."""
        begun, self.begun = self.begun, None
        if begun is None:
            return
        partial = partial_path(self.path)
        # a camera without a maker, such as a webcam, is named after its socket, which may change
        if info.make and begun.model not in ("", info.model):
            raise UsageError(
                f"{partial} was begun with the camera {begun.model} and this is {info.model}; connect that one, or "
                "start a new stack"
            )
        for name, option in (("exposure_time_s", "--exposure"), ("iso", "--iso"), ("f_number", "--f-number")):
            before, now = getattr(begun.exposure, name), getattr(locked, name)
            if before and now and abs(math.log(now / before)) > SAME_EXPOSURE:
                raise UsageError(
                    f"{partial} was begun with {name} {before:.4g} and the camera is at {now:.4g}; resume with "
                    f"{option} {before:.6g}, or start a new stack"
                )

    def _take_all(self, cleanup: contextlib.ExitStack) -> None:
        for index in self._order():
            self._stop_if_asked()
            self._take(index, cleanup)

    def _start_over(self) -> None:
        """The first frame, which set size and brightness of the stack, was the odd one: begin again without it."""
        assert self.writer is not None
        self.writer.discard()
        self.writer, self.previous, self.first_level = None, None, None
        self.sharpness.clear()
        self._event("started_over", reason="the first frame was unlike those after it")
        self._reopen_and_home(reopen=False)

    def _check_target(self) -> None:
        """Refuse before the camera moves what would be refused after the first picture."""
        check_output(self.path, overwrite=self.options.overwrite)
        with Lease(self.path):
            if not self.options.overwrite:
                check_unfinished(self.path)

    def _order(self) -> list[int]:
        """Frames still to take, from near to far, so that the lens is always approached from the near side."""
        pending = range(len(self.sweep)) if self.writer is None else self.writer.pending
        return sorted(pending, key=lambda index: self._direction() * self.targets[index])

    def _plan_data(self) -> dict[str, Any]:
        return self.sweep.model_dump(mode="json")

    @property
    def _info(self) -> CameraInfo:
        assert self.info is not None
        return self.info

    def _outcome(self) -> str:
        if self.writer is None:
            return "nothing was stored"
        done, total = self._n_done(), len(self.sweep)
        return f"{done} of {total} frames are safe in {self.writer.partial_path}, continue with --resume"

    def _n_done(self) -> int:
        return 0 if self.writer is None else len(self.sweep) - len(self.writer.pending)

    def _stop_if_asked(self) -> None:
        if self.stop:
            assert self.stop.signal_number is not None
            raise SweepInterrupted(f"stopped as asked; {self._outcome()}", self.stop.signal_number)

    def _tell(self, index: int, message: str) -> None:
        if self.on_progress is None:
            return
        measures = tuple(self.sharpness.get(i, math.nan) for i in range(len(self.sweep)))
        position = math.nan if index < 0 else float(self.targets[index])
        self.on_progress(
            SweepProgress(
                index,
                self._n_done(),
                len(self.sweep),
                position,
                self._info.capabilities.focus_unit,
                measures,
                message,
            )
        )

    def _warn(self, kind: str, sentence: str, **details: Any) -> None:
        logger.warning(sentence)
        self.warnings.append(sentence)
        self._event(kind, text=sentence, **details)

    def _event(self, kind: str, **details: Any) -> None:
        logger.info("%s %s", kind, details)
        if self.writer is None:
            self.early_events.append((kind, details))
        else:
            self.writer.event(kind, **details)

    # --- camera

    def _connect(self) -> None:
        """Open, lock, home; the lens stands at the near side afterwards."""
        self.info = self.camera.open()
        capabilities = self.info.capabilities
        if capabilities.focus == "manual":
            if self.prompt is None:
                raise UnsupportedControl(
                    f"the focus of {self.info.model} cannot be driven; run with --manual-focus, turn the ring by hand",
                    stage="open",
                )
        else:
            self.limits = self.camera.focus_range()
        self.targets = positions_for(self.sweep, self.info, self.limits, self.lens)
        locked = self.camera.lock_exposure(self.options.exposure)
        self._check_like_begun(self.info, locked)
        self._event("exposure_locked", **vars(locked))
        if capabilities.needs_live_view:
            self.camera.set_live_view(True)
        self.previews = capabilities.preview
        if self.previews:
            try:
                self.still_level = self._noise_of_previews()
            except UnsupportedControl:  # libgphoto2 claims live view for bodies that have none
                self.previews = False
        self.at = None
        if capabilities.focus == "manual":
            return
        before = self.camera.position()
        if capabilities.focus == "relative":
            before = self._home().travelled
        if self.start is None:
            self.start = before

    def _home(self) -> FocusReport:
        """Drive a relative lens to its near stop, where its count begins."""
        report = self.camera.home("near")
        self.at = self.limits.near if self.limits else 0.0
        self.stop_look = summarise(self.camera.preview(), "srgb", 255.0) if self.previews else None
        return report

    def _check_left_stop(self, target: float) -> None:
        """Steps lost on the first move would shift every frame after it unseen; doubted once, then only said."""
        look, self.stop_look = self.stop_look, None
        if look is None or self._at_end(target):
            return
        if not looks_unchanged(look, summarise(self.camera.preview(), "srgb", 255.0)):
            return
        if self.doubted_stop:
            self._warn("stop_unchanged", f"live view at {target:g} looks like at the stop: did the lens leave it?")
            return
        self.doubted_stop = True
        raise FocusStuck("live view looks as it did at the lens's stop", stage="move_focus")

    def _noise_of_previews(self) -> float:
        """Change between two previews of a lens that stands still."""
        first = self.camera.preview()
        time.sleep(STILL_POLL_S)
        return preview_change(first, self.camera.preview())

    def _return_lens(self) -> None:
        if self.stop.at_once or self.info is None or self.info.capabilities.focus == "manual":
            return
        target = self.start
        if target is None:
            logger.warning("where the lens stood before is not known; it is left at the first frame's position")
            target = float(self.targets[self._order_all()[0]]) if len(self.targets) else None
        try:
            if target is not None:
                self.camera.move_focus(self._clamped(target))
        except CameraError as error:
            logger.warning("the lens could not be returned: %s", error)

    def _order_all(self) -> list[int]:
        return sorted(range(len(self.targets)), key=lambda index: self._direction() * self.targets[index])

    def _direction(self) -> float:
        """+1 if positions grow from near to far, else -1."""
        if self.limits is None:
            return 1.0
        return 1.0 if self.limits.far > self.limits.near else -1.0

    def _clamped(self, position: float) -> float:
        if self.limits is None:
            return position
        low, high = sorted((self.limits.near, self.limits.far))
        return min(max(position, low), high)

    def _approach(self, target: float) -> FocusReport:
        """Move to `target`, the last part always towards far, so that the gear's play is always on the same side."""
        play = self._info.capabilities.backlash
        direction = self._direction()
        if play > 0 and (self.at is None or direction * (target - self.at) < 0):
            self.at = None
            self.camera.move_focus(self._clamped(target - direction * 2.0 * play))
        report = self.camera.move_focus(target)
        self.at = target
        if report.at_limit and not self._at_end(target):
            raise FocusStuck(f"the lens met its stop on the way to {target:g}", stage="move_focus")
        tolerance = max(1.0 * (self.limits.step if self.limits else 0.0), 1e-9)
        if self._info.capabilities.focus_readback and report.position is not None:
            miss = abs(report.position - target)
            if miss > 2.0 * tolerance and miss > 0.02 * abs(self._span()):
                raise FocusStuck(f"the lens stands at {report.position:g} instead of {target:g}", stage="move_focus")
        return report

    def _span(self) -> float:
        return self.limits.far - self.limits.near if self.limits else 0.0

    def _at_end(self, target: float) -> bool:
        limits = self.limits
        return limits is None or min(abs(target - limits.near), abs(target - limits.far)) <= 0.02 * abs(self._span())

    def _settle(self) -> float:
        """Wait until the picture stands still; seconds waited."""
        capabilities = self._info.capabilities
        began = time.monotonic()
        time.sleep(capabilities.settle_s if self.options.settle_s is None else self.options.settle_s)
        if not self.previews:
            return time.monotonic() - began
        limit = 1.5 * self.still_level + 0.3
        before = self.camera.preview()
        while time.monotonic() - began < self.options.max_settle_s:
            time.sleep(STILL_POLL_S)
            after = self.camera.preview()
            if preview_change(before, after) <= limit:
                return time.monotonic() - began
            before = after
        self._event("not_still", seconds=self.options.max_settle_s)
        return time.monotonic() - began

    # --- one frame

    def _take(self, index: int, cleanup: contextlib.ExitStack) -> None:
        """Take and store frame `index`, with as many attempts as its errors allow."""
        busy = iter(BUSY_WAITS_S)
        retries = iter(RETRY_WAITS_S)
        looked_again, at_stop = False, None
        while True:
            try:
                report, settle_s, frame = self._expose(index)
                image = self._decode(frame)
                summary = self._check(index, frame, image)
                if at_stop is not None and looks_unchanged(at_stop, summary):
                    raise _Stuck("the lens does not leave its stop", stage="check")
                if self._is_unchanged(summary) and not looked_again:
                    looked_again = True
                    self._event("focus_unchanged", frame=index)
                    at_stop = self._look_at_stop(index)
                    continue
                self._store(index, report, settle_s, frame, image, summary, cleanup)
                break
            except CameraError as error:
                error.where = f"frame {index + 1} of {len(self.sweep)}"
                self._event("retry", frame=index, error=type(error).__name__, text=error.message, stage=error.stage)
                wait_s = next(busy if isinstance(error, CameraBusy) else retries, None)
                if error.recovery == "stop" or wait_s is None:
                    raise
                logger.info("%s: trying again", error)
                time.sleep(wait_s)
                self._recover(error)
        self._delete_from_card(frame)

    def _delete_from_card(self, frame: Frame) -> None:
        """Let the camera forget a picture that is stored here; one that it cannot delete stays on its card."""
        if not (frame.on_card and isinstance(self.camera, HasCard)):
            return
        try:
            self.camera.delete_from_card(frame.on_card)
        except CameraError as error:
            names = ", ".join(name for _, name in frame.on_card)
            self._warn("not_deleted", f"{names} may still be on the camera's card: {error}")
            self._recover(error)

    def _recover(self, error: CameraError) -> None:
        self._stop_if_asked()
        if error.recovery == "live_view":
            self.camera.set_live_view(True)
        elif error.recovery == "reopen":
            self._reopen_and_home(reopen=True)

    def _reopen_and_home(self, *, reopen: bool) -> None:
        """Bring the lens back to a known position; with `reopen` from a new connection."""
        if self._info.capabilities.focus == "manual" and not reopen:
            return
        if not reopen:
            if self._info.capabilities.focus == "relative":
                self._home()
            else:
                self.at = None
            return
        for attempt, wait_s in enumerate(REOPEN_WAITS_S, 1):
            time.sleep(wait_s)
            self._stop_if_asked()
            self.camera.close()
            try:
                self._connect()
                self._event("reconnected", attempt=attempt)
                return
            except CameraError as error:
                # a desktop grabs a camera that appears on USB; it often lets go a moment later
                gone = error.recovery in ("reopen", "retry") or isinstance(error, CameraNotFound | CameraInUse)
                if not gone or attempt == len(REOPEN_WAITS_S):
                    raise

    def _look_at_stop(self, index: int) -> FrameSummary | None:
        """Home a lens that seems not to move and see what its stop looks like; None where that tells nothing."""
        self._reopen_and_home(reopen=False)
        if self._info.capabilities.focus != "relative" or self._at_end(float(self.targets[index])):
            return None
        self._settle()
        image = self._decode(self.camera.grab(self._grab_timeout_s()))
        look = summarise(image.pixels, image.transfer, image.white_level)
        old = self.previous is not None and is_duplicate(self.previous, look)  # a buffer delivered twice
        return None if old else look

    def _grab_timeout_s(self) -> float:
        return self.options.grab_timeout_s + (self.options.exposure.exposure_time_s or 0.0)

    def _expose(self, index: int) -> tuple[FocusReport, float, Frame]:
        target = float(self.targets[index])
        if self._info.capabilities.focus == "manual":
            assert self.prompt is not None
            self.prompt(self._instruction(index))
            report = FocusReport(target, None, finished_s=time.time())
        else:
            report = self._approach(target)
        settle_s = self._settle()
        self._check_left_stop(target)
        frame = self.camera.grab(self._grab_timeout_s())
        return report, settle_s, frame

    def _instruction(self, index: int) -> str:
        target = float(self.targets[index])
        where = (
            f"{target:.3g}"
            if self.sweep.spacing == "command"
            else "infinity"
            if math.isinf(target)
            else f"{target:.3g} m"
        )
        return f"frame {index + 1} of {len(self.sweep)}: turn the focus ring to {where}"

    def _decode(self, frame: Frame) -> Decoded:
        """Pixels of the frame, from the camera itself or from its preferred file."""
        if frame.image is not None:
            image = frame.image if frame.image.ndim == 3 else frame.image[..., None]
            if frame.transfer == "unknown":
                raise CorruptFrame("the camera does not say how its values relate to light", stage="decode")
            return Decoded(image, frame.transfer, frame.white_level)
        if not frame.originals:
            raise CorruptFrame("the camera delivered no picture", stage="decode")
        jpeg = [item for item in frame.originals if item[0].lower().endswith((".jpg", ".jpeg"))]
        name, data = (jpeg or frame.originals)[0] if self.options.prefer == "jpeg" else frame.originals[0]
        try:
            decoded = decode_image(data, name=name, white_balance=self.white_balance)
            return decoded if frame.transfer == "unknown" else decoded._replace(transfer=frame.transfer)
        except DataError as error:
            raise CorruptFrame(
                f"{name} ({len(data)} bytes) cannot be decoded", stage="decode", native_text=str(error)
            ) from None

    def _check(self, index: int, frame: Frame, image: Decoded) -> FrameSummary:
        """Refuse a frame that is damaged, black, of another size, or of another brightness."""
        summary = summarise(image.pixels, image.transfer, image.white_level)
        if self.writer is not None:
            expected = (self.writer.height, self.writer.width, self.writer.channels)
            if image.pixels.shape != expected or image.pixels.dtype != self.writer.dtype:
                if self.odd_shape == image.pixels.shape and self._n_done() == 1:
                    raise _OddFirstFrame("the first frame had another size", stage="check")
                self.odd_shape = image.pixels.shape
                raise CorruptFrame(
                    f"the picture is {image.pixels.shape} {image.pixels.dtype} and the others are {expected} "
                    f"{self.writer.dtype}",
                    stage="check",
                )
        if summary.is_flat or summary.mean_level < DARK_LEVEL:
            raise CorruptFrame("the picture is black or has no structure at all: is the cap on?", stage="check")
        if self.previous is not None and is_duplicate(self.previous, summary):
            raise FocusStuck("the picture is identical to the one before, to the last bit", stage="check")
        if self.first_level is not None:
            drift = summary.mean_level / self.first_level - 1.0
            if abs(drift) > DRIFT_STOP and not self.options.allow_drift:
                if self.odd_drift is not None and abs(drift - self.odd_drift) < DRIFT_WARN and self._n_done() == 1:
                    raise _OddFirstFrame("the first frame had another brightness", stage="check")
                self.odd_drift = drift
                raise ExposureDrift(f"the brightness changed by {drift:+.0%} against the first frame", stage="check")
            if abs(drift) > DRIFT_WARN:
                self._warn("drift", f"frame {index + 1}: brightness {drift:+.1%} against the first frame", frame=index)
        if summary.clipped_fraction > CLIPPED_WARN:
            share = summary.clipped_fraction
            self._warn("clipped", f"frame {index + 1}: {share:.0%} of the picture is over-exposed", frame=index)
        return summary

    def _is_unchanged(self, summary: FrameSummary) -> bool:
        return self.previous is not None and looks_unchanged(self.previous, summary)

    def _store(
        self,
        index: int,
        report: FocusReport,
        settle_s: float,
        frame: Frame,
        image: Decoded,
        summary: FrameSummary,
        cleanup: contextlib.ExitStack,
    ) -> None:
        if self.writer is None:
            self.writer = cleanup.enter_context(self._create(frame, image))
            for kind, details in self.early_events:
                self.writer.event(kind, **details)
        self.white_balance = self.white_balance or image.white_balance
        if self._is_unchanged(summary):
            self.unchanged.append(index)
            self._warn(
                "focus_unchanged", f"frame {index + 1} looks like the one before: did the lens move?", frame=index
            )
            if len(self.unchanged) >= UNCHANGED_STOP:
                for earlier in self.unchanged[:-1]:
                    self.writer.fail(earlier, "the focus did not change")
                raise _Stuck(f"{UNCHANGED_STOP} moves in a row changed nothing in the picture", stage="check")
        else:
            self.unchanged.clear()
        distance_m, source = self._distance(index, report, frame)
        self.writer.append(
            index,
            image.pixels,
            focus_distance_m=distance_m,
            focus_distance_source=source,
            focus_command=report.commanded,
            focus_position=frame.focus_position if report.position is None else report.position,
            exposure_time_s=frame.exposure_time_s,
            f_number=frame.f_number,
            iso=frame.iso,
            timestamp_s=frame.started_s,
            settle_time_s=settle_s,
            focus_measure=summary.focus_measure,
            metadata=frame.metadata,
            originals=frame.originals,
        )
        self.previous = summary
        if self.first_level is None:
            self.first_level = summary.mean_level
        self.sharpness[index] = summary.focus_measure
        self._tell(index, "")

    def _distance(self, index: int, report: FocusReport, frame: Frame) -> tuple[float, str]:
        """Distance of the plane of focus and where it is known from; NaN and "" if it is not."""
        if not math.isnan(frame.focus_distance_m):
            return frame.focus_distance_m, frame.focus_distance_source or "reported"
        if self.options.exif_distances and frame.originals:
            exif = read_exif(frame.originals[-1][1], name=frame.originals[-1][0])
            return from_sensor_plane(exif.focus_distance_m, exif.focal_length_m), "exif"
        capabilities = self._info.capabilities
        position = report.commanded if report.position is None else report.position
        if isinstance(self.lens, LensProfile) and capabilities.focus_unit in ("step", "driver"):
            return _metres(float(self.lens.focus_dpt(position))), "calibrated"
        if capabilities.focus == "manual" and self.sweep.spacing != "command":
            return float(self.sweep.focus_distance_m[index]), "operator"
        if capabilities.focus_unit == "dioptre":
            return _metres(position), "reported"
        return math.nan, ""

    def _create(self, frame: Frame, image: Decoded) -> StackWriter:
        """The stack, made when the first picture has shown its size; the whole sweep must fit on the disk."""
        height, width, channels = image.pixels.shape
        originals = sum(len(data) for _, data in frame.originals)
        needed = len(self.sweep) * (image.pixels.nbytes + originals)
        check_free_space(self.path.parent, needed, self.path)
        info = self._info
        lens = self.lens if isinstance(self.lens, Lens) else info.lens or self.sweep.lens
        camera: dict[str, Any] = {
            "make": info.make,
            "model": info.model,
            "serial_number": info.serial,
            "driver": info.driver,
        }
        if image.white_balance:
            camera["raw_white_balance"] = image.white_balance
        return StackWriter.create(
            self.path,
            n_frames=len(self.sweep),
            height=height,
            width=width,
            channels=channels,
            dtype=image.pixels.dtype,
            transfer=image.transfer,
            white_level=image.white_level,
            focus_unit=info.capabilities.focus_unit,
            lens=lens,
            camera=camera,
            profile_yaml=self.lens.to_yaml() if isinstance(self.lens, LensProfile) else None,
            plan=self._plan_data(),
            board=self.options.board,
            exif=image.exif or next((block for _, data in frame.originals if (block := exif_block(data))), None),
            overwrite=self.options.overwrite,
        )

    # --- adaptive plans

    def _scout(self) -> FocusSweep:
        """Look quickly through the range and place the frames where something becomes sharp."""
        near_m, far_m = self.sweep.near_m, self.sweep.far_m
        coarse = FocusSweep(near_m=near_m, far_m=far_m, count=self.sweep.scout_count)
        targets = positions_for(coarse, self._info, self.limits, self.lens)
        measures = []
        for target in targets:
            self._stop_if_asked()
            self._approach(float(target))
            self._settle()
            measures.append(tile_sharpness(self._look()))
        sweep = place_frames(coarse.focus_dpt, np.array(measures), self.sweep.count, lens=self.lens or self.sweep.lens)
        self._tell(-1, f"adaptive: {len(sweep)} frames from {sweep.focus_distance_m[0]:.3g} m")
        return sweep

    def _look(self) -> NDArray[np.float32]:
        """Reduced green channel of what the camera sees now, from live view where there is one."""
        if self.previews:
            return summarise(self.camera.preview(), "srgb", 255.0).green
        image = self._decode(self.camera.grab(self._grab_timeout_s()))
        return summarise(image.pixels, image.transfer, image.white_level).green


class _Stuck(FocusStuck):
    """Stuck for good: re-homing was tried for every one of the frames."""

    recovery = "stop"


class _OddFirstFrame(CameraError):
    """Two pictures agree with each other and not with the only frame stored so far."""


def _metres(dioptre: float) -> float:
    return math.inf if dioptre <= 0 else 1.0 / dioptre


def stored_plan(path: Path) -> FocusSweep:
    """The plan that the partial stack of `path` was begun with; `DataError` if there is none."""
    with FocalStack.open(partial_path(path), allow_partial=True) as stack:
        if stack.plan is None:
            raise DataError(f"{stack.path} does not say which plan it was begun with; give --plan")
        return FocusSweep.model_validate(stack.plan)


def planned(path: Path, sweep: FocusSweep) -> FocusSweep:
    """The plan that the partial stack of `path` was begun with, if it stems from `sweep`.

    An adaptive plan is stored as the explicit one that it became on site; any other must be the same.
    """
    return stored_plan(path) if sweep.spacing == "adaptive" else sweep


@dataclass(frozen=True)
class Begun:
    """What an unfinished stack was begun with, which the rest of it must share.

    `first_level` is the mean linear brightness of its first frame and `white_balance` the gains of its RAW files, None
    if there are none.
    """

    model: str
    lens: Lens | LensProfile | None
    exposure: ExposureSettings
    first_level: float | None
    white_balance: tuple[float, ...] | None


def read_begun(path: Path) -> Begun:
    """What the partial stack of `path` was begun with."""
    with FocalStack.open(partial_path(path), allow_partial=True) as stack:
        level = None
        if stack.n_frames:
            level = summarise(stack.raw(0), stack.transfer, stack.white_level).mean_level
        locked: dict[str, Any] = {}
        with contextlib.suppress(DataError):  # the log of a process that was killed may end within a line
            locked = next((event for event in stack.events if event["kind"] == "exposure_locked"), {})
        gains = stack.camera.get("raw_white_balance")
        return Begun(
            str(stack.camera.get("model", "")),
            stack.profile or stack.lens,
            ExposureSettings(**{name: locked.get(name) for name in ("exposure_time_s", "iso", "f_number")}),
            level,
            tuple(gains) if isinstance(gains, list) else None,
        )


# --- following a sweep that is still being captured


@dataclass(frozen=True)
class StackState:
    """What can be read of a stack right now: `path` is the partial file until `complete`."""

    path: Path
    n_frames: int
    n_planned: int
    complete: bool


def follow(path: Path, *, poll_s: float = 0.3, idle_s: float = 120.0) -> Iterator[StackState]:
    """The state of the stack `path` each time frames were committed to it; the last state is complete.

    Ends without a complete state when nothing was added for `idle_s` (the sweep was stopped or its process died).
    """
    seen, last = -1, time.monotonic()
    while True:
        state = _state(path)
        if state is not None and (state.n_frames > seen or state.complete):
            seen, last = state.n_frames, time.monotonic()
            yield state
            if state.complete:
                return
        if time.monotonic() - last > idle_s:
            return
        time.sleep(poll_s)


def _state(path: Path) -> StackState | None:
    """The readable state, None while there is nothing to read or the writer is in the middle of a write."""
    for candidate in (path, partial_path(path)):
        if not candidate.exists():
            continue
        with contextlib.suppress(DataError), FocalStack.open(candidate, allow_partial=True) as stack:
            return StackState(candidate, stack.n_frames, stack.n_planned, stack.complete)
    return None
