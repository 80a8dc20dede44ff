"""The training-free method on 15 RGB-D scenes, two optics and six conditions, beside shape from focus.

    python -m tests.benchmarks foundation            (everything; the first run renders the stacks, minutes)

Prints per-scene errors under noise, means for every condition, the time for one 640 x 480 x 5 stack, and each goal of
issue 2 as met or missed; everything goes to bench-results/foundation.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from capture.optics import sweep_for_scene
from capture.scenes import Scene, motorcycle
from reconstruct import metrics
from reconstruct.plane_sweep import plane_sweep
from reconstruct.shape_from_focus import WINDOWS_PX, shape_from_focus, sharpest_frame
from tests.benchmarks.foundation_stacks import (
    OPTICS,
    ROOT,
    STACK_CONDITIONS,
    FoundationStack,
    foundation_stack,
    half_size_scene,
    scene_names,
    stack_through,
)

RESULT = ROOT / "bench-results" / "foundation.json"
MOTORCYCLE_MAX_COC_PX = 36.0  # blur standard deviation up to 9 px at 640 px width, as in notes/performance.md 3.3
Scores = dict[str, float]
Rows = dict[str, dict[str, Scores]]  # scene -> method -> figures
Tables = dict[tuple[str, str], Rows]  # (optics, condition) -> rows


@dataclass
class Goal:
    """A figure beside what it should be."""

    name: str
    figure: float
    goal: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.figure >= self.goal if self.at_least else self.figure <= self.goal

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        return f"{'met   ' if self.met else 'MISSED'} {self.figure:7.3f} {sign} {self.goal:5.3f}  {self.name}"


@dataclass
class Scored:
    """What `metrics.depth_metrics` reads."""

    inverse_depth_dpt: NDArray[np.float32]
    std_dpt: NDArray[np.float32]
    confidence: NDArray[np.float32]
    kappa_px_per_dpt: NDArray[np.float64]


Pool = list[tuple[NDArray[np.floating], NDArray[np.floating]]]  # (error in px of CoC, confidence) of every scene


def pooled_cut(pool: Pool) -> float:
    """How much the MAE over the pixels of all scenes falls when only the most confident 70 % of them all are kept."""
    error, confidence = (np.concatenate(part) for part in zip(*pool, strict=True))
    kept = np.argsort(-confidence, kind="stable")[: round(0.7 * error.size)]
    return 1 - float(error[kept].mean() / error.mean())


def score(stack: FoundationStack, pool: Pool) -> dict[str, Scores]:
    """Figures of every method on one stack: "sweep", "sff9" ... and "constant"; the sweep's pixels go into `pool`."""
    truth = stack.scene.depth_m
    kappa = float(stack.kappa.mean())
    scores: dict[str, Scores] = {}
    for window in WINDOWS_PX:
        depth = shape_from_focus(stack.frames, stack.focus_dpt, window)
        scores[f"sff{window}"] = metrics.depth_errors(depth, truth, kappa) | metrics.image_metrics(
            sharpest_frame(stack.frames, window), stack.scene.aif
        )
    middle = np.full(truth.shape, np.nanmedian(1 / truth), np.float32)
    scores["constant"] = metrics.depth_errors(middle, truth, kappa)
    start = time.process_time()
    found = plane_sweep(*tensors(stack), valid=torch.tensor(stack.valid))
    seconds = time.process_time() - start
    answer = Scored(
        found.inverse_depth_dpt.numpy(), found.std_dpt.numpy(), found.confidence.numpy(), np.asarray(stack.kappa)
    )
    known = np.isfinite(truth) & (truth > 0)
    error_px = kappa * np.abs(answer.inverse_depth_dpt[known] - 1 / truth[known])
    pool.append((error_px, answer.confidence[known]))
    scores["sweep"] = (
        metrics.depth_metrics(answer, truth)
        | metrics.image_metrics(found.aif.permute(1, 2, 0).numpy(), stack.scene.aif)
        | {"cpu_s": seconds}
    )
    return scores


