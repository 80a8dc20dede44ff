"""Run by test_sweep.py: simulated sweeps in forked processes, each sent a signal at a random moment, then resumed.

Forking keeps the imports out of every run. Arguments: folder, signal name, number of runs, seed. Prints one JSON line
per run: what was on disk when the process ended, how it ended, and what the resumed stack holds.
"""

import contextlib
import hashlib
import io
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import cv2

from capture import sweep as sweep_module
from capture.cameras.simulated import Behaviour, SimulatedCamera
from capture.lease import Lease
from capture.plan import command_sweep
from capture.scenes import procedural_scene
from capture.stack import FocalStack, partial_path
from capture.sweep import StopRequest, SweepInterrupted, run_sweep

cv2.setNumThreads(1)  # a fork copies no threads, but a lock that one of them holds
sweep_module.STILL_POLL_S = 0.001
N_FRAMES = 5
SCENE = procedural_scene(3, 36, 48)
PLAN = command_sweep(tuple(range(100, 100 + 150 * N_FRAMES, 150)), "step")
START = 350.0  # where the simulated motor stands before anything happens


def camera() -> SimulatedCamera:
    behaviour = Behaviour(relative=True, backlash=4, noise=0.01, latency_s=0.005, files="png", max_coc_px=6.0)
    return SimulatedCamera(SCENE, behaviour=behaviour)


def sweep(path: Path, acknowledge: int, *, resume: bool) -> None:
    """One sweep; every committed frame is told through the pipe, and at the end where the lens stands."""
    device = camera()
    code = b"done"
    try:
        with StopRequest() as stop:
            run_sweep(
                device,
                PLAN,
                path,
                resume=resume,
                stop=stop,
                on_progress=lambda p: os.write(acknowledge, bytes([p.index])) if p.index >= 0 else None,
            )
    except SweepInterrupted as error:
        code = str(error.exit_code).encode()
    os.write(acknowledge, b"|" + json.dumps([code.decode(), device._motor, device._open]).encode())


def forked(path: Path, *, resume: bool, signal_number: int = 0, after_s: float = 0.0) -> tuple[list[int], list, int]:
    """(frames acknowledged, [how it ended, motor, camera open], wait status) of a sweep in a child process."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the sweep logs that it was asked to stop
        with contextlib.redirect_stdout(io.StringIO()):
            sweep(path, writer, resume=resume)
        os._exit(0)
    os.close(writer)
    if signal_number:
        time.sleep(after_s)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal_number)
    _, status = os.waitpid(child, 0)
    data = b""
    while part := os.read(reader, 4096):
        data += part
    os.close(reader)
    frames, _, end = data.partition(b"|")
    return list(frames), json.loads(end) if end else [], status


def hashes(path: Path) -> dict[int, str]:
    """sha256 of the pixels of every committed frame; the whole file is read with its checksums."""
    with FocalStack.open(path, deep=True, allow_partial=True) as stack:
        return {
            int(place): hashlib.sha256(stack.raw(i).tobytes()).hexdigest() for i, place in enumerate(stack.frame_index)
        }


def main(folder: Path, signal_name: str, runs: int, seed: int) -> None:
    moments = random.Random(seed)
    number = int(getattr(signal, signal_name))
    camera().open()
    forked(folder / "warm.h5", resume=False)
    began = time.monotonic()
    forked(folder / "whole.h5", resume=False)
    whole_s = time.monotonic() - began
    for run in range(runs):
        path = folder / f"run{run}.h5"
        after_s = moments.uniform(0.0, 1.05 * whole_s)
        acknowledged, end, status = forked(path, resume=False, signal_number=number, after_s=after_s)
        on_disk = partial_path(path) if partial_path(path).exists() else path if path.exists() else None
        before = hashes(on_disk) if on_disk else {}
        with Lease(path):  # nobody holds it any more
            pass
        if not path.exists():
            _, resumed_end, _ = forked(path, resume=on_disk is not None)
        else:
            resumed_end = ["done"]
        after = hashes(path)
        with FocalStack.open(path) as stack:
            commands = [float(x) for x in stack.focus_command]
        print(
            json.dumps(
                {
                    "run": run,
                    "acknowledged": acknowledged,
                    "on_disk": sorted(before),
                    "kept": all(after[index] == digest for index, digest in before.items()),
                    "complete": sorted(after) == list(range(N_FRAMES)) and commands == list(PLAN),
                    "end": end,
                    "status": status,
                    "resumed": resumed_end[:1],
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
