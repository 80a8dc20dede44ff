"""Errors of finished reconstructions against true depth, as a table or JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from capture.decode import decode_image, to_linear
from capture.errors import DataError, UsageError
from capture.stack import FocalStack
from reconstruct import metrics, result


@dataclass(frozen=True)
class TruthFile:
    """True depth (H, W) in metres with NaN where unknown, and the true AIF (H, W, 3) linear if there is one."""

    depth_m: NDArray[np.float32]
    aif: NDArray[np.float32] | None


def read_truth(folder: Path, name: str) -> TruthFile:
    """The truth of stack `name` below `folder`; DataError naming what was looked for."""
    stack_file = folder / f"{name}.h5"
    if stack_file.is_file():
        with FocalStack.open(stack_file) as stack:
            if stack.truth_depth_m is None:
                raise DataError(f"{stack_file} holds no ground truth (dataset /ground_truth/depth)")
            return TruthFile(stack.truth_depth_m, stack.truth_aif)
    for path in (folder / name / "depth.npy", folder / f"{name}.npy"):
        if path.is_file():
            return TruthFile(np.load(path, allow_pickle=False).astype(np.float32), None)
    for path in (folder / name / "depth.png", folder / f"{name}.png"):
        if path.is_file():
            millimetres = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
            if millimetres is None or millimetres.dtype != np.uint16 or millimetres.ndim != 2:
                raise DataError(f"{path} must be a 16-bit grey PNG of depth in millimetres, 0 = unknown")
            depth_m = np.where(millimetres > 0, millimetres / np.float32(1e3), np.nan).astype(np.float32)
            photograph = path.with_name("rgb.png")
            aif = to_linear(*decode_image(photograph)[:3]) if photograph.is_file() else None
            return TruthFile(depth_m, aif)
    raise DataError(f"no truth for {name} in {folder}: expected {name}.h5, {name}/depth.png (mm) or {name}.npy")


def run(out: Path, truth: Path, *, as_json: bool) -> None:
    """Print the table for every finished reconstruction in `out` (or for `out` itself)."""
    if not out.is_dir():
        raise UsageError(f"{out} is not a folder; give the one that `daif reconstruct -o` wrote")
    folders = [out] if result.is_complete(out) else sorted(p for p in out.iterdir() if result.is_complete(p))
    if not folders:
        raise DataError(f"{out} holds no finished reconstruction; run `daif reconstruct ... -o {out}` first")
    scores = {folder.name: _score(folder, truth) for folder in folders}
    if as_json:
        print(json.dumps(scores, indent=2))
        return
    table = Table(title=f"{out} against {truth}", caption=metrics.NOTE)
    columns = list(next(iter(scores.values())))
    table.add_column("stack")
    for column in columns:
        table.add_column(metrics.LABELS.get(column, column), justify="right")
    for name, values in scores.items():
        table.add_row(name, *(f"{values[c]:.4g}" if c in values else "" for c in columns))
    if len(scores) > 1:
        medians = [float(np.median([v[c] for v in scores.values() if c in v])) for c in columns]
        table.add_section()
        table.add_row("median", *(f"{m:.4g}" for m in medians))
    Console(width=None if Console().is_terminal else 200).print(table)


def _score(folder: Path, truth_folder: Path) -> dict[str, float]:
    answer = result.load(folder)
    truth = read_truth(truth_folder, folder.name)
    if truth.depth_m.shape != answer.confidence.shape:
        raise DataError(
            f"the truth of {folder.name} is {truth.depth_m.shape[1]} x {truth.depth_m.shape[0]} px and the "
            f"reconstruction {answer.confidence.shape[1]} x {answer.confidence.shape[0]}; they must be the same picture"
        )
    return score(answer, truth.depth_m, truth.aif)


def score(
    answer: result.Reconstruction, truth_m: NDArray[np.float32], truth_aif: NDArray[np.float32] | None
) -> dict[str, float]:
    """Every figure of `metrics.LABELS` that this truth allows."""
    scores = metrics.depth_metrics(answer, truth_m)
    return scores if truth_aif is None else scores | metrics.image_metrics(answer.aif, truth_aif)
