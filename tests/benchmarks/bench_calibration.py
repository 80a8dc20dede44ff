"""How well a lens is calibrated: errors and coverage over noise and board distances, on measurements and on images.

    python -m tests.benchmarks.bench_calibration             measurements, and what is there of the table of images
    python -m tests.benchmarks.bench_calibration --table     the table of images; started again, it goes on
    python -m tests.benchmarks.bench_calibration --speed     four sweeps of 24 megapixels (needs 2 GB of disk)

An interval of the gain is for the pupil's diameter, one of the focus for the map at each of the eleven steps, one of a
frame for where the motor really stopped. Limits and error terms were chosen on `Truth()`, on the cameras of
tests/calibration and on trials with seeds below 1000; the table starts at seed 3000.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from calibration.board import Board
from calibration.calibrate import MEASURED_SQUARE_RATIO, BoardStack, calibrate, load_board_stack
from calibration.edges import CalibrationError, Sweep
from calibration.fit import fit_blur
from capture.lens import Measured
from capture.stack import StackWriter
from tests.calibration.board_camera import BoardCamera
from tests.calibration.measurements import Truth

BOARDS = {
    "1 tilted": [(0.9, 0.14)],
    "2": [(0.8, 0.01), (1.5, 0.02)],
    "3": [(0.68, 0.01), (0.95, 0.015), (1.7, 0.01)],
    "4": [(0.66, 0.01), (0.85, 0.02), (1.15, 0.01), (1.9, 0.01)],
    "6": [(0.64, 0.01), (0.74, 0.01), (0.88, 0.01), (1.08, 0.02), (1.35, 0.01), (2.0, 0.01)],
}
STEPS = np.linspace(0, 1000, 11)
N_BOARDS = (1, 2, 3, 4, 6)
NOISES = (0.005, 0.01, 0.02)
FIRST_SEED = 3000
MEASURING = ("board", "breathing", "calibrate", "edges", "fit", "intrinsics")  # modules that a trial's result hangs on
ROWS = Path("bench-results/calibration_table.jsonl")
FOCAL_RATIO = 1e-3  # what is not known of the focal length
LENSES = [
    Truth(pupil_m=0.0118, bend=-0.3, cubic=0.35, breathing=-0.06, floor_px=2.2, jitter_dpt=0.0015),
    Truth(pupil_m=0.0245, bend=0.45, wave=-0.06, breathing=0.03, floor_px=1.1, jitter_dpt=0.0),
]
SPEED_CAMERA = BoardCamera(
    height=1000, width=1500, pupil_m=0.0125, focal_px=3194.0, breathing=-0.7, bend=-0.3, floor_px=0.8
)
SPEED_POSES = ({"distance_m": 0.7, "tilt_deg": -4}, {"distance_m": 1.1, "turn_deg": 30, "roll_deg": 6})


@dataclass(frozen=True)
class Trial:
    """One calibration of a camera, poses and errors drawn at random: no trial repeats another's."""

    n_boards: int  # 1 is one tilted board, more stand at that many distances
    noise: float
    seed: int

    def rng(self, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.n_boards, round(1000 * self.noise), stream])

    @cached_property
    def camera(self) -> BoardCamera:
        rng = self.rng(0)
        return BoardCamera(
            height=240,
            width=360,
            pupil_m=rng.uniform(0.013, 0.022),
            focal_px=rng.uniform(760.0, 820.0),
            breathing=rng.uniform(-1.0, 1.0),
            bend=rng.uniform(-0.4, 0.4),
            wave=rng.uniform(-0.08, 0.08),
            floor_px=rng.uniform(0.3, 0.9),
            noise=self.noise,
            bits=8 if self.seed % 2 else 14,
            backlash=rng.uniform(0.0, 30.0),
        )

    @cached_property
    def jitter_dpt(self) -> float:
        """Scatter of the motor."""
        return float(self.rng(1).choice([0.0, 0.002, 0.004]))

    def stacks_and_focal(self) -> tuple[list[BoardStack], Measured]:
        """Sweeps of the board, and what the user knows of the focal length."""
        rng = self.rng(2)
        if self.n_boards == 1:
            tilt = float(rng.uniform(48, 56) * rng.choice([-1, 1]))
            poses = [{"distance_m": rng.uniform(0.8, 0.95), "tilt_deg": tilt, "roll_deg": rng.uniform(-6, 6)}]
        else:
            inverse = np.linspace(1.4, 0.8, self.n_boards) + rng.uniform(-0.1, 0.1, self.n_boards) / self.n_boards
            turns = rng.uniform((-8, -25, -8), (8, 25, 8), (self.n_boards, 3))
            poses = [
                {"distance_m": 1 / dpt, "tilt_deg": tilt, "turn_deg": turn, "roll_deg": roll}
                for dpt, (tilt, turn, roll) in zip(inverse, turns, strict=True)
            ]
        # known as well as is said: a print and a focal length that are exactly right would flatter the coverage
        printed = Board(square_m=0.04 * (1 + MEASURED_SQUARE_RATIO * rng.standard_normal()), measured=True)
        focal = float(self.camera.focal_at(500)) * (1 + FOCAL_RATIO * rng.standard_normal())
        stacks = []
        for k, pose in enumerate(poses):
            standing, noise_seed = self.camera.pose(printed, **pose), int(rng.integers(2**31))
            images = self.camera.sweep(printed, standing, STEPS, noise_seed, self.jitter_dpt)
            sweep = Sweep(f"{k}", images, STEPS, Board(square_m=0.04, measured=True))
            stacks.append(BoardStack(sweep, Path(f"{k}"), f"{k}", "step", 1, images.shape[1:], None, math.nan, "", ()))
        return stacks, Measured(value=focal, std=FOCAL_RATIO * focal, source="user")

    def row(self) -> dict[str, Any]:
        """Errors and standard errors in percent: of the gain, and of the focus at every step (of the range)."""
        stacks, focal = self.stacks_and_focal()
        row: dict[str, Any] = {"boards": self.n_boards, "noise": self.noise, "seed": self.seed}
        start = time.process_time()
        try:
            found = calibrate(stacks, focal_px=focal).profile
        except CalibrationError as error:
            return {**row, "refused": str(error)}
        seconds = time.process_time() - start
        camera, pupil = self.camera, found.pupil_diameter_m
        percent = 100 / (camera.near_dpt - camera.far_dpt)
        focus, optics = found.focus_dpt(STEPS), found.optics(STEPS)
        error = focus - camera.focus_dpt(STEPS)
        map_std = np.interp(STEPS, found.focus.positions, found.focus.std_dpt)
        stopped = self.jitter_dpt * self.rng(3).standard_normal(len(STEPS))  # of a motor sent there once more
        return {
            **row,
            "gain": 100 * (pupil.value / camera.pupil_m - 1),
            "gain_std": 100 * float(np.hypot(pupil.std / camera.pupil_m, MEASURED_SQUARE_RATIO)),
            "focus": list(percent * error),
            "focus_std": list(percent * np.hypot(map_std, found.distance_scale_std * focus)),
            "frame": list(percent * (error - stopped)),
            "frame_std": list(percent * optics.focus_std_dpt),
            "floor_px": found.floor_sigma_px.value - camera.floor_px,
            "breathing": list(100 * (optics.scale * camera.focal_at(500) / camera.focal_at(STEPS) - 1)),
            "seconds": seconds,
        }