def tensors(stack: FoundationStack) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """frames (S, 3, H, W), focus and kappa (S,)."""
    return (
        torch.from_numpy(stack.frames).permute(0, 3, 1, 2).contiguous(),
        torch.as_tensor(stack.focus_dpt, dtype=torch.float32),
        torch.as_tensor(stack.kappa, dtype=torch.float32),
    )


def motorcycle_full_size(runs: int = 5) -> Scores:
    """Errors and median CPU seconds of depth + all-in-focus image on Motorcycle, 640 x 480 x 5, 1 % noise."""
    whole = motorcycle()
    whole = whole.resized(480, round(whole.width * 480 / whole.height))
    left = (whole.width - 640) // 2
    scene = Scene(whole.aif[:, left : left + 640], whole.depth_m[:, left : left + 640], "motorcycle_640x480")
    stack = stack_through(scene, *sweep_for_scene(scene, 5, MOTORCYCLE_MAX_COC_PX), "noisy")
    seconds = []
    for _ in range(runs):
        start = time.process_time()
        found = plane_sweep(*tensors(stack))
        seconds.append(time.process_time() - start)
    start = time.process_time()
    shape_from_focus(stack.frames, stack.focus_dpt, 9)
    sharpest_frame(stack.frames, 9)
    peer = time.process_time() - start
    scores = metrics.depth_errors(found.inverse_depth_dpt.numpy(), scene.depth_m, float(stack.kappa.mean()))
    return scores | {"cpu_s": float(np.median(seconds)), "sff9_cpu_s": peer}


def means(rows: Rows, method: str) -> Scores:
    """Mean over scenes of every figure of `method`."""
    names = next(iter(rows.values()))[method]
    return {name: float(np.nanmean([row[method][name] for row in rows.values()])) for name in names}


def best_window(rows: Rows) -> str:
    """The shape-from-focus window with the lowest mean error over the scenes."""
    return min((f"sff{w}" for w in WINDOWS_PX), key=lambda name: means(rows, name)["mae_coc_px"])


def goals(tables: Tables, motorcycle_scores: Scores, pool: Pool) -> list[Goal]:
    """Every goal of issue 2, item 7, with what was measured."""
    base = tables["dslr", "noisy"]
    peer = best_window(base)
    mine = means(base, "sweep")
    ratio = mine["mae_coc_px"] / means(base, peer)["mae_coc_px"]
    best_aif = {name: max(row[f"sff{w}"]["psnr_db"] for w in WINDOWS_PX) for name, row in base.items()}
    gain = [row["sweep"]["psnr_db"] - best_aif[name] for name, row in base.items()]
    found = [
        Goal(f"mean MAE, ratio to {peer} (dslr, noisy)", ratio, 0.6),
        Goal("median error, px of blur std (= CoC / 4)", mine["median_coc_px"] / 4, 0.12),
        Goal("median error, px of CoC (the same number read the strict way)", mine["median_coc_px"], 0.12),
        Goal("Motorcycle 640x480x5 AbsRel", motorcycle_scores["abs_rel"], 0.070),
        Goal("Motorcycle 640x480x5 CPU s, one core", motorcycle_scores["cpu_s"], 1.5),
        Goal("AIF PSNR above the best sharpest-frame window, median dB", float(np.median(gain)), 1.5, at_least=True),
        Goal("AIF PSNR above it on the worst scene, dB", float(min(gain)), 0.0, at_least=True),
        Goal("MAE cut, most confident 70 % of the pixels of all scenes", pooled_cut(pool), 0.5, at_least=True),
        Goal("MAE cut, most confident 70 % of each scene, mean", mine["kept70_cut"], 0.5, at_least=True),
    ]
    for kind, condition in (("disc blur", "disc_noisy"), ("3 x noise", "noisy3")):
        if ("dslr", condition) in tables:
            cost = means(tables["dslr", condition], "sweep")["abs_rel"] / mine["abs_rel"]
            found.append(Goal(f"AbsRel, {kind} / base", cost, 1.25))
    return found


