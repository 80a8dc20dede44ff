"""The heavy half of a session, each part in a process of its own so that capture stays responsive.

A `Reconstructor` keeps one child that has imported torch; a session has two, so that a first look never waits behind a
full reconstruction. `Training` runs `daif train` and hands on what it prints. Nothing here imports torch itself.
"""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from capture.errors import DaifError

FULL_NICE, TRAINING_NICE = 5, 10  # capture and first looks go before
RESTARTS = 1  # a job that kills the process twice is given up
LINES_KEPT = 200


@dataclass(frozen=True)
class LookJob:
    """A first look at a stack, complete or not; `weights` None is the plane sweep."""

    number: int
    stack: Path
    lens: Path | None
    weights: str | None = None
    purpose: Literal["take", "before", "after"] = "take"


@dataclass(frozen=True)
class FullJob:
    """The whole reconstruction of a stack into `out`/NNN/, replacing what is there."""

    number: int
    stack: Path
    lens: Path | None
    out: Path
    method: str
    weights: str
    refine_steps: int
    device: str


@dataclass(frozen=True)
class Look:
    """A first look as the page shows it: two JPEGs and what they mean.

    Attributes:
        depth_jpeg, aif_jpeg: sRGB pictures of the same size.
        near_m, far_m: nearest and farthest depth (1st and 99th percentile); None where depth is only ordered.
        std_m: median standard deviation of the depth in metres, or None.
        confident: share of the picture with a confidence above 0.5.
    """

    depth_jpeg: bytes
    aif_jpeg: bytes
    near_m: float | None
    far_m: float | None
    std_m: float | None
    confident: float
    n_frames: int
    seconds: float
    cpu_seconds: float


@dataclass(frozen=True)
class News:
    """What became of a job: `what` is started, progress, look, full or failed."""

    what: Literal["started", "progress", "look", "full", "failed"]
    job: LookJob | FullJob
    text: str = ""
    share: float = 0.0
    content: Any = None


Listener = Callable[[News], None]


