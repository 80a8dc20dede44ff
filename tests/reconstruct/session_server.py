"""A real `daif session` in its own process, and a small client for it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import ClientConnection, connect

PROGRAM = "from reconstruct.cli import main; main()"


class Server:
    """The process, its address, and one HTTP client that has traded the token for the cookie."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process, self.url = process, url
        self.base = url.partition("/?")[0]
        self.http = httpx.Client(base_url=self.base, follow_redirects=True, timeout=60)
        self.http.get(url).raise_for_status()

    @property
    def cookie(self) -> str:
        return "; ".join(f"{name}={value}" for name, value in self.http.cookies.items())

    def page(self, **extra: Any) -> ClientConnection:
        """A WebSocket of a page that has the cookie."""
        return connect(
            self.base.replace("http", "ws") + "/live",
            additional_headers={"Cookie": self.cookie},
            open_timeout=60,
            **extra,
        )

    def stop(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(60)


@contextlib.contextmanager
def session(
    out: Path,
    camera: str,
    *options: str,
    program: Sequence[str] = ("-c", PROGRAM),
    env: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """A running session; ended, if need be killed, on the way out."""
    command = [sys.executable, *program, "session", "--camera", camera, "-o", str(out), "--no-browser", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    # a test run in the background inherits an ignored SIGINT, which the session would inherit in turn
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("open http://127.0.0.1:"), line
        server = Server(process, line.split()[1])
        with contextlib.closing(server.http):
            yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
        process.wait()
        process.stdout.close()


class Page:
    """What the browser does, without a browser: keeps the newest state, acknowledges pictures."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.state: dict[str, Any] = {}
        self.pictures: list[bytes] = []
        self.replies: list[str] = []

    def say(self, **message: Any) -> None:
        self.socket.send(json.dumps(message))

    def until(self, found: Any, seconds: float = 90.0) -> dict[str, Any]:
        """The state, once `found(state)` is true."""
        deadline = time.monotonic() + seconds
        while not (self.state and found(self.state)):
            left = deadline - time.monotonic()
            assert left > 0, f"waited {seconds} s in vain; the state is {json.dumps(self.state)[:3000]}"
            with contextlib.suppress(TimeoutError):
                self._take(self.socket.recv(timeout=min(left, 1.0)))
        return self.state

    def answer(self, seconds: float = 30.0) -> str:
        """The next reply to something that cannot be done."""
        count = len(self.replies)
        deadline = time.monotonic() + seconds
        while len(self.replies) == count and time.monotonic() < deadline:
            with contextlib.suppress(TimeoutError):
                self._take(self.socket.recv(timeout=1.0))
        return self.replies[count]

    def _take(self, message: str | bytes) -> None:
        if isinstance(message, bytes):
            self.pictures.append(message)
            self.say(do="seen")
            return
        news = json.loads(message)
        if "reply" in news:
            self.replies.append(news["reply"])
        else:
            self.state = news


def idle(state: dict[str, Any]) -> bool:
    return state["camera"]["state"] == "idle"
