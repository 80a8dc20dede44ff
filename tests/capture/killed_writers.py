"""Run by test_stack.py: writes stacks in forked processes, kills each at a random moment, says what was acknowledged.

Forking keeps the imports out of every run. Arguments: folder, number of runs, seed. Prints one JSON line per run.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np

from capture.stack import StackWriter

N_FRAMES, HEIGHT, WIDTH = 5, 96, 128


def frame(run: int, index: int) -> np.ndarray:
    return np.random.default_rng([run, index]).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def write(path: Path, run: int, acknowledge: int) -> None:
    with StackWriter.create(
        path, n_frames=N_FRAMES, height=HEIGHT, width=WIDTH, transfer="srgb", plan={"run": run}
    ) as w:
        for i in range(N_FRAMES):
            w.append(i, frame(run, i), focus_distance_m=1.0 + i, originals=[(f"shot{i}.bin", bytes([run % 256, i]))])
            os.write(acknowledge, bytes([i]))
        w.finish()
        os.write(acknowledge, b"F")


def main(folder: Path, runs: int, seed: int) -> None:
    moments = random.Random(seed)
    start = time.monotonic()
    reader, writer = os.pipe()
    write(folder / "whole.h5", 0, writer)
    os.close(writer)
    whole_s = time.monotonic() - start
    for run in range(runs):
        reader, writer = os.pipe()
        path = folder / f"run{run}.h5"
        child = os.fork()
        if child == 0:
            os.close(reader)
            write(path, run, writer)
            os._exit(0)
        os.close(writer)
        time.sleep(moments.uniform(0.0, 1.1 * whole_s))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        acknowledged = b""
        while part := os.read(reader, 64):
            acknowledged += part
        os.close(reader)
        print(json.dumps({"run": run, "path": str(path), "frames": list(acknowledged), "status": status}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