class Reconstructor:
    """Jobs one after another in a child process.

    Args:
        listener: told of every step, from another thread.
        wanted: asked before a job begins; what newer frames have overtaken is left out.
        nice: how far the child stands back for others.
        warm: start the child at once and not with the first job.
        on_ready: called, from another thread, when the child has started.
    """

    def __init__(
        self,
        listener: Listener,
        device: str,
        *,
        wanted: Callable[[LookJob | FullJob], bool] = lambda job: True,
        nice: int = 0,
        warm: bool = False,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        self.listener, self.device, self.wanted, self.nice, self.warm = listener, device, wanted, nice, warm
        self.on_ready = on_ready
        self.ready = False
        self._jobs: queue.Queue[LookJob | FullJob | None] = queue.Queue()
        self._child: Any = None
        self._pipe: Connection | None = None
        self._closing = False
        self._busy = False
        self._thread = threading.Thread(target=self._run, name="reconstructor", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def add(self, job: LookJob | FullJob) -> None:
        """Queue a job."""
        self._jobs.put(job)

    @property
    def idle(self) -> bool:
        """Whether a job would begin at once."""
        return self.ready and not self._busy and self._jobs.empty()

    def close(self) -> None:
        """End the child, whatever it is doing, and the thread."""
        self._closing = True
        self._jobs.put(None)
        self._end_child()
        self._thread.join(5.0)

    def _run(self) -> None:
        if self.warm:
            with contextlib.suppress(EOFError, OSError):
                self._start_child()
        while not self._closing:
            job = self._jobs.get()
            if job is not None and self.wanted(job):
                self._busy = True
                self._do(job)
                self._busy = False

    def _do(self, job: LookJob | FullJob) -> None:
        for _ in range(1 + RESTARTS):
            try:
                if self._pipe is None:
                    self._start_child()
                assert self._pipe is not None
                self._pipe.send(job)
                self.listener(News("started", job))
                while True:
                    news = self._pipe.recv()
                    self.listener(news)
                    if news.what in ("look", "full", "failed"):
                        return
            except (EOFError, OSError):
                if self._closing:
                    return
                self._end_child()
        sentence = "the reconstruction died twice on this take, probably for want of memory; close other programs"
        self.listener(News("failed", job, sentence))

    def _start_child(self) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self._child = context.Process(
            target=_serve, args=(theirs, self.device, self.nice), name="daif-reconstruct", daemon=True
        )
        self._child.start()
        theirs.close()
        self._pipe = ours
        self.ready = bool(ours.recv())
        self.on_ready()

    def _end_child(self) -> None:
        child, self._child = self._child, None
        pipe, self._pipe = self._pipe, None
        self.ready = False
        if child is not None:
            child.kill()
            child.join(5.0)
        if pipe is not None:
            pipe.close()


def _serve(pipe: Connection, device_name: str, nice: int) -> None:
    """Child process: import, warm up, then answer jobs until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the session decides when to stop
    if hasattr(os, "nice"):
        os.nice(nice)
    import torch

    import reconstruct.first_look  # noqa: F401  # imported now, used by the first take
    from reconstruct.device import pick_device
    from reconstruct.plane_sweep import plane_sweep

    # one core stays with the camera; threads that wait for a core in turn are slower than none
    torch.set_num_threads(max(1, torch.get_num_threads() - 1))
    device = pick_device(device_name)
    networks = _Networks(device)
    frames = torch.rand(2, 3, 64, 64, device=device)
    plane_sweep(frames, torch.tensor([1.0, 0.5], device=device), torch.tensor([8.0, 8.0], device=device))
    try:
        pipe.send(True)
        while True:
            job = pipe.recv()
            try:
                content = _look(job, networks, device) if isinstance(job, LookJob) else _full(job, pipe)
            except DaifError as error:
                pipe.send(News("failed", job, str(error)))
            except Exception as error:  # the session goes on
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    sentence = "the disk is full; free some space, then press Reconstruct"
                else:
                    sentence = f"this is a bug in daif: {type(error).__name__}: {error}"
                pipe.send(News("failed", job, sentence))
            else:
                pipe.send(News("look" if isinstance(job, LookJob) else "full", job, content=content))
    except (EOFError, OSError):
        return


class _Networks:
    """The network used last; loading takes longer than a first look."""

    def __init__(self, device: Any) -> None:
        self.device = device
        self.name: str | None = None
        self.network: Any = None

    def get(self, weights: str | None) -> Any:
        if weights is None:
            return None
        if weights != self.name:
            from reconstruct.predict import load_network

            self.network, self.name = load_network(weights, self.device), weights
        return self.network


def _look(job: LookJob, networks: _Networks, device: Any) -> Any:
    from capture.lens import LensProfile
    from capture.stack import FocalStack
    from reconstruct.first_look import first_look

    profile = None if job.lens is None else LensProfile.read(job.lens)
    # the sweep may have ended meanwhile and given the file its final name
    file = job.stack if job.stack.exists() else job.stack.with_suffix("")
    with FocalStack.open(file, allow_partial=True) as stack:
        return first_look(stack, profile, device, networks.get(job.weights))


def _full(job: FullJob, pipe: Connection) -> dict[str, Any]:
    import numpy as np

    from reconstruct.infer import Settings
    from reconstruct.job import Job, solve, write

    settings = Settings(
        method=job.method,  # type: ignore[arg-type]
        weights=job.weights,
        refine_steps=job.refine_steps,
        device=job.device,
    )
    work = Job(str(job.out), settings, job.lens, force=True)
    told = 0.0

    def tell(what: str, share: float) -> None:
        nonlocal told
        if time.monotonic() - told > 0.2:
            told = time.monotonic()
            pipe.send(News("progress", job, what, share))

    solved = solve(str(job.stack), work, tell)
    record = write(solved, work)
    answer = solved.answer
    near_m, far_m = answer.near_far()
    return {
        "near_m": near_m if answer.metric else None,
        "far_m": far_m if answer.metric else None,
        "std_m": float(np.nanmedian(answer.depth_std)) if answer.metric else None,
        "confident": float((answer.confidence > 0.5).mean()),
        "n_frames": len(answer.focus_dpt),
        "seconds": record["summary"]["seconds"],
        "warnings": record["warnings"],
    }


class Training:
    """One run of `daif train` on picked takes, in its own process.

    Args:
        command: the whole command line; `train_command` makes the usual one.
        changed: called with this, from another thread, when there is something new to show; a short run may have ended
            before its maker has it.
    """

    def __init__(
        self, command: Sequence[str], takes: Sequence[int], out: Path, changed: Callable[[Training], None]
    ) -> None:
        self.takes, self.out, self.changed = list(takes), out, changed
        self.lines: deque[str] = deque(maxlen=LINES_KEPT)
        self.table: list[str] = []
        self.state: Literal["running", "finished", "failed", "stopped"] = "running"
        self.problem = ""
        self.weights: Path | None = None
        self.began = time.monotonic()
        self.seconds = 0.0
        self._stopping = False
        self._child = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=sys.platform != "win32",  # Ctrl-C reaches the session, which then ends this
        )
        if hasattr(os, "setpriority"):
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, self._child.pid, TRAINING_NICE)
        self._readers = [
            threading.Thread(target=self._read, args=(self._child.stderr, self.lines.append), daemon=True),
            threading.Thread(target=self._read, args=(self._child.stdout, self.table.append), daemon=True),
        ]
        self._waiter = threading.Thread(target=self._wait, name="training", daemon=True)
        for thread in (*self._readers, self._waiter):
            thread.start()

    def stop(self) -> None:
        """End the run; what it has learned so far is dropped."""
        self._stopping = True
        if self._child.poll() is None:
            self._child.terminate()
            try:
                self._child.wait(5.0)
            except subprocess.TimeoutExpired:
                self._child.kill()
        self._waiter.join(5.0)

    def _read(self, stream: Any, keep: Callable[[str], None]) -> None:
        with stream:
            for line in stream:
                keep(line.rstrip())
                self.changed(self)

    def _wait(self) -> None:
        code = self._child.wait()
        for reader in self._readers:
            reader.join(2.0)
        self.seconds = time.monotonic() - self.began
        if self._stopping:
            self.state = "stopped"
        elif code != 0:
            self.state = "failed"
            said = [line for line in self.lines if line.startswith("daif: ")]
            self.problem = said[-1].removeprefix("daif: ") if said else f"the training ended with exit code {code}"
        else:
            weights = self.out / "weights.safetensors"
            self.weights = weights if weights.is_file() else None
            self.state = "finished"
        self.changed(self)


def train_command(
    stacks: Sequence[Path], out: Path, *, init: str, lens: Path | None, device: str, steps: int | None = None
) -> list[str]:
    """The command line of an on-site fine-tuning run (design section 4)."""
    program = "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); from reconstruct.cli import main; main()"
    command = [sys.executable, "-c", program, json.dumps(sys.path), "train", *map(str, stacks)]
    command += ["-o", str(out), "--init", init, "--device", device]
    if lens is not None:
        command += ["--lens", str(lens)]
    return command if steps is None else [*command, "--steps", str(steps)]
