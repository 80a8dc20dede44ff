"""The protocols that published depth-from-focus tables are scored with, and those tables' rows.

Each follows the authors' evaluation code: same size, mask, range, unit, and mean of scenes (facts read there, sources
beside each). Where the code leaves something open, or we cannot follow it, the protocol says so in `notes`, which are
printed under the table.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capture.errors import DataError, UsageError
from reconstruct import metrics, result
from reconstruct.datasets import Ddff12, open_dataset

FloatMap = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Published:
    """A row of a published table: `values` by the keys of `Protocol.columns`."""

    method: str
    source: str
    values: dict[str, float]


@dataclass(frozen=True)
class Protocol:
    """How one table is scored.

    Attributes:
        scenes: how many scenes the table is over; None where it depends on the file at hand.
        columns: key of a figure to its heading.
        score: (found depth in metres (H, W), truth of the data set (H', W')) to figures by key.
        published: rows printed beside ours.
        notes: what the table is over, and where we depart from it or cannot tell.
    """

    scenes: int | None
    columns: dict[str, str]
    score: Callable[[FloatMap, FloatMap], dict[str, float]]
    published: tuple[Published, ...]
    notes: tuple[str, ...]


# --- the figures, each as the authors' code computes it


def dered_errors(found_m: FloatMap, truth_m: FloatMap) -> dict[str, float]:
    """Figures of the paper's NYUv2 table (Ehzoahis/DEReD, scripts/trainer.py `eval_model`, utils `eval_depth`).

    `found_m`, at half size, is enlarged by 2 (bilinear, corners aligned), truth cut to 0.1 to 10 m; all pixels count.
    """
    import torch

    height, width = truth_m.shape
    if found_m.shape != (height // 2, width // 2):
        raise DataError(
            f"protocol nyuv2 needs a reconstruction of {width // 2} x {height // 2} px, half the size of its truth, "
            f"found {found_m.shape[1]} x {found_m.shape[0]}; reconstruct what `daif import-dataset` wrote"
        )
    whole = torch.from_numpy(np.asarray(np.clip(found_m, 0, 10), np.float32))[None, None]
    found = torch.nn.functional.interpolate(whole, scale_factor=2, mode="bilinear", align_corners=True)[0, 0].numpy()
    found, truth = found.astype(np.float64), np.clip(truth_m.astype(np.float64), 0.1, 10)
    error, tiny = np.abs(truth - found), 1e-8
    ratio = np.maximum(truth / (found + tiny), found / (truth + tiny))
    return {
        "delta1": float(np.mean(ratio < 1.25)),
        "delta2": float(np.mean(ratio < 1.25**2)),
        "delta3": float(np.mean(ratio < 1.25**3)),
        "rmse": float(np.sqrt(np.mean(error**2))),
        "abs_rel": float(np.mean(error / truth)),
        "sq_rel": float(np.mean(error**2 / truth)),
        "rmse_log10": float(np.sqrt(np.mean((np.log10(truth + tiny) - np.log10(found + tiny)) ** 2))),
    }


def ddff_errors(found: FloatMap, truth: FloatMap) -> dict[str, float]:
    """Figures of the DDFF-12 benchmark over the pixels with truth > 0, deltas and bumpiness in percent.

    Any unit: disparity in DDFF-12, cut depth in FoD500 (soyers/ddff-pytorch, BaseDDFFEval.py; fuy34/DFV,
    eval_DDFF12.py and eval_FoD500.py). A scene without any truth scores 0 throughout, as there.
    Bumpiness is the norm of the Hessian of the error by Scharr filters, cut at 0.05.
    """
    from skimage.filters import scharr_h, scharr_v

    known = truth > 0
    names = ("mse", "rms", "log_rms", "abs_rel", "sq_rel", "delta1", "delta2", "delta3", "bump")
    if not known.any():
        return dict.fromkeys(names, 0.0)
    found, truth = np.asarray(found, np.float64), np.asarray(truth, np.float64)
    error = found - truth
    dx, dy = scharr_v(error), scharr_h(error)
    hessian = np.sqrt(sum(np.square(part) for part in (scharr_v(dx), scharr_h(dx), scharr_h(dy), scharr_v(dy))))
    a, b = found[known], truth[known]
    mse = float(np.mean((a - b) ** 2))
    positive = a > 0  # masked arrays leave the others out of the sum, not out of the count
    log_error = np.log(a[positive]) - np.log(b[positive])
    ratio = np.maximum(a[positive] / b[positive], b[positive] / a[positive])
    figures = (
        mse,
        np.sqrt(mse),
        np.sqrt(np.sum(log_error**2) / a.size),
        np.mean(np.abs(a - b) / b),
        np.mean((a - b) ** 2 / b),
        *(100 * np.count_nonzero(ratio < 1.25**k) / a.size for k in (1, 2, 3)),
        100 * np.mean(np.clip(hessian, 0, 0.05)[known]),
    )
    return dict(zip(names, map(float, figures), strict=True))


def ddff12_errors(found_m: FloatMap, truth_px: FloatMap) -> dict[str, float]:
    """`ddff_errors` in pixels of disparity."""
    _same_size(found_m, truth_px)
    return ddff_errors(Ddff12.PX_M / found_m, truth_px)


def defocusnet_errors(found_m: FloatMap, truth_m: FloatMap) -> dict[str, float]:
    """Both tables over FoD500's last 100 scenes.

    mae, mse, rmse: metres, where truth > 0 (albert100121/AiFDepthNet, test.py). cut_...: `ddff_errors` after both maps
    went through 16-bit PNG at 1e-4 m and were cut to 0 to 1.5 m (fuy34/DFV, FoD_test.py and eval_FoD500.py).
    """
    _same_size(found_m, truth_m)
    known = truth_m > 0
    error = (found_m - truth_m)[known].astype(np.float64)
    mse = float(np.mean(error**2)) if error.size else 0.0
    stored = [np.minimum(np.floor(np.clip(m, 0, 6.5) * 1e4) / 1e4, 1.5) for m in (found_m, truth_m)]
    cut = ddff_errors(*stored)
    whole = {"mae": float(np.mean(np.abs(error))) if error.size else 0.0, "mse": mse, "rmse": float(np.sqrt(mse))}
    return whole | {f"cut_{name}": value for name, value in cut.items()}


def zedd_errors(found_m: FloatMap, truth_m: FloatMap) -> dict[str, float]:
    """Figures of FOSSA's ZEDD table: share of pixels within a factor, and AbsRel, where truth is known."""
    _same_size(found_m, truth_m)
    known = np.isfinite(truth_m)
    if not known.any():
        raise DataError("a scene of ZEDD has no valid truth at all; unpack the data set again")
    found, truth = found_m[known].astype(np.float64), truth_m[known].astype(np.float64)
    ratio = np.maximum(found / truth, truth / found)
    shares = {f"d{t}": float(np.mean(ratio < t)) for t in (1.05, 1.15, 1.25)}
    return shares | {"abs_rel": float(np.mean(np.abs(found - truth) / truth))}


