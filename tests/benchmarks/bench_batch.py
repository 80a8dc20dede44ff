"""Throughput, memory and time per stage of `daif reconstruct`, from files on disk to finished folders.

Every case runs as its own process, each worker on one thread. CPU seconds are what the kernel counted for it and its
workers, start-up with it; peak memory is the largest sum over them, sampled where they are several; stacks an hour go
by the clock on the wall, true only where nothing else runs. Frames are a simulated sweep, enlarged to the size of the
case, with the blur of a 50 mm f/2.8 lens on a full-frame sensor.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil

from capture.lens import Lens
from capture.optics import Condition, simulate_sweep
from capture.scenes import procedural_scene
from capture.stack import write_stack
from reconstruct.checkpoint import DEFAULT_WEIGHTS

SIZES = {"640x480": (480, 640), "1080p": (1080, 1920), "24MP": (4000, 6000), "100MP": (8736, 11648)}
COUNTS = {"640x480": 4, "1080p": 2, "24MP": 1, "100MP": 1}  # stacks a worker
FOCUS_DPT = np.linspace(1.0, 0.4, 5)
SENSOR_WIDTH_M = 0.024
DRAWN_WIDTH = 640
SAMPLE_S = 0.5
OVERHEAD = ("read", "report", "write")
GOAL_BYTES, GOAL_CPU_S, GOAL_OVERHEAD = 3 * 2**30, 90.0, 0.15


def make_stack(path: Path, size: str, seed: int = 0) -> Path:
    """A stack of 5 frames of `size` at `path`, 8 bit sRGB."""
    height, width = SIZES[size]
    drawn = procedural_scene(seed, round(DRAWN_WIDTH * height / width), DRAWN_WIDTH)
    lens = Lens(focal_length_m=0.05, f_number=2.8, pixel_pitch_m=SENSOR_WIDTH_M / DRAWN_WIDTH)
    sweep = simulate_sweep(drawn, lens, FOCUS_DPT, Condition(bits=8), seed=seed, quality="fast")
    frames = np.stack([cv2.resize(frame, (width, height), interpolation=cv2.INTER_CUBIC) for frame in sweep.frames])
    full_lens = Lens(focal_length_m=0.05, f_number=2.8, pixel_pitch_m=SENSOR_WIDTH_M / width)
    write_stack(path, frames, focus_distance_m=1 / sweep.focus_dpt, lens=full_lens, transfer=sweep.transfer)
    return path


def run_case(folder: Path, size: str, method: str, workers: int, count: int) -> dict[str, Any]:
    """`daif reconstruct` over `count` stacks of `size` in `folder`, as a user runs it, on one thread a worker."""
    stacks = folder / size
    if len(list(stacks.glob("*.h5"))) < count:
        stacks.mkdir(exist_ok=True)
        for seed in range(count):
            if not (stacks / f"stack{seed}.h5").exists():
                make_stack(stacks / f"stack{seed}.h5", size, seed)
    out = folder / f"out-{size}-{method}-{workers}"
    command = [sys.executable, "-c", "from reconstruct.cli import main; main()", "reconstruct"]
    command += [str(stacks / f"stack{seed}.h5") for seed in range(count)]
    command += ["-o", str(out), "--method", method, "--device", "cpu", "--workers", str(workers), "--force"]
    one_thread = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OPENCV_FOR_THREADS_NUM")}
    start = time.monotonic()
    process = subprocess.Popen(command, env=os.environ | one_thread, stdout=subprocess.DEVNULL)
    peak = 0
    while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
        if workers > 1:  # of a single process the kernel knows the peak
            peak = max(peak, _memory_bytes(process.pid))
        time.sleep(SAMPLE_S)
    _, status, usage = ended
    process.returncode = os.waitstatus_to_exitcode(status)
    wall_s = time.monotonic() - start
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    outcomes = json.loads((out / "batch.json").read_text())
    stages: dict[str, float] = {}
    for outcome in outcomes:
        for stage, seconds in outcome["cpu_seconds"].items():
            stages[stage] = stages.get(stage, 0.0) + seconds / count
    return {
        "size": size,
        "method": method,
        "workers": workers,
        "stacks": count,
        "cpu_s_per_stack": (usage.ru_utime + usage.ru_stime) / count,
        "stacks_per_hour": 3600 * count / wall_s,
        "peak_bytes": max(peak, usage.ru_maxrss * 1024),
        "stage_cpu_s": stages,
        "overhead": sum(stages.get(name, 0.0) for name in OVERHEAD) / sum(stages.values()),
    }


def _memory_bytes(pid: int) -> int:
    """Memory of a process and all below it, pages that they share counted once."""
    total = 0
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                total += process.memory_full_info().pss
    return total


def _verdict(case: dict[str, Any]) -> list[str]:
    """The goals that this case has, each with met or missed."""
    goals = [(f"overhead {case['overhead']:.0%} of 15 %", case["overhead"] < GOAL_OVERHEAD)]
    if case["size"] == "24MP" and case["workers"] == 1:
        goals.append((f"{case['peak_bytes'] / 2**30:.2f} of 3 GiB", case["peak_bytes"] < GOAL_BYTES))
        per_stack = sum(case["stage_cpu_s"].values())
        goals.append((f"{per_stack:.0f} of 90 CPU s", per_stack < GOAL_CPU_S))
    return [f"{text}: {'met' if met else 'MISSED'}" for text, met in goals]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=["640x480", "1080p", "24MP"], choices=list(SIZES))
    parser.add_argument("--methods", nargs="+", default=["plane-sweep", "network"])
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--count", type=int, help=f"stacks a case; default for each worker {COUNTS}")
    parser.add_argument("--folder", type=Path, help="keep stacks and results here")
    options = parser.parse_args(argv)
    if "network" in options.methods and not DEFAULT_WEIGHTS.exists():
        print(f"no weights at {DEFAULT_WEIGHTS.name}: the network is left out")
        options.methods.remove("network")
    cases = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        print(f"{'stack':10}{'method':13}{'workers':>8}{'stacks/h':>10}{'CPU s':>8}{'peak GiB':>10}  stages (CPU s)")
        for size in options.sizes:
            for method in options.methods:
                for workers in options.workers:
                    count = options.count or COUNTS[size] * workers
                    case = run_case(folder, size, method, workers, count)
                    cases.append(case)
                    stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in case["stage_cpu_s"].items())
                    print(
                        f"5x{size:8}{method:13}{workers:8}{case['stacks_per_hour']:10.0f}"
                        f"{case['cpu_s_per_stack']:8.1f}{case['peak_bytes'] / 2**30:10.2f}  {stages}",
                        *_verdict(case),
                        sep="\n    ",
                        flush=True,
                    )
    Path("bench-results").mkdir(exist_ok=True)
    Path("bench-results/batch.json").write_text(json.dumps(cases, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
