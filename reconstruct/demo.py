"""`daif demo`: the whole path without hardware, on a photograph whose depth was measured."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from capture.lens import Lens
from capture.optics import Condition, SimulatedSweep, simulate_sweep
from capture.scenes import motorcycle
from capture.stack import write_stack
from reconstruct import job, metrics, result
from reconstruct.infer import Settings
from reconstruct.shape_from_focus import shape_from_focus, sharpest_frame

N_FRAMES = 7
CONDITION = Condition(psf="disc", noise_std=0.01, bits=8, breathing=0.02)
APSC_WIDTH_M = 0.0235
BASELINE_WINDOW_PX = 15


def run(out: Path) -> None:
    """Simulate, reconstruct, report; prints a table of errors against the measured depth."""
    console = Console()
    scene = motorcycle()
    lens = Lens(focal_length_m=0.085, f_number=2.8, pixel_pitch_m=APSC_WIDTH_M / scene.width)
    near_m, far_m = np.nanpercentile(scene.depth_m, [0.5, 99.5])
    focus_dpt = np.linspace(1 / near_m, 1 / far_m, N_FRAMES)
    out.mkdir(parents=True, exist_ok=True)

    console.print(
        f"1. Sweep: {N_FRAMES} frames of {scene.width} x {scene.height} px through a simulated 85 mm f/2.8 lens with "
        "disc blur, occlusion, 1 % noise, 8 bit and 2 % breathing, focused at "
        + ", ".join(f"{1 / q:.2f}" for q in focus_dpt)
        + " m"
    )
    started = time.perf_counter()
    sweep = simulate_sweep(scene, lens, focus_dpt, CONDITION, seed=0)
    stack_file = out / "motorcycle.h5"
    write_stack(
        stack_file,
        sweep.frames,
        focus_distance_m=1 / sweep.focus_dpt,
        lens=lens,
        transfer=sweep.transfer,
        truth_depth_m=scene.depth_m,
        truth_aif=scene.aif,
        overwrite=True,
    )
    console.print(f"   {stack_file} ({time.perf_counter() - started:.0f} s)")

    console.print("2. Reconstruct: align, estimate depth, fuse the all-in-focus image")
    record = job.process_stack(str(stack_file), job.Job(str(out), Settings(compare=True), force=True))
    console.print(f"   {record['folder']} ({record['summary']['seconds']:.1f} s)")

    console.print(_table(sweep, result.load(Path(record["folder"]))))
    console.print(f"Open {record['folder']}/report.html")


def _table(sweep: SimulatedSweep, answer: result.Reconstruction) -> Table:
    """Errors of what one could do without daif, and of daif."""
    frames = sweep.linear()
    rows: list[tuple[str, NDArray[np.floating], NDArray[np.floating] | None]] = [
        ("constant depth", np.full(answer.confidence.shape, sweep.focus_dpt.mean()), None),
        (
            "sharpest frame per pixel (shape from focus)",
            shape_from_focus(frames, sweep.focus_dpt, BASELINE_WINDOW_PX),
            sharpest_frame(frames, BASELINE_WINDOW_PX),
        ),
        (f"daif, {answer.record['method']['name']}", answer.inverse_depth_dpt, answer.aif),
    ]
    table = Table(title="Errors against the measured depth", caption="AbsRel: mean of |depth - truth| / truth")
    for heading in ("", "AbsRel", "RMSE", "blur error", "picture PSNR"):
        table.add_column(heading, justify="right" if heading else "left")
    kappa = float(sweep.kappa_px_per_dpt.mean())
    for name, inverse_depth, aif in rows:
        errors = metrics.depth_errors(inverse_depth, sweep.scene.depth_m, kappa)
        table.add_row(
            name,
            f"{100 * errors['abs_rel']:.2f} %",
            f"{100 * errors['rmse_m']:.1f} cm",
            f"{errors['mae_coc_px']:.2f} px",
            "" if aif is None else f"{metrics.psnr(aif, sweep.scene.aif):.1f} dB",
        )
    return table