def _same_size(found: FloatMap, truth: FloatMap) -> None:
    if found.shape != truth.shape:
        raise DataError(
            f"the reconstruction is {found.shape[1]} x {found.shape[0]} px and the truth {truth.shape[1]} x "
            f"{truth.shape[0]}; reconstruct what `daif import-dataset` wrote"
        )


# --- the tables

_DDFF_COLUMNS = {
    "mse": "MSE",
    "rms": "RMS",
    "log_rms": "log RMS",
    "abs_rel": "AbsRel",
    "sq_rel": "SqRel",
    "delta1": "d1 %",
    "delta2": "d2 %",
    "delta3": "d3 %",
    "bump": "bump",
}
_DERED = "table image on the project page of arXiv 2303.10752"
_AIFDEPTH = "table image in the README of albert100121/AiFDepthNet"
_FOSSA = "README of princeton-vl/FOSSA"
_BORDER = (
    "Bumpiness at the outermost pixel: mirrored, as scikit-image does today; its version of that time set it to 0."
)
_FAR = "Found depth that is unknown or beyond 50 m counts as 50 m."


def _rows(source: str, keys: str, *rows: tuple[str | float, ...]) -> tuple[Published, ...]:
    """Published rows: (method, one number per word of `keys`)."""
    names = keys.split()
    return tuple(
        Published(str(method), source, dict(zip(names, map(float, numbers), strict=True))) for method, *numbers in rows
    )