def image_rows(n_seeds: int, *, run: bool) -> list[dict[str, Any]]:
    """Trials of the table from rendered frames: those that this version of the code has done, and with `run` the rest.

    Every trial is written to ROWS when it is done, so that the table can be interrupted.
    """
    sources = [Path("calibration", f"{name}.py") for name in MEASURING]
    version = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    done = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
    rows = {(row["boards"], row["noise"], row["seed"]): row for row in done if row["version"] == version}
    if run:
        for seed in range(FIRST_SEED, FIRST_SEED + n_seeds):
            for n_boards in N_BOARDS:
                for noise in NOISES:
                    if (n_boards, noise, seed) in rows:
                        continue
                    row = {**Trial(n_boards, noise, seed).row(), "version": version}
                    with ROWS.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    rows[n_boards, noise, seed] = row
                    print(json.dumps({k: v for k, v in row.items() if not isinstance(v, list)}), flush=True)
    return list(rows.values())


def print_image_table(rows: list[dict[str, Any]]) -> None:
    """One line for every number of boards and noise, and one for all: errors in percent, coverage of 95 % intervals."""
    print("boards  noise trials refused  gain rms   worst focus rms   worst  covered: gain  focus  frame")
    cells = [(n, noise) for n in N_BOARDS for noise in NOISES]
    for boards, noise in [*cells, (None, None)]:
        here = [row for row in rows if boards is None or (row["boards"], row["noise"]) == (boards, noise)]
        fitted = [row for row in here if "refused" not in row]
        if not fitted:
            continue
        gain = np.array([row["gain"] for row in fitted])
        focus = np.sqrt([np.mean(np.square(row["focus"])) for row in fitted])
        covered = [
            np.mean([np.abs(row[name]) < 1.96 * np.array(row[f"{name}_std"]) for row in fitted])
            for name in ("gain", "focus", "frame")
        ]
        print(
            f"{boards or 'all':>6} {noise or '':>6} {len(fitted):6d} {len(here) - len(fitted):7d} "
            f"{np.sqrt(np.mean(gain**2)):9.3f} {np.abs(gain).max():7.3f} {np.sqrt(np.mean(focus**2)):9.3f} "
            f"{focus.max():7.3f} {covered[0]:14.2f} {covered[1]:6.2f} {covered[2]:6.2f}",
            flush=True,
        )