def print_scenes(rows: Rows, title: str) -> None:
    peer = best_window(rows)
    print(f"\n{title}: per scene; MAE and median in px of blur std (CoC / 4)")
    print(
        f"{'scene':18} {'AbsRel':>7} {'RMSE m':>7} {'d1':>6} {'MAE':>6} {'median':>7} {'edges':>6} {'rest':>6}", end=" "
    )
    print(f"{peer:>6} {'AUSE':>6} {'1 std':>6} {'cut70':>6} {'PSNR':>6} {'sharp.':>6} {'SSIM':>6} {'s':>5}")
    for name, row in rows.items():
        r, other = row["sweep"], row[peer]
        sharpest = max(row[f"sff{w}"]["psnr_db"] for w in WINDOWS_PX)
        px = [r[k] / 4 for k in ("mae_coc_px", "median_coc_px", "edge_mae_coc_px", "flat_mae_coc_px")]
        print(f"{name:18} {r['abs_rel']:7.4f} {r['rmse_m']:7.3f} {r['delta1']:6.3f}", end=" ")
        print(f"{px[0]:6.3f} {px[1]:7.3f} {px[2]:6.2f} {px[3]:6.2f} {other['mae_coc_px'] / 4:6.3f}", end=" ")
        print(f"{r['ause']:6.3f} {r['coverage']:6.2f} {r['kept70_cut']:6.2f}", end=" ")
        print(f"{r['psnr_db']:6.2f} {sharpest:6.2f} {r['ssim']:6.3f} {r['cpu_s']:5.2f}")


def print_means(tables: Tables) -> None:
    print("\nmean of scenes")
    print(f"{'optics':6} {'condition':11} {'method':9} {'AbsRel':>7} {'RMSE m':>7} {'d1':>6} {'MAE dpt':>8}", end=" ")
    print(f"{'MAE px':>7} {'med. px':>8} {'PSNR':>6} {'SSIM':>6} {'AUSE':>6} {'1 std':>6} {'cut70':>6}")
    for (optics, condition), rows in tables.items():
        for method in ("constant", *(f"sff{w}" for w in WINDOWS_PX), "sweep"):
            m = {name: float("nan") for name in metrics.LABELS} | means(rows, method)
            print(f"{optics:6} {condition:11} {method:9} {m['abs_rel']:7.4f} {m['rmse_m']:7.3f}", end=" ")
            print(f"{m['delta1']:6.3f} {m['mae_dpt']:8.4f} {m['mae_coc_px'] / 4:7.3f}", end=" ")
            print(f"{m['median_coc_px'] / 4:8.3f} {m['psnr_db']:6.2f} {m['ssim']:6.3f}", end=" ")
            print(f"{m['ause']:6.3f} {m['coverage']:6.2f} {m['kept70_cut']:6.2f}")


def main(argv: list[str]) -> None:
    """Runs the table; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="foundation", description=__doc__)
    parser.add_argument("--optics", nargs="+", default=OPTICS, choices=OPTICS)
    parser.add_argument("--conditions", nargs="+", default=list(STACK_CONDITIONS), choices=list(STACK_CONDITIONS))
    chosen = parser.parse_args(argv)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    scenes = [half_size_scene(name) for name in scene_names()]
    tables: Tables = {}
    pools: dict[tuple[str, str], Pool] = {}
    for optics in chosen.optics:
        for condition in chosen.conditions:
            pool = pools[optics, condition] = []
            tables[optics, condition] = {s.name: score(foundation_stack(s, optics, condition), pool) for s in scenes}
            if condition == "noisy":
                print_scenes(tables[optics, condition], f"{optics}, noisy")
    print_means(tables)
    result: dict[str, Any] = {"/".join(key): rows for key, rows in tables.items()}
    if ("dslr", "noisy") in tables:
        full = motorcycle_full_size()
        reached = goals(tables, full, pools["dslr", "noisy"])
        print(f"\nMotorcycle 640x480x5: {full['cpu_s']:.2f} s, shape from focus 9x9 {full['sff9_cpu_s']:.2f} s\n")
        for goal in reached:
            print(goal)
        result |= {"motorcycle_640x480": full, "goals": [asdict(goal) | {"met": goal.met} for goal in reached]}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