PROTOCOLS = {
    "nyuv2": Protocol(
        scenes=654,
        columns={
            "delta1": "d1",
            "delta2": "d2",
            "delta3": "d3",
            "rmse": "RMSE (m)",
            "abs_rel": "AbsRel",
            "sq_rel": "SqRel",
            "rmse_log10": "RMSE log10",
        },
        score=dered_errors,
        published=_rows(
            _DERED,
            "delta1 delta2 delta3 rmse abs_rel",
            ("DEReD, no truth", 0.950, 0.979, 0.987, 0.325, 0.170),
            ("DFF-DFV, supervised", 0.967, 0.980, 0.990, 0.232, 0.445),
            ("Gur & Wolf, from AIF", 0.720, 0.887, 0.951, 0.649, 0.184),
            ("Suwajanakorn, no learning", 0.688, 0.802, 0.917, 0.950, 0.250),
        ),
        notes=(
            "Official 654 test scenes, stacks rendered at 320 x 240 (50 mm, f/8, 12 um; focus 1, 1.5, 2.5, 4, 6 m). "
            "Truth 640 x 480 cut to 0.1 to 10 m; no mask, crop or median scaling; mean of scenes.",
            "Frames: `import-dataset --renderer published` makes theirs (7 x 7 Gaussian, encoded values); the default "
            "is our simulated camera and not the published input.",
            "Found depth is cut to 0 to 10 m (their 'clip'); which of their two rescalings made the table is unknown.",
            "Their truth was read from 16-bit PNG at 1e-4 m, which holds 6.55 m at most; the tool that writes "
            "such files (xapharius/pytorch-nyuv2) wraps above. Ours does not: rows with AbsRel above 0.4 and d1 0.96 "
            "probably do.",
        ),
    ),
    "defocusnet": Protocol(
        scenes=100,
        columns={"mae": "MAE (m)", "mse": "MSE", "rmse": "RMSE (m)"}
        | {f"cut_{key}": f"{label}, cut" for key, label in _DDFF_COLUMNS.items()},
        score=defocusnet_errors,
        published=_rows(
            _AIFDEPTH,
            "mae rmse",
            ("AiFDepthNet", 0.0549, 0.1043),
            ("DefocusNet", 0.0637, 0.1207),
        ),
        notes=(
            "FoD500 scenes 400 to 499, mean of scenes. First three: where truth > 0 (AiFDepthNet's test.py, whose "
            "table is shown). 'cut': DFV's figures, depth cut to 0 to 1.5 m.",
            "The DefocusNet table of arXiv 2303.10752 is on another rendering that was never released: not shown.",
            _BORDER,
            _FAR,
        ),
    ),
    "ddff12": Protocol(
        scenes=None,
        columns=_DDFF_COLUMNS,
        score=ddff12_errors,
        published=_rows(
            _FOSSA,
            "mse rms abs_rel sq_rel delta1 delta2 delta3",
            ("FOSSA ViT-B, zero-shot", 0.0013, 0.0324, 0.2105, 0.0107, 60.75, 92.06, 96.79),
            ("FOSSA ViT-B, fine-tuned", 0.0003, 0.0148, 0.1088, 0.0025, 93.22, 98.66, 99.39),
        )
        + _rows(_AIFDEPTH, "mse abs_rel delta1 delta2 delta3", ("AiFDepthNet", 8.6e-4, 0.25, 68.3, 87.4, 94.0)),
        notes=(
            "Split 'val' of the file at hand, in pixels of disparity where truth > 0, mean of scenes.",
            "Compare like with like: FOSSA's rows are on DFV's file (its own split) with `import-dataset --frames "
            "0,2,4,6,9`; AiFDepthNet reads the official file with all ten frames.",
            "Truth is not cut to 0.0202 to 0.2825 px before scoring: DFV's script does not, the first one did.",
            _BORDER,
            _FAR,
        ),
    ),
    "zedd": Protocol(
        scenes=50,
        columns={"d1.05": "d < 1.05", "d1.15": "d < 1.15", "d1.25": "d < 1.25", "abs_rel": "AbsRel"},
        score=zedd_errors,
        published=_rows(
            _FOSSA,
            "d1.05 d1.15 d1.25 abs_rel",
            ("FOSSA ViT-S", 0.4450, 0.7866, 0.8858, 0.0985),
            ("FOSSA ViT-B", 0.4317, 0.8101, 0.9194, 0.0957),
        ),
        notes=(
            "Validation split (the test split is scored by its own server), F2.8, runs 1, 3, 5, 7, 9, the middle "
            "640 x 480 of 720 x 480; truth 0.01 to 1000 m; mean of scenes.",
            "The authors' loader was read; their file of figures could not be: d and AbsRel are the usual definitions.",
            _FAR,
        ),
    ),
}