def measurement_table(n_seeds: int) -> list[dict[str, float | str]]:
    """Rows of errors and coverage by number of boards and noise, over `LENSES` and seeds."""
    rows = []
    for name, boards in BOARDS.items():
        for noise in (0.005, 0.01, 0.02):
            gain, focus, gain_hit, focus_hit, refused = [], [], [], [], 0
            for n_lens, lens in enumerate(LENSES):
                truth = Truth(**{**vars(lens), "noise": noise})
                for seed in range(n_seeds // len(LENSES)):
                    try:
                        fit = fit_blur(truth.observe(boards, STEPS, 1000 * n_lens + seed + 500))
                    except CalibrationError:
                        refused += 1
                        continue
                    error = fit.law(STEPS) - truth.focus_dpt(STEPS)
                    gain.append(fit.pupil_m / truth.pupil_m - 1)
                    focus.append(np.sqrt(np.mean(error**2)) / (truth.near_dpt - truth.far_dpt))
                    gain_hit.append(abs(fit.pupil_m - truth.pupil_m) < 1.96 * fit.pupil_std_m)
                    focus_hit.append(np.mean(np.abs(error) < 1.96 * fit.focus_std_dpt(STEPS)))
            rows.append(
                {
                    "boards": name,
                    "noise": noise,
                    "gain_rms_percent": 100 * float(np.sqrt(np.mean(np.square(gain)))),
                    "gain_worst_percent": 100 * float(np.max(np.abs(gain))),
                    "focus_rms_percent": 100 * float(np.sqrt(np.mean(np.square(focus)))),
                    "focus_worst_percent": 100 * float(np.max(focus)),
                    "gain_coverage": float(np.mean(gain_hit)),
                    "focus_coverage": float(np.mean(focus_hit)),
                    "refused": refused,
                }
            )
            layout = (
                "{boards:>9} {noise:6.3f} {gain_rms_percent:9.3f} {gain_worst_percent:7.3f} {focus_rms_percent:9.3f} "
                "{focus_worst_percent:7.3f} {gain_coverage:9.2f} {focus_coverage:7.2f} {refused:5d}"
            )
            print(layout.format(**rows[-1]), flush=True)
    return rows


def speed(folder: Path) -> dict[str, float]:
    """CPU and wall seconds and peak memory of calibrating 4 sweeps x 11 frames x 24 megapixels."""
    camera, board = SPEED_CAMERA, Board(square_m=0.04, measured=True)
    paths = []
    for k, pose in enumerate(SPEED_POSES):
        images = camera.sweep(board, camera.pose(board, **pose), STEPS, seed=k)
        path = folder / f"sweep{k}.h5"
        with StackWriter.create(
            path, n_frames=11, height=4000, width=6000, transfer="linear", board=board.model_dump(), sync=False
        ) as writer:
            for i, image in enumerate(images):
                large = np.kron((image * 255).astype(np.uint8), np.ones((4, 4), np.uint8))  # binning gives it back
                writer.append(i, np.repeat(large[..., None], 3, axis=2), focus_command=float(STEPS[i]))
            writer.finish()
        paths.append(path)
    cpu, wall = time.process_time(), time.perf_counter()
    stacks = [load_board_stack(path) for path in (*paths, *paths)]
    load_wall = time.perf_counter() - wall
    calibrate(stacks, focal_px=Measured(value=float(camera.focal_at(500)) * 4, std=5.0, source="user"))
    return {
        "cpu_s": time.process_time() - cpu,
        "wall_s": time.perf_counter() - wall,
        "of_which_reading_s": load_wall,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def main(argv: list[str]) -> None:
    """Print the tables and write bench-results/calibration.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--table", action="store_true", help="run the trials from images that are missing")
    parser.add_argument("--speed", action="store_true", help="only the time of a calibration from 24 megapixels")
    options = parser.parse_args(argv)
    out = Path("bench-results")
    out.mkdir(exist_ok=True)
    if options.speed:
        with tempfile.TemporaryDirectory() as folder:
            result = speed(Path(folder))
        print(result)
        (out / "calibration_speed.json").write_text(json.dumps(result, indent=1))
        return
    measured = []
    if not options.table:
        print("measurement level, percent of gain and of the dioptre range")
        print("   boards  noise  gain rms   worst focus rms   worst  gain cov foc.cov refused")
        measured = measurement_table(options.seeds)
    images = image_rows(options.seeds, run=options.table)
    print("image level (1 board is one tilted by about 50 degrees)")
    print_image_table(images)
    (out / "calibration.json").write_text(json.dumps({"measurements": measured, "images": images}, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
