"""The networks on 15 RGB-D scenes that nothing was trained on: quality table and goals of issue 3.

    python -m tests.benchmarks network                     (all parts; half an hour of one core)
    python -m tests.benchmarks.bench_network --parts zero

Parts: `zero` plane sweep and `default` as shipped in every optics and condition (refinement: `bench_refine.py`);
`tune` the shipped network fine-tuned on ten of the scenes' own stacks and tried on the other five; `nothing` a new
`default` trained on the stacks alone; `paper` the published network and training on the stacks, on a short budget;
`motorcycle` 640 x 480 x 5, errors and CPU seconds. Weights are those in the package. Everything goes to
bench-results/network.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from capture.optics import sweep_for_scene
from capture.scenes import Scene, motorcycle
from reconstruct import metrics
from reconstruct.dataset import CapturedStack
from reconstruct.estimate import Estimate
from reconstruct.finetune import FINETUNE, FROM_NOTHING, PAPER, adapt, train_paper
from reconstruct.plane_sweep import plane_sweep
from reconstruct.predict import TrainedNetwork, load_network, predict
from reconstruct.shape_from_focus import WINDOWS_PX, shape_from_focus
from tests.benchmarks.bench_foundation import (
    MOTORCYCLE_MAX_COC_PX,
    Goal,
    Rows,
    Scored,
    Scores,
    best_window,
    means,
    tensors,
)
from tests.benchmarks.foundation_stacks import (
    OPTICS,
    ROOT,
    FoundationStack,
    foundation_stack,
    half_size_scene,
    scene_names,
    stack_through,
)

RESULT = ROOT / "bench-results" / "network.json"
CONDITIONS = ("disc", "noisy", "mismatched")
PARTS = ("zero", "motorcycle", "tune", "nothing", "paper")
CPU = torch.device("cpu")


def scored(stack: FoundationStack, estimate: Estimate, seconds: float) -> Scores:
    """Every figure of one answer."""
    answer = Scored(
        estimate.inverse_depth_dpt.numpy(),
        estimate.std_dpt.numpy(),
        estimate.confidence.numpy(),
        np.asarray(stack.kappa),
    )
    image = estimate.aif.permute(1, 2, 0).numpy()
    figures = metrics.depth_metrics(answer, stack.scene.depth_m) | metrics.image_metrics(image, stack.scene.aif)
    return figures | {"cpu_s": seconds}


def by_network(network: TrainedNetwork, stack: FoundationStack) -> tuple[Estimate, float]:
    """Its answer and the CPU seconds it took."""
    start = time.process_time()
    estimate = predict(network, *tensors(stack), torch.tensor(stack.valid))
    return estimate, time.process_time() - start


def zero_shot(network: TrainedNetwork, stack: FoundationStack) -> dict[str, Scores]:
    """Figures of shape from focus (depth only), plane sweep and network."""
    kappa = float(stack.kappa.mean())
    scores = {
        f"sff{w}": metrics.depth_errors(shape_from_focus(stack.frames, stack.focus_dpt, w), stack.scene.depth_m, kappa)
        for w in WINDOWS_PX
    }
    valid = torch.tensor(stack.valid)
    start = time.process_time()
    swept = plane_sweep(*tensors(stack), valid=valid)
    scores["sweep"] = scored(stack, swept, time.process_time() - start)
    found, seconds = by_network(network, stack)
    scores["network"] = scored(stack, found, seconds)
    return scores


def captured(stack: FoundationStack) -> CapturedStack:
    """The stack as fine-tuning gets it: without its truth."""
    frames, focus, kappa = tensors(stack)
    return CapturedStack(stack.scene.name, frames, torch.tensor(stack.valid), focus, kappa, True)


def tuned(network: TrainedNetwork, stacks: dict[str, FoundationStack]) -> tuple[Rows, list[str]]:
    """Every scene before and after fine-tuning on two thirds of them, and the names of those."""
    names = sorted(stacks)
    adapted = [name for i, name in enumerate(names) if i % 3]
    with tempfile.TemporaryDirectory() as folder:
        result = adapt([captured(stacks[n]) for n in adapted], network, Path(folder), FINETUNE, device=CPU)
        print(result.table())
        after = load_network(result.weights, CPU) if result.weights else network
    rows = {}
    for name in names:
        rows[name] = {"network": scored(stacks[name], *by_network(network, stacks[name]))}
        rows[name]["tuned"] = scored(stacks[name], *by_network(after, stacks[name]))
    return rows, adapted


def from_nothing(stacks: dict[str, FoundationStack], steps: int) -> Rows:
    """Every scene by plane sweep and by a new network that saw these stacks only."""
    with tempfile.TemporaryDirectory() as folder:
        config = FROM_NOTHING.model_copy(update={"steps": steps})
        result = adapt([captured(s) for s in stacks.values()], None, Path(folder), config, device=CPU)
        assert result.weights is not None
        network = load_network(result.weights, CPU)
    rows: Rows = {}
    for name, stack in stacks.items():
        start = time.process_time()
        swept = plane_sweep(*tensors(stack), valid=torch.tensor(stack.valid))
        rows[name] = {"sweep": scored(stack, swept, time.process_time() - start)}
        rows[name]["nothing"] = scored(stack, *by_network(network, stack))
    return rows


def paper(stacks: dict[str, FoundationStack], steps: int) -> Rows:
    """Every scene by the published network after `steps` of the published training on these stacks."""
    with tempfile.TemporaryDirectory() as folder:
        config = PAPER.model_copy(update={"steps": steps, "batch": 3, "crop_px": 112, "validate_every": 20})
        network = load_network(
            train_paper([captured(s) for s in stacks.values()], Path(folder), config, device=CPU), CPU
        )
    print("share of dead depth pixels after training:", network.about["validation"]["dead_depth"])
    rows: Rows = {}
    for name, stack in stacks.items():
        estimate, _ = by_network(network, stack)
        errors = metrics.depth_errors(
            estimate.inverse_depth_dpt.numpy(), stack.scene.depth_m, float(stack.kappa.mean())
        )
        rows[name] = {"paper": errors}
    return rows


def motorcycle_full_size(network: TrainedNetwork, runs: int = 5) -> Scores:
    """Errors and median CPU seconds of the network on Motorcycle, 640 x 480 x 5, 1 % noise."""
    whole = motorcycle()
    whole = whole.resized(480, round(whole.width * 480 / whole.height))
    left = (whole.width - 640) // 2
    scene = Scene(whole.aif[:, left : left + 640], whole.depth_m[:, left : left + 640], "motorcycle_640x480")
    stack = stack_through(scene, *sweep_for_scene(scene, 5, MOTORCYCLE_MAX_COC_PX), "noisy")
    answers = [by_network(network, stack) for _ in range(runs)]
    return scored(stack, answers[0][0], float(np.median([seconds for _, seconds in answers])))


FIGURES = ("abs_rel", "mae_dpt", "mae_coc_px", "median_coc_px", "rmse_coc_px", "edge_mae_coc_px", "flat_mae_coc_px")


def print_rows(rows: Rows, title: str, *, each: bool = False) -> None:
    """Means over scenes of every method, and with `each` the scenes' MAE."""
    print(f"\n{title}: means over {len(rows)} scenes; px are of blur std (CoC / 4)")
    print(f"{'method':9} AbsRel  MAE dpt  MAE px  median  RMSE px  edges  rest   AUSE  1 std  cut70 (most) PSNR  CPU s")
    for method in next(iter(rows.values())):
        m = {name: float("nan") for name in metrics.LABELS} | {"cpu_s": float("nan")} | means(rows, method)
        px = [m[name] / 4 for name in FIGURES[2:]]
        print(
            f"{method:9} {m['abs_rel']:6.4f}  {m['mae_dpt']:7.4f}  {px[0]:6.3f}  {px[1]:6.3f}  {px[2]:7.3f}", end="  "
        )
        print(f"{px[3]:5.2f}  {px[4]:5.3f}  {m['ause']:5.3f}  {m['coverage']:5.2f}  {m['kept70_cut']:5.2f}", end="  ")
        print(f"({m['kept70_limit']:.2f})", end=" ")
        print(f"{m['psnr_db']:5.2f}  {m['cpu_s']:5.2f}")
    if each:
        methods = [m for m in next(iter(rows.values())) if not m.startswith("sff")]
        print(f"{'MAE px':18} " + " ".join(f"{m:>9}" for m in methods))
        for name, row in rows.items():
            print(f"{name:18} " + " ".join(f"{row[m]['mae_coc_px'] / 4:9.3f}" for m in methods))


