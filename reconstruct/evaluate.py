"""Errors of finished reconstructions against true depth, as a table or JSON."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from capture.decode import decode_image, to_linear
from capture.errors import DaifError, DataError, SomeFailedError, UsageError
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
            return TruthFile(result.read_map(path), None)
    for path in (folder / name / "depth.png", folder / f"{name}.png"):
        if path.is_file():
            try:
                millimetres = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
            except cv2.error:  # what it refuses to decode, such as a picture beyond its limits
                millimetres = None
            if millimetres is None or millimetres.dtype != np.uint16 or millimetres.ndim != 2:
                raise DataError(f"{path} must be a 16-bit grey PNG of depth in millimetres, 0 = unknown")
            depth_m = np.where(millimetres > 0, millimetres / np.float32(1e3), np.nan).astype(np.float32)
            photograph = path.with_name("rgb.png")
            aif = to_linear(*decode_image(photograph)[:3]) if photograph.is_file() else None
            return TruthFile(depth_m, aif)
    raise DataError(f"no truth for {name} in {folder}: expected {name}.h5, {name}/depth.png (mm) or {name}.npy")


def run(out: Path, truth: Path, *, as_json: bool) -> None:
    """Print the table for every finished reconstruction in `out` (or for `out` itself).

    Raises SomeFailedError at the end if some could not be scored, each of which was named; with a single one its own
    error instead.
    """
    for folder, what in ((out, "that `daif reconstruct -o` wrote"), (truth, "with the true depths")):
        if not folder.is_dir():
            raise UsageError(f"{folder} is not a folder; give the one {what}")
    folders = [out] if result.is_complete(out) else sorted(p for p in out.iterdir() if result.is_complete(p))
    if not folders:
        raise DataError(f"{out} holds no finished reconstruction; run `daif reconstruct ... -o {out}` first")
    scores: dict[str, dict[str, float]] = {}
    failed: list[str] = []
    for folder in folders:
        try:
            scores[folder.name] = _score(folder, truth)
        except DaifError as error:
            if len(folders) == 1:
                raise
            failed.append(folder.name)
            Console(stderr=True).print(f"daif: {error}", markup=False, highlight=False, soft_wrap=True)
    if as_json:
        print(json.dumps(result.json_ready(scores), indent=2, allow_nan=False))
    elif scores:
        _print(f"{out} against {truth}", scores)
    if failed:
        raise SomeFailedError(f"{len(failed)} of {len(folders)} reconstructions were not scored: {', '.join(failed)}")


def _print(title: str, scores: dict[str, dict[str, float]]) -> None:
    table = Table(title=title, caption=metrics.NOTE)
    columns = [column for column in metrics.LABELS if any(column in values for values in scores.values())]
    table.add_column("stack")
    for column in columns:
        table.add_column(metrics.LABELS[column], justify="right")
    for name, values in scores.items():
        table.add_row(name, *(_shown(values.get(column, math.nan)) for column in columns))
    if len(scores) > 1:
        table.add_section()
        table.add_row("median", *(_shown(_median(scores, column)) for column in columns))
    Console(width=None if Console().is_terminal else 200).print(table)


def _median(scores: dict[str, dict[str, float]], column: str) -> float:
    there = [values[column] for values in scores.values() if not math.isnan(values.get(column, math.nan))]
    return float(np.median(there)) if there else math.nan


def _shown(figure: float) -> str:
    return "" if math.isnan(figure) else f"{figure:.4g}"


def _score(folder: Path, truth_folder: Path) -> dict[str, float]:
    answer = result.load(folder)
    if not answer.metric:
        raise DataError(
            f"{folder} is relative (its stack was uncalibrated): its depth has no unit to compare with metres; "
            "reconstruct it with --lens, or import it with focus distances"
        )
    truth = read_truth(truth_folder, folder.name)
    pictures = {"depth": truth.depth_m} | ({} if truth.aif is None else {"sharp image": truth.aif})
    for what, picture in pictures.items():
        if picture.shape[:2] != answer.confidence.shape:
            raise DataError(
                f"the true {what} of {folder.name} is {picture.shape[1]} x {picture.shape[0]} px and the "
                f"reconstruction {answer.confidence.shape[1]} x {answer.confidence.shape[0]}; they must be the same "
                "picture"
            )
    if not metrics.known_pixels(truth.depth_m).any():
        raise DataError(f"the true depth of {folder.name} in {truth_folder} is unknown (NaN or 0) at every pixel")
    return score(answer, truth.depth_m, truth.aif)


def score(
    answer: result.Reconstruction, truth_m: NDArray[np.float32], truth_aif: NDArray[np.float32] | None
) -> dict[str, float]:
    """Every figure of `metrics.LABELS` that this truth, known at one pixel at least, allows."""
    scores = metrics.depth_metrics(answer, truth_m)
    return scores if truth_aif is None else scores | metrics.image_metrics(answer.aif, truth_aif)
