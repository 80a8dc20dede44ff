"""The camera of a session: one thread that alone talks to it, live view while idle, sweeps on command.

Everybody else reads the attributes and posts commands; nobody waits for the camera. A camera error becomes a sentence
in `problem` and the camera is let go; `connect` tries again.
"""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from capture.cameras.base import (
    Camera,
    CameraBusy,
    CameraError,
    CameraInfo,
    ExposureSettings,
    FocusRange,
    Frame,
    UnsupportedControl,
)
from capture.decode import to_linear, to_srgb8
from capture.errors import DaifError, NoSpaceError
from capture.plan import FocusSweep, Optic
from capture.stack import partial_path
from capture.sweep import StopRequest, SweepInterrupted, SweepOptions, SweepProgress, run_sweep
from reconstruct.session_folder import SessionFolder

logger = logging.getLogger(__name__)

LIVE_PERIOD_S = 1 / 15
LIVE_WIDTH_PX = 960
THUMBNAIL_PX = 240
COMMANDS_WAITING = 16
STOP_WAIT_S = 40.0  # the frame in hand may be a long exposure


@dataclass
class SweepView:
    """A sweep as the page shows it."""

    take: int
    n_frames: int
    n_done: int = 0
    sharpness: list[float] = field(default_factory=list)
    positions: list[float] = field(default_factory=list)
    message: str = ""
    began: float = field(default_factory=time.monotonic)


