"""A backend that misbehaves on request, for the worker's tests."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np

from capture.cameras.base import CameraBusy, Frame


class BrokenCamera:
    """Notes in `log` that it was closed."""

    def __init__(self, log: str) -> None:
        self.log = Path(log)

    def open(self) -> str:
        return f"opened in {os.getpid()}"

    def close(self) -> None:
        with self.log.open("a") as file:
            file.write(f"closed {os.getpid()}\n")

    def grab(self, timeout_s: float) -> Frame:
        image = np.arange(600, dtype=np.uint8).reshape(10, 20, 3)
        return Frame(image=image, transfer="srgb", originals=(("a.nef", b"raw"), ("a.jpg", b"jpeg")))

    def position(self) -> float:
        return 3.5

    def busy(self) -> None:
        raise CameraBusy("wait a moment", stage="busy", native_code=-110, native_text="I/O in progress")

    def bug(self) -> None:
        raise KeyError("oops")

    def crash(self) -> None:
        os.kill(os.getpid(), signal.SIGSEGV)

    def hang(self) -> None:
        time.sleep(1000)

    def echo(self, value: Any) -> Any:
        return value