def better(rows: Rows, new: str, old: str, margin: float = 0.0) -> float:
    """Share of scenes whose MAE under `new` is below (1 + margin) times that under `old`."""
    return float(np.mean([row[new]["mae_coc_px"] < (1 + margin) * row[old]["mae_coc_px"] for row in rows.values()]))


def zero_goals(tables: dict[tuple[str, str], Rows]) -> list[Goal]:
    """Goals of the zero-shot columns."""
    found = []
    base = tables.get(("dslr", "noisy"))
    if base:
        peer, mine = means(base, best_window(base)), means(base, "network")
        found += [
            Goal("zero-shot MAE / best shape from focus", mine["mae_coc_px"] / peer["mae_coc_px"], 0.5),
            Goal("zero-shot RMSE / best shape from focus", mine["rmse_coc_px"] / peer["rmse_coc_px"], 0.5),
            Goal("MAE cut, most confident 70 %", mine["kept70_cut"], 0.6, at_least=True),
        ]
        if ("dslr", "disc") in tables:
            found.append(
                Goal("AbsRel, disc / base", means(tables["dslr", "disc"], "network")["abs_rel"] / mine["abs_rel"], 1.1)
            )
    for (optics, condition), rows in tables.items():
        net, swept = (means(rows, m) for m in ("network", "sweep"))
        where = f"({optics}, {condition})"
        found += [
            Goal(f"zero-shot MAE / plane sweep {where}", net["mae_coc_px"] / swept["mae_coc_px"], 1.0),
            Goal(f"zero-shot median / plane sweep {where}", net["median_coc_px"] / swept["median_coc_px"], 1.0),
        ]
    return found