class CameraThread:
    """Runs `camera` for a session.

    Args:
        changed: called, from this thread, whenever an attribute has changed.
        pictured: called with every live-view picture as JPEG.
        captured: called with the take's number after every stored frame and when the take is complete.
    """

    def __init__(
        self,
        camera: Camera,
        folder: SessionFolder,
        optic: Optic | None,
        options: SweepOptions,
        *,
        changed: Callable[[], None],
        pictured: Callable[[bytes], None],
        captured: Callable[[int, bool], None],
    ) -> None:
        self.folder, self.optic, self.options = folder, optic, options
        self.changed, self.pictured, self.captured = changed, pictured, captured
        self.camera: Any = _Held(camera, self._show, self._keep)
        self.state = "connecting"
        self.problem: str | None = None
        self.info: CameraInfo | None = None
        self.limits: FocusRange | None = None
        self.position: float | None = None
        self.exposure: ExposureSettings | None = None
        self.exposure_note = ""
        self.battery: str | None = None
        self.image_shape: tuple[int, int] | None = None
        self.seconds_per_frame = 2.5
        self.live = False
        self.sweep: SweepView | None = None
        self.question: str | None = None
        self.thumbnails: dict[tuple[int, int], bytes] = {}
        self.watched: Callable[[], bool] = lambda: False
        self._commands: queue.Queue[Callable[[], None]] = queue.Queue(COMMANDS_WAITING)
        self._wanted: float | None = None
        self._moving_to: float | None = None
        self._stop: StopRequest | None = None
        self._answered = threading.Event()
        self._quit = threading.Event()
        self._homed = False
        self._last_frame: Frame | None = None
        self._last_live: NDArray[np.uint8] | None = None
        self._told_live = 0.0
        self._thread = threading.Thread(target=self._run, name="camera", daemon=True)

    # --- what others may call

    def start(self) -> None:
        self._post(self._connect)
        self._thread.start()

    def close(self) -> None:
        """Stop after the frame in hand and let the camera go."""
        self._quit.set()
        self.stop()
        self._thread.join(STOP_WAIT_S)

    def connect(self) -> bool:
        return self._post(self._connect)

    def focus(self, position: float) -> None:
        """Move to `position` (camera unit); a newer wish replaces one that has not begun."""
        if self.limits is not None:
            low, high = sorted((self.limits.near, self.limits.far))
            self._wanted = min(max(position, low), high)

    @property
    def aim(self) -> float | None:
        """Where the lens is going, or stands; what a mark means, however fast the keys are pressed."""
        wanted = self._wanted if self._wanted is not None else self._moving_to
        return self.position if wanted is None else wanted

    def nudge(self, share: float) -> None:
        """Move by `share` of the lens's travel, positive towards far."""
        if self.limits is None:
            return
        start = self.limits.near if self.aim is None else self.aim
        step = share * (self.limits.far - self.limits.near)
        if abs(step) < self.limits.step:
            step = math.copysign(self.limits.step, step)
        self.focus(start + step)

    def take(self, sweep: FocusSweep, optic: Optic | None, f_number: float | None) -> bool:
        """Begin a new take; False while another is under way."""
        return self._sweep_soon(lambda: self._sweep(None, sweep, optic, f_number))

    def resume(self, number: int, sweep: FocusSweep, optic: Optic | None, f_number: float | None) -> bool:
        """Continue an unfinished take."""
        return self._sweep_soon(lambda: self._sweep(number, sweep, optic, f_number, resume=True))

    def stop(self) -> None:
        """Stop the sweep after the frame in hand, or before its first one."""
        if self._stop is not None:
            self._stop.request()
            self._answered.set()

    def answer(self) -> None:
        """The operator has done what `question` asks."""
        self._answered.set()

    # --- the thread

    def _post(self, command: Callable[[], None]) -> bool:
        try:
            self._commands.put_nowait(command)
        except queue.Full:
            return False
        return True

    def _sweep_soon(self, command: Callable[[], None]) -> bool:
        if self.state != "idle":
            return False
        self._stop = StopRequest()  # already now: who presses Stop does not wait for the camera's thread
        self._set(state="starting")
        posted = self._post(command)
        if not posted:
            self._stop = None
            self._set(state="idle")
        return posted

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            setattr(self, name, value)
        self.changed()

    def _run(self) -> None:
        try:
            while not self._quit.is_set():
                began = time.monotonic()
                self._step()
                with contextlib.suppress(queue.Empty):
                    self._guarded(self._commands.get(timeout=max(0.005, LIVE_PERIOD_S + began - time.monotonic())))
        finally:
            self.camera.let_go()

    def _step(self) -> None:
        if self.info is None:
            return
        if self._wanted is not None:
            self._guarded(self._move)
        elif self.live and self.watched():
            self._guarded(self._look)

    def _guarded(self, command: Callable[[], None]) -> None:
        """Run `command`; whatever goes wrong becomes a sentence, and the thread goes on."""
        try:
            command()
        except DaifError as error:
            self._failed(sentence(error))
        except Exception as error:
            logger.exception("camera thread")
            self._failed(f"this is a bug in daif: {type(error).__name__}: {error}")

    def _failed(self, text: str) -> None:
        self.folder.log(f"camera: {text}")
        self.camera.let_go()
        self._wanted, self._stop = None, None
        self._set(state="gone", problem=text, info=None, live=False, sweep=None, question=None)

    def _connect(self) -> None:
        self._set(state="connecting", problem=None)
        self.camera.let_go()
        info = self.camera.open()
        limits = None if info.capabilities.focus == "manual" else self.camera.focus_range()
        self._lock(self.options.exposure)
        live = info.capabilities.preview
        if live or info.capabilities.needs_live_view:
            try:
                self.camera.set_live_view(True)
                if live:
                    self.camera.preview()
            except UnsupportedControl:  # some drivers claim live view for bodies that have none
                live = False
        self._homed = info.capabilities.focus != "relative"
        position = self.camera.position() if self._homed else None
        first = self.info is None
        self._set(state="idle", info=info, limits=limits, live=live, position=position, battery=info.battery)
        if first:
            self.folder.log(f"camera: {info.make} {info.model} connected")

    def _lock(self, wanted: ExposureSettings) -> None:
        try:
            self.exposure, self.exposure_note = self.camera.lock_exposure(wanted), ""
        except UnsupportedControl as error:
            self.exposure, self.exposure_note = None, error.message

    def _move(self) -> None:
        if not self._homed:
            self.camera.home("near")
            self._homed = True
        target = self._moving_to = self._wanted
        self._wanted = None
        assert target is not None
        try:
            report = self.camera.move_focus(target)
        finally:
            self._moving_to = None
        self._set(position=report.commanded if report.position is None else report.position)

    def _look(self) -> None:
        try:
            self.camera.preview()
        except CameraBusy:
            pass
        except UnsupportedControl:
            self._set(live=False)

    # --- sweeps

    def _sweep(
        self,
        number: int | None,
        sweep: FocusSweep,
        optic: Optic | None,
        f_number: float | None,
        *,
        resume: bool = False,
    ) -> None:
        """Take `number`, None for a new one, as `_sweep_soon` has accepted it."""
        stop = self._stop
        if stop is None:  # the camera was lost meanwhile
            return
        if stop or self._quit.is_set():
            self._stop = None
            self._set(state="idle")
            return
        try:
            number = self.folder.begin(len(sweep)).number if number is None else number
        except DaifError as error:
            self._stop = None
            self._set(state="idle", problem=str(error))
            return
        exposure = self.options.exposure if f_number is None else replace(self.options.exposure, f_number=f_number)
        begun = time.monotonic()
        self.folder.update(number, status="capturing", problem="")
        self.folder.log(f"take {number:03d}: {'resumed' if resume else 'started'}, {len(sweep)} frames")
        self._set(state="sweeping", problem=None, sweep=SweepView(number, len(sweep)))
        problem: str | None = None
        try:
            found = run_sweep(
                self.camera,
                sweep,
                self.folder.stack(number),
                lens=optic,
                options=replace(self.options, exposure=exposure),
                resume=resume,
                stop=stop,
                on_progress=lambda progress: self._progress(number, progress),
                prompt=self._ask,
            )
        except SweepInterrupted:
            problem = "stopped"
        except NoSpaceError:
            problem = "the disk is full: free some space"
        except DaifError as error:
            problem = sentence(error)
        except OSError as error:
            problem = str(self.folder.unusable(error))
        except Exception as error:
            logger.exception("sweep")
            problem = f"this is a bug in daif: {type(error).__name__}: {error}"
        self._stop = None
        view, self.sweep, self.question = self.sweep, None, None
        done = 0 if view is None else view.n_done
        if problem is None:
            self.seconds_per_frame = found.seconds / max(found.n_frames, 1)
            self.folder.update(
                number, status="complete", frames=found.n_frames, seconds=found.seconds, warnings=found.warnings
            )
            self.folder.log(f"take {number:03d}: {found.n_frames} frames in {found.seconds:.1f} s")
            self.captured(number, True)
        elif partial_path(self.folder.stack(number)).exists():
            text = f"{problem}; {done} of {len(sweep)} frames are safe, Resume takes the others"
            self.folder.update(number, status="unfinished", frames=done, seconds=time.monotonic() - begun, problem=text)
            self.folder.log(f"take {number:03d}: {text}")
        else:
            self.folder.drop(number)
            self.folder.log(f"take {number:03d}: {problem}; nothing was stored")
        if problem not in (None, "stopped") or f_number is not None or not self._kept():
            self._connect()  # anew, which also puts back the settings that the sweep changed
            if problem not in (None, "stopped"):
                self._set(problem=problem)

    def _kept(self) -> bool:
        """Go on with the sweep's own connection, if the camera still answers."""
        self.camera.keep()
        try:
            position = self.camera.position()
        except CameraError:
            return False
        assert self.info is not None
        self._homed = self.info.capabilities.focus != "relative" or position is not None
        self._set(state="idle", position=position)
        return True

    def _progress(self, number: int, progress: SweepProgress) -> None:
        view = self.sweep
        if view is None:
            return
        view.n_done, view.n_frames, view.message = progress.n_done, progress.n_frames, progress.message
        view.sharpness = list(progress.focus_measure)
        if progress.index >= 0:
            self.thumbnails[number, progress.index] = self._thumbnail()
            self.folder.update(number, frames=progress.n_done)
            self.captured(number, False)
        self._set(position=progress.position if math.isfinite(progress.position) else self.position)

    def _ask(self, text: str) -> None:
        self._answered.clear()
        self._set(question=text)
        while not self._answered.wait(LIVE_PERIOD_S):
            if self.live:  # the operator turns the ring by what is to be seen here
                self._look()
        self._set(question=None)
        if self._stop:
            raise SweepInterrupted("stopped while waiting for the focus ring", signal.SIGINT)

    # --- pictures

    def _show(self, picture: NDArray[np.uint8]) -> None:
        """Hand on a live-view picture, at most as often as the page is redrawn."""
        self._last_live = picture
        now = time.monotonic()
        if now - self._told_live < 0.8 * LIVE_PERIOD_S:
            return
        self._told_live = now
        self.pictured(_jpeg(_shrunk(picture, LIVE_WIDTH_PX)))

    def _keep(self, frame: Frame) -> None:
        self._last_frame = frame
        self.battery = frame.metadata.get("batterylevel", self.battery)

    def _thumbnail(self) -> bytes:
        """The frame just stored, small: from its pixels, its JPEG, or (RAW only) the live view of that moment."""
        frame = self._last_frame
        assert frame is not None
        picture: NDArray[np.uint8] | None = None
        if frame.image is not None:
            picture = _as_srgb(frame)
            self.image_shape = frame.image.shape[0], frame.image.shape[1]
        else:
            files = (data for name, data in frame.originals if name.lower().endswith((".jpg", ".jpeg", ".png")))
            jpeg = next(files, b"")
            if jpeg:
                found = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_REDUCED_COLOR_4)
                picture = None if found is None else np.ascontiguousarray(found[..., ::-1])
        if picture is None:
            picture = self._last_live if self._last_live is not None else np.zeros((2, 3, 3), np.uint8)
        small = _shrunk(picture, THUMBNAIL_PX)
        if not self.live:  # the frame is all there is to see
            self._show(_shrunk(picture, LIVE_WIDTH_PX))
        return _jpeg(small)


