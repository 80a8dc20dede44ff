"""`daif demo`: the whole path without hardware, on a photograph whose depth was measured."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from capture.lens import Lens
from capture.optics import Condition, simulate_sweep
from capture.scenes import motorcycle
from capture.stack import FocalStack, write_stack
from reconstruct import batch, metrics, result
from reconstruct.baselines import sharpest_frame
from reconstruct.infer import Settings

N_FRAMES = 7
CONDITION = Condition(psf="disc", noise_std=0.01, bits=8, breathing=0.02)
APSC_WIDTH_M = 0.0235


def run(out: Path) -> None:
    """Simulate, reconstruct, report; prints a table of errors against the measured depth."""
    console = Console()
    scene = motorcycle()
    lens = Lens(focal_length_m=0.085, f_number=2.8, pixel_pitch_m=APSC_WIDTH_M / scene.width)
    known = 1 / scene.depth_m[np.isfinite(scene.depth_m)]
    focus_dpt = np.linspace(*np.percentile(known, [99.5, 0.5]), N_FRAMES)
    out.mkdir(parents=True, exist_ok=True)
    stack_file = out / "motorcycle.h5"

    console.print(
        f"1. Sweep: {N_FRAMES} frames of {scene.width} x {scene.height} px through a simulated 85 mm f/2.8 lens, focused at "
        + ", ".join(f"{1 / q:.2f}" for q in focus_dpt)
        + " m (disc blur, occlusion, 1 % noise, 8 bit, 2 % breathing)"
    )
    started = time.perf_counter()
    sweep = simulate_sweep(scene, lens, focus_dpt, CONDITION, seed=0)
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
    record = batch.process_stack(stack_file, batch.Job(out, Settings(method="plane-sweep"), force=True))
    console.print(f"   {record['folder']} ({record['summary']['seconds']:.1f} s)")

    console.print(_table(stack_file, result.load(record["folder"])))
    console.print(f"Open {record['folder'] / 'report.html'}")


def _table(stack_file: Path, answer: result.Reconstruction) -> Table:
    """Errors of what one could do without daif, and with it."""
    with FocalStack.open(stack_file) as stack:
        frames = torch.from_numpy(stack.linear_stack()).permute(0, 3, 1, 2)
        focus = torch.as_tensor(stack.focus_dpt, dtype=torch.float32)
        truth_m, truth_aif = stack.truth_depth_m, stack.truth_aif
    table = Table(title="Errors against the measured depth", caption="AbsRel: mean |depth - truth| / truth")
    for heading in ("", "AbsRel", "RMSE", "within 5 %", "picture PSNR"):
        table.add_column(heading, justify="left" if not heading else "right")
    constant = torch.full(truth_m.shape, float(focus.mean()))
    sharpest = sharpest_frame(frames, focus)
    rows = [
        ("constant depth", constant, None),
        ("sharpest frame per pixel", sharpest.inverse_depth_dpt, sharpest.aif),
        ("daif, plane sweep", torch.from_numpy(answer.inverse_depth_dpt), torch.from_numpy(answer.aif).permute(2, 0, 1)),
    ]
    for name, inverse_depth, aif in rows:
        depth = 1 / inverse_depth.numpy()
        known = np.isfinite(truth_m) & np.isfinite(depth)
        error = np.abs(depth - truth_m)[known]
        psnr = "" if aif is None else f"{metrics.psnr(aif.permute(1, 2, 0).numpy(), truth_aif):.1f} dB"
        table.add_row(
            name,
            f"{100 * (error / truth_m[known]).mean():.2f} %",
            f"{100 * np.sqrt((error**2).mean()):.1f} cm",
            f"{100 * (error < 0.05 * truth_m[known]).mean():.0f} %",
            psnr,
        )
    return table
