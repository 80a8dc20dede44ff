"""A camera backend in its own process, with a deadline on every call.

libgphoto2 may wait 1000 s for a busy body and crashes on some empty settings; a V4L2 read can block for ever. Here a
stuck call becomes `CameraTimeout` and a crash `CameraCrashed`: the process is gone, and `open()` starts a new one.
The child runs in its own session, so that Ctrl-C reaches the sweep and not the driver in mid-transfer; when the parent
dies, however it dies, the child closes the camera and ends.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from capture.cameras.base import (
    CameraClosed,
    CameraCrashed,
    CameraError,
    CameraInfo,
    CameraTimeout,
    ExposureSettings,
    FocusRange,
    FocusReport,
    Frame,
)
from capture.errors import DaifError

DEADLINES_S: Mapping[str, float] = {
    "open": 20.0,
    "lock_exposure": 20.0,
    "set_live_view": 10.0,
    "focus_range": 5.0,
    "home": 90.0,
    "move_focus": 40.0,
    "position": 5.0,
    "preview": 5.0,
    "delete_from_card": 20.0,
    "close": 8.0,
}
GRAB_MARGIN_S = 2.0  # the backend gives up by itself at its timeout; this much later it counts as stuck
ORPHAN_GRACE_S = 10.0  # a call in progress may finish when the parent has died

_CHILD = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from capture.cameras.worker import serve; serve()"


class WorkerCamera:
    """The camera that `factory(**arguments)` makes in a child process; a `Camera`.

    Args:
        factory: "module:name" of the backend's class; imported in the child only.
        arguments: keyword arguments of the factory; they cross a pipe.
        deadlines_s: seconds per method name, over `DEADLINES_S`.
    """

    def __init__(
        self, factory: str, arguments: Mapping[str, Any], *, deadlines_s: Mapping[str, float] | None = None
    ) -> None:
        self._factory, self._arguments = factory, dict(arguments)
        self._deadlines_s = {**DEADLINES_S, **(deadlines_s or {})}
        self._child: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None

    def open(self) -> CameraInfo:
        """Start the child process and connect."""
        self.close()
        self.start()
        try:
            return self.call("open")
        except BaseException:
            self._kill()
            raise

    def lock_exposure(self, settings: ExposureSettings) -> ExposureSettings:
        return self.call("lock_exposure", settings)

    def set_live_view(self, on: bool) -> None:
        self.call("set_live_view", on)

    def focus_range(self) -> FocusRange:
        return self.call("focus_range")

    def home(self, end: Literal["near", "far"] = "near") -> FocusReport:
        return self.call("home", end)

    def move_focus(self, target: float) -> FocusReport:
        return self.call("move_focus", target)

    def position(self) -> float | None:
        return self.call("position")

    def grab(self, timeout_s: float) -> Frame:
        return self.call("grab", timeout_s, deadline_s=timeout_s + GRAB_MARGIN_S)

    def delete_from_card(self, files: tuple[tuple[str, str], ...]) -> None:
        self.call("delete_from_card", files)

    def preview(self) -> NDArray[np.uint8]:
        return self.call("preview")

    def close(self) -> None:
        if self._child is None:
            return
        with contextlib.suppress(DaifError):
            self.call("close")
        self._kill()

    def __enter__(self) -> WorkerCamera:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """Process id of the driver, None while closed."""
        return self._child.pid if self._child else None

    def call(self, method: str, *arguments: Any, deadline_s: float | None = None) -> Any:
        """Run the backend's `method` in the child and return its result.

        Raises:
            CameraTimeout, CameraCrashed: the child was stuck, or died; it is gone and `open()` starts another.
            CameraError: whatever the backend raised.
        """
        if self._pipe is None or self._child is None:
            raise CameraClosed(f"the camera is not open, {method} needs open() first", stage=method)
        limit_s = self._deadlines_s.get(method, 10.0) if deadline_s is None else deadline_s
        try:
            self._pipe.send((method, arguments))
            if not self._pipe.poll(limit_s):
                self._kill()
                raise CameraTimeout(f"the camera did not answer {method} within {limit_s:g} s", stage=method)
            outcome, value = self._pipe.recv()
        except (EOFError, OSError):
            raise self._crashed(method) from None
        except KeyboardInterrupt:  # the reply is still to come: this worker is out of step for good
            self._kill()
            raise
        if outcome == "error":
            raise value
        return value

    def start(self) -> None:
        """Start the child process without connecting to a camera."""
        ours, theirs = Pipe()
        handle = theirs.fileno()
        options: dict[str, Any] = {"pass_fds": (handle,), "start_new_session": True}
        if sys.platform == "win32":
            os.set_handle_inheritable(handle, True)
            startup = subprocess.STARTUPINFO(lpAttributeList={"handle_list": [handle]})
            options = {"startupinfo": startup, "creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        self._child = subprocess.Popen(
            [sys.executable, "-c", _CHILD, json.dumps(sys.path), str(handle)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # drivers print; stdout belongs to our results
            env={"OPENCV_LOG_LEVEL": "ERROR", **os.environ},
            **options,
        )
        theirs.close()
        self._pipe = ours
        try:
            ours.send((self._factory, self._arguments))
        except OSError:
            raise self._crashed("open") from None

    def _crashed(self, method: str) -> CameraCrashed:
        assert self._child is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(1.0)
        code = self._child.poll()
        self._kill()
        how = f"exit code {code}"
        if code is not None and code < 0:
            how = signal.Signals(-code).name
        return CameraCrashed(f"the camera driver died during {method} ({how})", stage=method, native_code=code)

    def _kill(self) -> None:
        """End the child and forget it."""
        child, self._child = self._child, None
        pipe, self._pipe = self._pipe, None
        if pipe is not None:
            pipe.close()
        if child is not None:
            # after close() the child leaves by itself; a stuck one does not
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(0.3)
            if child.poll() is None:
                child.kill()
            child.wait()


def serve() -> None:
    """Child process: make the backend that the first message names, then answer calls until the pipe closes."""
    for name in (signal.SIGINT, signal.SIGTERM):  # the parent decides when to stop
        signal.signal(name, signal.SIG_IGN)
    pipe = _pipe_from(int(sys.argv[2]))
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    camera: Any = None
    try:
        factory, arguments = pipe.recv()
        module, _, name = factory.partition(":")
        camera = getattr(importlib.import_module(module), name)(**arguments)
        while True:
            method, arguments = pipe.recv()
            pipe.send(_answer(camera, method, arguments))
    except (EOFError, OSError):  # the parent is gone, or has closed us
        pass
    finally:
        if camera is not None:
            camera.close()


def _answer(camera: Any, method: str, arguments: tuple[Any, ...]) -> tuple[str, Any]:
    try:
        return "value", getattr(camera, method)(*arguments)
    except DaifError as error:
        return "error", error
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        return "error", CameraError(f"the camera driver failed in {method}", stage=method, native_text=text)


def _pipe_from(handle: int) -> Connection:
    if sys.platform == "win32":
        from multiprocessing.connection import PipeConnection

        return PipeConnection(handle)
    return Connection(handle)


def _end_with_parent(parent: int) -> None:
    """End this process some time after its parent died, even while a driver call is stuck."""
    while os.getppid() == parent:
        time.sleep(0.5)
    time.sleep(ORPHAN_GRACE_S)
    os._exit(1)
