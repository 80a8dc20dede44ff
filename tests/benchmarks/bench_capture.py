"""Time per frame that is ours, and memory, of sweeps with a camera that costs nothing itself.

A 24-megapixel RAW+JPEG pair (a synthetic uncompressed 16-bit CFA DNG of 48 MB and its JPEG), with the JPEG or the RAW
as the stack's frame, and a 1080p webcam frame. The camera hands over what it already has, through the
worker's pipe as real backends do; exposure, settling and USB transfer are zero. CPU time counts the parent and its
worker and is the difference between a sweep of 12 and one of 4 frames; the peak memory of the two must not differ.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CASES = ("webcam 1080p", "webcam 1080p, in process", "pair 24 MP, JPEG decoded", "pair 24 MP, RAW decoded")
SHORT, LONG = 4, 12
RESULTS = Path("bench-results")


def main(argv: list[str]) -> None:
    """Print a table and write bench-results/capture.json; each sweep has its own process, for its peak memory."""
    if argv:
        print(json.dumps(measure(argv[0], int(argv[1]))))
        return
    rows = []
    print(
        f"{'case':<26} {'CPU ms/frame':>13} {'wall ms/frame':>14} {'MB/frame':>9} {'peak MB, 4':>11} {'12 frames':>10}"
    )
    for case in CASES:
        short, long = (in_own_process(case, n_frames) for n_frames in (SHORT, LONG))
        row = {
            "case": case,
            "cpu_ms_per_frame": 1e3 * (long["cpu_s"] - short["cpu_s"]) / (LONG - SHORT),
            "wall_ms_per_frame": 1e3 * (long["wall_s"] - short["wall_s"]) / (LONG - SHORT),
            "frame_mb": long["frame_mb"],
            "peak_mb": [short["peak_mb"], long["peak_mb"]],
        }
        rows.append(row)
        print(
            f"{case:<26} {row['cpu_ms_per_frame']:>13.0f} {row['wall_ms_per_frame']:>14.0f} {row['frame_mb']:>9.1f} "
            f"{short['peak_mb']:>11.0f} {long['peak_mb']:>10.0f}",
            flush=True,
        )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "capture.json").write_text(json.dumps(rows, indent=2))


def in_own_process(case: str, n_frames: int) -> dict[str, Any]:
    """`measure` in a fresh process."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_capture", case, str(n_frames)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def measure(case: str, n_frames: int) -> dict[str, float]:
    """One sweep: CPU seconds of the sweep and its worker, wall seconds, peak memory of the sweep's process."""
    from capture.cameras.base import Camera
    from capture.cameras.worker import WorkerCamera
    from capture.plan import command_sweep
    from capture.sweep import SweepOptions, run_sweep

    kind = "webcam" if case.startswith("webcam") else "pair"
    if "in process" in case:
        from tests.benchmarks.free_camera import FreeCamera

        camera: Camera = FreeCamera(kind)
    else:
        camera = WorkerCamera("tests.benchmarks.free_camera:FreeCamera", {"kind": kind}, deadlines_s={"open": 200.0})
    options = SweepOptions(settle_s=0.0, prefer="jpeg" if "JPEG" in case else "raw", allow_drift=True)
    plan = command_sweep(tuple(float(position) for position in range(n_frames)), "driver")
    with tempfile.TemporaryDirectory() as folder:
        began_s, cpu_s = time.monotonic(), time.process_time()
        run_sweep(camera, plan, Path(folder) / "a.h5", options=options)
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    return {
        "cpu_s": time.process_time() - cpu_s + children.ru_utime + children.ru_stime,
        "wall_s": time.monotonic() - began_s,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "frame_mb": size / n_frames / 1e6,
    }


if __name__ == "__main__":
    main(sys.argv[1:])