class _Held:
    """`camera` kept open between sweeps, with every preview and every frame shown to somebody else in passing.

    A sweep opens and closes its camera, which takes a DSLR seconds. Here `close` is put off: `open` after it means that
    the sweep wants a new connection, `keep` that it was only the sweep's end.
    """

    def __init__(
        self, camera: Camera, preview: Callable[[NDArray[np.uint8]], None], frame: Callable[[Frame], None]
    ) -> None:
        self._camera, self._on_preview, self._on_frame = camera, preview, frame
        self._info: CameraInfo | None = None
        self._closing = False

    def open(self) -> CameraInfo:
        if self._closing:
            self.let_go()
        if self._info is None:
            self._info = self._camera.open()
        return self._info

    def close(self) -> None:
        self._closing = True

    def keep(self) -> None:
        self._closing = False

    def let_go(self) -> None:
        self._info, self._closing = None, False
        self._camera.close()

    def preview(self) -> NDArray[np.uint8]:
        picture = self._camera.preview()
        self._on_preview(picture)
        return picture

    def grab(self, timeout_s: float) -> Frame:
        frame = self._camera.grab(timeout_s)
        self._on_frame(frame)
        return frame

    def __getattr__(self, name: str) -> Any:
        return getattr(self._camera, name)


def sentence(error: DaifError) -> str:
    """The error for somebody at the page: without the command line's advice about options."""
    if not isinstance(error, CameraError):
        return str(error)
    where = f"{error.where}: " if error.where else ""
    return f"{where}{error.message}" + (f"; {error.advice}" if error.advice else "")


def _as_srgb(frame: Frame) -> NDArray[np.uint8]:
    assert frame.image is not None
    image: NDArray[Any] = frame.image if frame.image.ndim == 3 else frame.image[..., None]
    stride = max(1, image.shape[1] // LIVE_WIDTH_PX)
    image = np.ascontiguousarray(np.broadcast_to(image[::stride, ::stride], (*image[::stride, ::stride].shape[:2], 3)))
    if frame.transfer == "srgb" and image.dtype == np.uint8:
        return image
    return to_srgb8(to_linear(image, "linear" if frame.transfer == "unknown" else frame.transfer, frame.white_level))


def _shrunk(picture: NDArray[np.uint8], width_px: int) -> NDArray[np.uint8]:
    height, width = picture.shape[:2]
    if width <= width_px:
        return picture
    return cv2.resize(picture, (width_px, max(1, round(height * width_px / width))), interpolation=cv2.INTER_AREA)


def _jpeg(rgb: NDArray[np.uint8]) -> bytes:
    return cv2.imencode(".jpg", rgb[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 80])[1].tobytes()