# --- scoring


def run(name: str, out: Path, source: Path, *, subset: bool, as_json: bool) -> None:
    """Print the table of protocol `name` for the reconstructions in `out` of the data set at `source`.

    With `subset` whatever part of the scenes is there is scored, and no published row is printed beside it.
    """
    if name not in PROTOCOLS:
        raise UsageError(f"unknown protocol {name!r}; it must be one of {', '.join(PROTOCOLS)}")
    if not out.is_dir():
        raise UsageError(f"{out} is not a folder; give the one that `daif reconstruct -o` wrote")
    protocol = PROTOCOLS[name]
    data = open_dataset(name, source)
    there = [scene for scene in data.scenes if result.is_complete(out / scene)]
    wanted = protocol.scenes or len(data.scenes)
    if not there or (len(there) != wanted and not subset):
        raise DataError(
            f"{out} holds {len(there)} of the {wanted} scenes of protocol {name} ({next(iter(data.scenes))} ...); "
            + ("reconstruct the others" if there else "reconstruct what `daif import-dataset` wrote")
            + (", or add --subset to score these alone" if there else "")
        )
    scores = {scene: _score(protocol, out / scene, data.truth(scene)) for scene in there}
    mean = {key: float(np.mean([figures[key] for figures in scores.values()])) for key in protocol.columns}
    comparable = len(there) == wanted
    if as_json:
        document = {
            "protocol": name,
            "scenes": len(there),
            "scenes_of_the_table": wanted,
            "mean": mean,
            "published": [vars(row) for row in protocol.published] if comparable else [],
            "notes": list(protocol.notes),
            "per_scene": scores,
        }
        print(json.dumps(result.json_ready(document), indent=2, allow_nan=False))
        return
    _print(name, protocol, mean, len(there), wanted)


def _score(protocol: Protocol, folder: Path, truth: FloatMap) -> dict[str, float]:
    answer = result.load(folder)
    if not answer.metric:
        raise DataError(
            f"{folder} is relative (its stack was uncalibrated) and protocols need metres; reconstruct what "
            "`daif import-dataset` wrote"
        )
    inverse_dpt = np.nan_to_num(answer.inverse_depth_dpt, nan=0.0)
    try:
        return protocol.score(1 / np.maximum(inverse_dpt, metrics.FARTHEST_DPT), truth)
    except DataError as error:
        raise DataError(f"{folder}: {error}") from None


def _print(name: str, protocol: Protocol, mean: dict[str, float], count: int, wanted: int) -> None:
    from rich.console import Console
    from rich.table import Table

    rows = [(f"daif, {count} scenes", mean)]
    sources: list[str] = []
    notes = list(protocol.notes)
    if count == wanted:
        for row in protocol.published:
            if row.source not in sources:
                sources.append(row.source)
            rows.append((f"{row.method} [{sources.index(row.source) + 1}]", row.values))
    else:
        notes.insert(0, f"{count} of {wanted} scenes: not comparable with any published row, so none is shown.")
    foot = "\n".join([f"[{i}] published: {source}" for i, source in enumerate(sources, 1)] + notes)
    table = Table(title=f"protocol {name}", caption=foot, caption_justify="left")
    table.add_column("method")
    for label in protocol.columns.values():
        table.add_column(label, justify="right")
    for method, values in rows:
        table.add_row(method, *(f"{values[key]:.4g}" if key in values else "" for key in protocol.columns))
        if values is mean:
            table.add_section()
    Console(width=None if Console().is_terminal else 200, markup=False).print(table)