def main(argv: list[str]) -> None:
    """Runs the parts asked for; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="network", description=__doc__)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--optics", nargs="+", default=OPTICS, choices=OPTICS)
    parser.add_argument("--conditions", nargs="+", default=CONDITIONS)
    parser.add_argument("--nothing-steps", type=int, default=400)
    parser.add_argument("--paper-steps", type=int, default=100)
    chosen = parser.parse_args(argv)
    torch.set_num_threads(1)
    network = load_network("default", CPU)
    about = {k: network.about.get(k) for k in ("sha256", "step", "validation", "calibration")}
    print(f"weights {network.identity}, {about}")
    result: dict[str, object] = {"weights": about}
    found: list[Goal] = []
    scenes = {name: half_size_scene(name) for name in scene_names()}
    if "zero" in chosen.parts:
        tables = {}
        for optics in chosen.optics:
            for condition in chosen.conditions:
                rows = {}
                for name, scene in scenes.items():
                    rows[name] = zero_shot(network, foundation_stack(scene, optics, condition))
                    print(".", end="", file=sys.stderr, flush=True)
                print_rows(rows, f"{optics}, {condition}", each=True)
                tables[optics, condition] = rows
        found += zero_goals(tables)
        result["zero"] = {" ".join(key): rows for key, rows in tables.items()}
    if "motorcycle" in chosen.parts:
        scores = motorcycle_full_size(network)
        found.append(Goal("Motorcycle 640x480x5 AbsRel", scores["abs_rel"], 0.050))
        found.append(Goal("Motorcycle 640x480x5 CPU s, one core", scores["cpu_s"], 1.5))
        result["motorcycle"] = scores
    trained = {"tune", "nothing", "paper"} & set(chosen.parts)
    stacks = {name: foundation_stack(scene, "dslr", "noisy") for name, scene in scenes.items()} if trained else {}
    if "tune" in chosen.parts:
        rows, adapted = tuned(network, stacks)
        seen = {n: r for n, r in rows.items() if n in adapted}
        unseen = {n: r for n, r in rows.items() if n not in adapted}
        print_rows(seen, "fine-tuned, adapted scenes (dslr, noisy)", each=True)
        print_rows(unseen, "fine-tuned, scenes not seen (dslr, noisy)", each=True)
        for part, goal, what in ((seen, 0.85, "adapted scenes"), (unseen, 0.90, "unseen scenes")):
            ratio = means(part, "tuned")["mae_coc_px"] / means(part, "network")["mae_coc_px"]
            found.append(Goal(f"fine-tuned MAE / start, {what}", ratio, goal))
        found.append(
            Goal("fine-tuned not worse by 2 %, share", better(rows, "tuned", "network", 0.02), 0.9, at_least=True)
        )
        result["tune"] = {"rows": rows, "adapted": adapted}
    if "nothing" in chosen.parts:
        rows = from_nothing(stacks, chosen.nothing_steps)
        print_rows(rows, f"from nothing, {chosen.nothing_steps} steps on the stacks alone (dslr, noisy)", each=True)
        ratio = means(rows, "nothing")["mae_coc_px"] / means(rows, "sweep")["mae_coc_px"]
        found.append(Goal("from nothing MAE / plane sweep", ratio, 1.0))
        result["nothing"] = rows
    if "paper" in chosen.parts:
        rows = paper(stacks, chosen.paper_steps)
        print_rows(
            rows, f"published network and training, {chosen.paper_steps} steps of 3 crops (dslr, noisy)", each=True
        )
        result["paper"] = rows
    print("\ngoals")
    for goal in found:
        print(goal)
    result["goals"] = [vars(goal) | {"met": goal.met} for goal in found]
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
