"""The networks on 15 RGB-D scenes that nothing was trained on: the one quality table and the goals of issue 3.

    python -m tests.benchmarks network                              (all parts: a night of one core)
    python -m tests.benchmarks.bench_network --resume               (goes on where that was stopped)
    python -m tests.benchmarks.bench_network --parts zero nothing   (some parts)

Parts: `zero` plane sweep and `default` as shipped, every optics and condition, and HARDER; `refine` the latter after 25
refinement steps, in every condition of the DSLR's optics; `motorcycle` 640 x 480 x 5, errors and CPU seconds; `any`
the same weights from 2 to 40 px/dpt, 2 to 15 frames, uneven spacing, shuffled. Trained on the stacks alone (DSLR,
noisy): `tune` the shipped network fine-tuned on ten of the scenes and tried on the other five; `place` the same on
three quarters of a full-size scene and tried on the fourth, which shows the same place, scene by scene; `nothing` a new
`default`; `paper` the published network and training on a short budget; `faithful` the latter on tiny stacks, beside
what notes/method.md section 7.6 reports of the published code. What is drawn at random is run with every seed.

Every answer is stored in bench-results/network.json as soon as it is there. Those of parts not asked for stay; with
`--resume` the others too, if they were made with the same weights and steps.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import skimage.data
import torch

from capture.lens import Lens
from capture.optics import NOTES_FOCUS_M, NOTES_LENS, sweep_for_scene
from capture.scenes import Scene, load_scene, motorcycle, srgb_to_linear
from reconstruct import metrics
from reconstruct.checkpoint import load_weights
from reconstruct.dataset import CapturedStack
from reconstruct.estimate import Estimate
from reconstruct.even import evened
from reconstruct.finetune import (
    FROM_NOTHING,
    PAPER,
    DistilTask,
    PhotometricTask,
    adapt,
    finetune_config,
    prepare_lessons,
    train_paper,
)
from reconstruct.network import DefaultNet, PaperNet
from reconstruct.plane_sweep import plane_sweep
from reconstruct.predict import TrainedNetwork, load_network, predict, wrap
from reconstruct.refine import refine
from reconstruct.render import render_stack
from reconstruct.settle import MIDWAY_WEIGHTS
from reconstruct.settle import WEIGHTS as SETTLE_WEIGHTS
from reconstruct.shape_from_focus import WINDOWS_PX, shape_from_focus
from reconstruct.train import TrainConfig, fit
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
from tests.benchmarks.bench_refine import STEPS as REFINE_STEPS
from tests.benchmarks.foundation_stacks import (
    OPTICS,
    RGBD,
    ROOT,
    FoundationStack,
    foundation_stack,
    half_size_scene,
    scene_names,
    stack_through,
)

RESULT = ROOT / "bench-results" / "network.json"
CONDITIONS = ("disc", "noisy", "mismatched")
HARDER = {"disc": "disc_noisy", "3x noise": "noisy3"}  # than BASE in one respect; of the part `zero`, the DSLR's optics
PARTS = ("zero", "refine", "motorcycle", "any", "tune", "place", "nothing", "paper", "faithful")
CPU = torch.device("cpu")
WITHOUT_WEIGHTS = {"nothing", "paper", "faithful"}  # parts that do not ask the shipped network
BASE = ("dslr", "noisy")  # what is trained on


class Store:
    """Answers in a JSON file, by keys that begin with their part's name; those of the parts `anew` are forgotten."""

    def __init__(self, path: Path, weights: str, anew: set[str]) -> None:
        self.path, self.weights = path, weights
        stored = json.loads(path.read_text()) if path.exists() else {}
        if stored.get("weights") != weights:
            anew = anew | (set(PARTS) - WITHOUT_WEIGHTS)
        answers = stored.get("answers", {}).items()
        self.answers: dict[str, Any] = {key: value for key, value in answers if key.split(",")[0] not in anew}

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        """The answer called `key`, made unless it is there."""
        if key not in self.answers:
            self.answers[key] = make()
            self.save()
        return self.answers[key]

    def save(self, **more: Any) -> None:
        self.path.parent.mkdir(exist_ok=True)
        document = {"weights": self.weights, "answers": self.answers, **more}
        self.path.write_text(json.dumps(document, indent=1) + "\n")


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
    """Its answer as it is shown, and the CPU seconds it took."""
    start = time.process_time()
    estimate = predict(network, *tensors(stack), torch.tensor(stack.valid))
    return evened(estimate, torch.tensor(stack.kappa)), time.process_time() - start


def zero_shot(stack: FoundationStack, answer: tuple[Estimate, float]) -> dict[str, Scores]:
    """Figures of shape from focus (depth only), plane sweep and the network's `answer` (`by_network`)."""
    kappa = float(stack.kappa.mean())
    scores = {
        f"sff{w}": metrics.depth_errors(shape_from_focus(stack.frames, stack.focus_dpt, w), stack.scene.depth_m, kappa)
        for w in WINDOWS_PX
    }
    scores |= by_sweep(stack)
    scores["network"] = scored(stack, *answer)
    scores["network"]["range_px"] = kappa * float(np.ptp(stack.focus_dpt))
    return scores


def by_sweep(stack: FoundationStack) -> dict[str, Scores]:
    """Figures of the plane sweep."""
    start = time.process_time()
    swept = plane_sweep(*tensors(stack), valid=torch.tensor(stack.valid))
    return {"sweep": scored(stack, swept, time.process_time() - start)}


def captured(stack: FoundationStack) -> CapturedStack:
    """The stack as fine-tuning gets it: without its truth."""
    frames, focus, kappa = tensors(stack)
    return CapturedStack(stack.scene.name, frames, torch.tensor(stack.valid), focus, kappa, True)


def refined(network: TrainedNetwork, stack: FoundationStack) -> dict[str, Scores]:
    """Figures of the network's answer after refinement."""
    first = predict(network, *tensors(stack), torch.tensor(stack.valid))
    start = time.process_time()
    answer = refine(*tensors(stack), first, steps=REFINE_STEPS, valid=torch.tensor(stack.valid))
    return {"refined": scored(stack, answer, time.process_time() - start)}


def tuned(
    network: TrainedNetwork,
    stacks: dict[str, FoundationStack],
    unseen: list[str],
    seeds: list[int],
    store: Store,
    key: str,
) -> list[Rows]:
    """Every stack before and after fine-tuning on all but the `unseen`, whose methods end in "unseen"; per seed.

    The stacks are refined once.
    """
    adapted = [captured(stack) for name, stack in stacks.items() if name not in unseen]

    def one(seed: int) -> Rows:
        run = Path(folder) / str(seed)
        run.mkdir()
        (run / "refined").symlink_to(refined)
        began = time.process_time()
        config = finetune_config(len(adapted)).model_copy(update={"seed": seed})
        result = adapt(adapted, network, run, config, device=CPU)
        print(
            f"{result.table()}\nadapted to {len(adapted)} stacks in {time.process_time() - began:.0f} CPU s", flush=True
        )
        after = load_network(result.weights, CPU) if result.weights else network
        rows: Rows = {}
        for name, stack in stacks.items():
            which = " unseen" if name in unseen else ""
            rows[name] = {f"start{which}": scored(stack, *by_network(network, stack))}
            rows[name][f"tuned{which}"] = scored(stack, *by_network(after, stack))
        return rows

    with tempfile.TemporaryDirectory() as folder:
        refined = Path(folder) / "refined"
        refined.mkdir()
        return [store.get(f"{key}, seed {seed}", lambda seed=seed: one(seed)) for seed in seeds]


def quarters(name: str) -> dict[str, FoundationStack]:
    """Four stacks that share a place and a lens: the quarters of a scene at full size."""
    whole = foundation_stack(load_scene(RGBD / name), *BASE)
    height, width = whole.scene.height // 2, whole.scene.width // 2
    corners = [(top, left) for top in (0, height) for left in (0, width)]
    return {f"{name} {i}": whole.window(*corner, height, width) for i, corner in enumerate(corners)}


def place_tuned(network: TrainedNetwork, name: str, seeds: list[int], store: Store) -> list[Rows]:
    """As `tuned`, on the `quarters` of one scene; each in turn is the unseen one."""
    unseen = scene_names().index(name) % 4
    return tuned(network, quarters(name), [f"{name} {unseen}"], seeds, store, f"place, {name}")


def from_nothing(stacks: dict[str, FoundationStack], steps: int, seeds: list[int], store: Store) -> list[Rows]:
    """Every scene by a new network that saw these stacks only, per seed; the stacks are refined once."""
    keys = [f"nothing, {steps} steps, seed {seed}" for seed in seeds]
    with tempfile.TemporaryDirectory() as folder:
        if not set(keys) <= store.answers.keys():
            refining = time.process_time()
            lessons = prepare_lessons([captured(s) for s in stacks.values()], None, REFINE_STEPS, CPU, Path(folder))
            print(f"{len(lessons)} stacks refined in {time.process_time() - refining:.0f} CPU s")

        def one(seed: int) -> Rows:
            began = time.process_time()
            config = FROM_NOTHING.model_copy(update={"steps": steps, "validate_every": steps, "seed": seed})
            torch.manual_seed(seed)
            net = DefaultNet()
            net.load_state_dict(
                fit(net, DistilTask(lessons, config, CPU, Path(folder)), config, Path(folder) / str(seed), device=CPU)
            )
            network = wrap(net.eval(), {}, "nothing")
            print(f"seed {seed}: {steps} steps of {config.batch} crops in {time.process_time() - began:.0f} CPU s")
            return {name: {"nothing": scored(stack, *by_network(network, stack))} for name, stack in stacks.items()}

        return [store.get(key, lambda seed=seed: one(seed)) for key, seed in zip(keys, seeds, strict=True)]


# -------------------------------------------------------------------------------------------------- the paper's way

DEAD_STARTS = 30
TINY_PX, TINY_STEPS, TINY_SEEDS = 32, 300, 4  # as in the notes
MOSTLY_DEAD = 0.5  # share of the depth map that is zero
TINY_PHOTOGRAPHS = ("astronaut", "chelsea", "coffee")  # of scikit-image; the notes do not say which picture theirs was


def beginning_of_published(steps: int, **more: int) -> TrainConfig:
    """The first `steps` of the published training: at a rate that has hardly begun to fall."""
    whole = {"schedule_steps": PAPER.steps, "validate_every": steps}
    return PAPER.model_copy(update={"steps": steps, **whole, **more})


def dead_channels(stack: CapturedStack, seed: int) -> list[bool]:
    """Which of red, green, blue and depth of the new `PaperNet` of `seed` are zero everywhere on `stack`."""
    torch.manual_seed(seed)
    with torch.inference_mode():
        raw = PaperNet().raw(stack.frames[None, ..., :112, :112], 1.0 / stack.focus_dpt[None])
    return (raw == 0).flatten(2).all(2)[0].tolist()


def paper(stacks: dict[str, FoundationStack], steps: int, seed: int) -> dict[str, Any]:
    """Every scene by the published network after `steps` of the published training on these stacks."""
    config = beginning_of_published(steps, batch=3, crop_px=112, seed=seed)
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        path = train_paper([captured(s) for s in stacks.values()], Path(folder), config, device=CPU)
        network = load_network(path, CPU)
    step_s = (time.process_time() - began) / steps
    rows: Rows = {}
    for name, stack in stacks.items():
        found, _ = by_network(network, stack)
        errors = metrics.depth_errors(found.inverse_depth_dpt.numpy(), stack.scene.depth_m, float(stack.kappa.mean()))
        rows[name] = {"paper": errors}
    return {"rows": rows, "dead depth": network.about["validation"]["dead_depth"], "step_s": step_s}


def print_paper(runs: list[dict[str, Any]], steps: int) -> None:
    """How much training that was, what the published one would take, and whether depth died."""
    share = steps * 3 * 112**2 / (PAPER.steps * PAPER.batch * PAPER.crop_px**2)
    hours = float(np.median([run["step_s"] for run in runs])) * steps / share / 3600
    dead = ", ".join(f"{run['dead depth']:.2f}" for run in runs)
    print(f"\npaper: {steps} steps of 3 crops of 112 px, {100 * share:.4f} % of the published {PAPER.steps} steps of")
    print(
        f"{PAPER.batch} crops of {PAPER.crop_px} px, which would take {hours:.0f} CPU h; dead depth at the end: {dead}"
    )


def tiny_stack(photograph: str = TINY_PHOTOGRAPHS[0]) -> tuple[CapturedStack, np.ndarray]:
    """One stack as the published code renders its own (optics, operator, no noise), of a photograph; and true metres.

    A wall that recedes from 1.5 to 6 m and, 1 m away, a square before it.
    """
    photo = srgb_to_linear(getattr(skimage.data, photograph)() / 255.0)
    aif = cv2.resize(photo[:256, 96:352], (TINY_PX, TINY_PX), interpolation=cv2.INTER_AREA).astype(np.float32)
    inverse = np.tile(np.linspace(1 / 6, 1 / 1.5, TINY_PX, dtype=np.float32), (TINY_PX, 1))
    inverse[8:20, 4:16] = 1.0
    focus = 1.0 / torch.tensor(NOTES_FOCUS_M)
    kappa = torch.tensor([float(NOTES_LENS.kappa_px_per_dpt(float(q))) for q in focus])
    truth, image = torch.from_numpy(inverse)[None, None], torch.from_numpy(aif).permute(2, 0, 1)[None]
    frames = render_stack(image, truth, focus[None], kappa[None], model="published")[0]
    return CapturedStack(
        "tiny", frames, torch.ones_like(frames[:, 0], dtype=torch.bool), focus, kappa, True
    ), 1 / inverse


def faithful(photograph: str, seed: int) -> Scores:
    """The published network, post-operation ("norm") and training on one stack of 32 x 32, 300 steps, batch 1."""
    stack, depth_m = tiny_stack(photograph)
    config = beginning_of_published(TINY_STEPS, batch=1, crop_px=TINY_PX, seed=seed)
    torch.manual_seed(seed)
    net, task = PaperNet(post="norm"), PhotometricTask([stack], config)
    with tempfile.TemporaryDirectory() as folder:
        net.load_state_dict(fit(net, task, config, Path(folder), device=CPU))
    with torch.inference_mode():
        found = net(stack.frames[None], stack.focus_dpt[None], stack.kappa[None]).inverse_depth_dpt[0, 0]
    errors = metrics.depth_errors(found.numpy(), depth_m, float(stack.kappa.mean()))
    return {
        "dead at start": float(dead_channels(stack, seed)[3]),
        "dead share at end": task.validate(net)["dead_depth"],
        "abs_rel": errors["abs_rel"],
    }


def print_faithful(runs: dict[str, list[Scores]], starts: list[list[bool]]) -> list[Goal]:
    """Ours, by photograph and seed, beside what notes/method.md section 7.6 reports of the published code."""
    depth, colour, alive = (sum(x) for x in zip(*[(s[3], any(s[:3]), not any(s)) for s in starts], strict=True))
    print(
        f"\nfaithful: new networks dead in depth {depth}, in some colour {colour}, in nothing {alive}, of {len(starts)}"
    )
    print("          published code (another picture): 8, 22, 5 of 30")
    print(f"{TINY_PX} x {TINY_PX} stack of  seed  dead at start  dead share at end  AbsRel   ({TINY_STEPS} steps)")
    for photograph, each in runs.items():
        for seed, run in enumerate(each):
            shares = f"{run['dead at start']:13.0f}  {run['dead share at end']:17.2f}"
            print(f"{photograph:16} {seed:5}  {shares}  {run['abs_rel']:6.3f}")
    print("published code, 4 seeds: three dead starts ended at 0.27, 0.24 and dead; a healthy one died (0.96)")
    depth_m = tiny_stack()[1]
    constant = min(float(np.mean(np.abs(c / depth_m - 1))) for c in np.linspace(0.1, 10, 500))
    print(f"here the best constant depth has {constant:.3f}, the near limit {np.mean(1 - 0.1 / depth_m):.3f}")
    every = [run for each in runs.values() for run in each]
    living = [run["abs_rel"] for run in every if run["dead share at end"] < MOSTLY_DEAD]
    of = f"{len(living)} living of {len(every)}"
    median = float(np.median([run["abs_rel"] for run in every]))
    return [
        Goal(f"paper on one tiny stack, AbsRel, median of all {len(every)}", median, (0.27 + 0.96) / 2),
        Goal(f"paper on one tiny stack, AbsRel, median of {of}", float(np.median(living)), 0.27),
        Goal(f"paper on one tiny stack, AbsRel, best of {of}", min(living), 0.24),
        Goal("paper on one tiny stack, share of runs dead at the end", 1 - len(living) / len(every), 0.5),
    ]


# ----------------------------------------------------------------------------------------------------- any camera

ANY_SCENES = ("mb14_motorcycle", "nyu_bathroom", "tum_office")
KAPPAS = (2, 5, 10, 20, 40)  # px of CoC per dioptre
COUNTS = (2, 3, 8, 15)


def any_cameras(scene: Scene) -> dict[str, tuple[Lens, np.ndarray]]:
    """Lenses and focus settings: the table's, then one thing changed at a time."""
    lens, focus = sweep_for_scene(scene, 5, 24.0)
    span, middle = float(np.ptp(focus)), float(focus.mean())
    found = {"5 frames, 24 px": (lens, focus)}
    for kappa in KAPPAS:
        found[f"{kappa} px/dpt"] = lens.rescaled(kappa / float(lens.kappa_px_per_dpt(middle))), focus
    for count in COUNTS:
        found[f"{count} frames"] = lens, np.linspace(focus[0], focus[-1], count)
    for name, place in (("crowded far", (0, 0.05, 0.15, 0.4, 1)), ("uneven", (0, 0.3, 0.38, 0.9, 1))):
        found[name] = lens, focus[0] + span * np.array(place)
    return found


def any_camera(network: TrainedNetwork, scene: Scene, name: str) -> dict[str, Scores]:
    """As `zero_shot`, and how far the network's answer moves when the frames are shuffled, px of CoC."""
    stack = stack_through(scene, *any_cameras(scene)[name], "noisy")
    answer = by_network(network, stack)
    scores = zero_shot(stack, answer)
    order = np.random.default_rng(0).permutation(len(stack.frames))
    shuffled = FoundationStack(
        stack.frames[order], stack.valid[order], stack.focus_dpt[order], stack.kappa[order], stack.scene
    )
    other, _ = by_network(network, shuffled)
    moved_px = (answer[0].inverse_depth_dpt - other.inverse_depth_dpt).abs() * float(stack.kappa.mean())
    scores["network"] |= {"moved_px": float(moved_px.quantile(0.9999)), "moved_most_px": float(moved_px.max())}
    return scores


def print_any(rows: dict[str, Rows]) -> list[Goal]:
    """One line a camera, means over its scenes; goals beside the plane sweep."""
    print(f"\nany camera, same weights, noisy, {', '.join(ANY_SCENES)}; MAE in px of blur std (CoC / 4)")
    print("camera           kappa x range px    best SFF   sweep  network   / sweep   shuffled: moved px of CoC")
    found = []
    for name, scenes in rows.items():
        window, (net, swept) = best_window(scenes), (means(scenes, m) for m in ("network", "sweep"))
        peer, ratio = means(scenes, window), net["mae_coc_px"] / swept["mae_coc_px"]
        print(f"{name:16} {net['range_px']:18.1f}  {peer['mae_coc_px'] / 4:10.3f}", end="")
        print(f"  {swept['mae_coc_px'] / 4:6.3f}  {net['mae_coc_px'] / 4:7.3f}   {ratio:7.2f}", end="")
        print(f"   {net['moved_px']:.0e} (99.99 %), {net['moved_most_px']:.0e}")
        found.append(Goal(f"network MAE / plane sweep, {name}", ratio, 1.0))
    moved = max(row["network"]["moved_px"] for scenes in rows.values() for row in scenes.values())
    return [*found, Goal("frames shuffled: depth moves by px of CoC (99.99 %)", moved, 1e-3)]


def motorcycle_full_size(network: TrainedNetwork, runs: int = 5) -> Scores:
    """Errors and median CPU seconds of the network on Motorcycle, 640 x 480 x 5, 1 % noise."""
    whole = motorcycle()
    whole = whole.resized(480, round(whole.width * 480 / whole.height))
    left = (whole.width - 640) // 2
    scene = Scene(whole.aif[:, left : left + 640], whole.depth_m[:, left : left + 640], "motorcycle_640x480")
    stack = stack_through(scene, *sweep_for_scene(scene, 5, MOTORCYCLE_MAX_COC_PX), "noisy")
    answers = [by_network(network, stack) for _ in range(runs)]
    return scored(stack, answers[0][0], float(np.median([seconds for _, seconds in answers])))


HEADER = "AbsRel  RMSE m  MAE dpt  MAE px  median  RMSE px  edges   rest   AUSE  1 std  cut70 (most)   PSNR  CPU s\n"


def figures(runs: list[Rows], method: str, over: Callable[..., Any]) -> Scores:
    """Every figure of `method`: `over` the scenes, then the median over the runs of several seeds."""
    names = next(row for row in runs[0].values() if method in row)[method]
    return {
        name: float(np.median([over([row[method][name] for row in rows.values() if method in row]) for rows in runs]))
        for name in names
    }


def line(method: str, m: Scores) -> str:
    """One row of the table; px are of blur std."""
    m = {name: float("nan") for name in metrics.LABELS} | {"cpu_s": float("nan")} | m
    px = [m[f"{name}_coc_px"] / 4 for name in ("mae", "median", "rmse", "edge_mae", "flat_mae")]
    return (
        f"{method:24} {m['abs_rel']:6.4f}  {m['rmse_m']:6.3f}  {m['mae_dpt']:7.4f}  {px[0]:6.3f}  {px[1]:6.3f}"
        f"  {px[2]:7.3f}  {px[3]:5.2f}  {px[4]:5.3f}  {m['ause']:5.3f}  {m['coverage']:5.2f}"
        f"  {m['kept70_cut']:5.2f} ({m['kept70_limit']:.2f})  {m['psnr_db']:5.2f}  {m['cpu_s']:5.2f}"
    )


Methods = dict[str, tuple[list[Rows], str]]  # name -> (a run for every seed, what it is called there)


def print_table(title: str, methods: Methods) -> None:
    """Every figure of every method, medians and means over scenes; then every scene's mean error."""
    for what, over in (("medians", np.nanmedian), ("means", np.nanmean)):
        print(f"\n{title}: {what} over scenes; px are of blur std (CoC / 4)\n{'':25}{HEADER}", end="")
        for name, (runs, method) in methods.items():
            print(line(name, figures(runs, method, over)))
    print(f"\n{'MAE px':18} " + " ".join(f"{name:>14}" for name in methods))
    for scene in next(iter(methods.values()))[0][0]:
        errors = [
            [rows[scene].get(method, {}).get("mae_coc_px", np.nan) for rows in runs]
            for runs, method in methods.values()
        ]
        print(f"{scene:18} " + " ".join(f"{np.median(each) / 4:14.3f}" for each in errors))


def better(runs: list[Rows], new: str, old: str, margin: float = 0.0) -> float:
    """Share of scenes whose MAE under `new` is below (1 + margin) times that under `old`; median of runs."""
    shares = []
    for rows in runs:
        both = [(r[new]["mae_coc_px"], r[old]["mae_coc_px"]) for r in rows.values() if new in r]
        shares.append(float(np.mean([one < (1 + margin) * two for one, two in both])))
    return float(np.median(shares))


def zero_goals(tables: dict[tuple[str, str], Rows]) -> list[Goal]:
    """Goals of the zero-shot columns."""
    found = []
    base = tables.get(BASE)
    if base:
        peer, mine = means(base, best_window(base)), means(base, "network")
        found += [
            Goal("zero-shot MAE / best shape from focus", mine["mae_coc_px"] / peer["mae_coc_px"], 0.5),
            Goal("zero-shot RMSE / best shape from focus", mine["rmse_coc_px"] / peer["rmse_coc_px"], 0.5),
            Goal("MAE cut, most confident 70 %", mine["kept70_cut"], 0.6, at_least=True),
        ]
        for name, condition in HARDER.items():
            harder = means(tables[BASE[0], condition], "network")
            found.append(Goal(f"AbsRel, {name} / base", harder["abs_rel"] / mine["abs_rel"], 1.1))
    for (optics, condition), rows in tables.items():
        net, swept = (means(rows, m) for m in ("network", "sweep"))
        where = f"({optics}, {condition})"
        found += [
            Goal(f"zero-shot MAE / plane sweep {where}", net["mae_coc_px"] / swept["mae_coc_px"], 1.0),
            Goal(f"zero-shot median / plane sweep {where}", net["median_coc_px"] / swept["median_coc_px"], 1.0),
        ]
    return found


def tuned_methods(runs: list[Rows]) -> Methods:
    """Start and fine-tuned, adapted and unseen, for `print_table`."""
    return {f"{m}{which}": (runs, f"{m}{which}") for which in ("", " unseen") for m in ("start", "tuned")}


def tuned_goals(runs: list[Rows], which: str) -> list[Goal]:
    """Goals of fine-tuning; `which` stacks were not seen."""
    found = []
    for name, about, goal in (("", "adapted to", 0.85), (" unseen", f"unseen, {which}", 0.90)):
        found += [
            Goal(f"fine-tuned MAE / start ({about})", ratio(runs, f"tuned{name}", runs, f"start{name}"), goal),
            Goal(
                f"fine-tuned, not worse by 2 %, share ({about})",
                better(runs, f"tuned{name}", f"start{name}", 0.02),
                0.9,
                at_least=True,
            ),
        ]
    return found


def ratio(runs: list[Rows], new: str, other: list[Rows], old: str) -> float:
    """Mean MAE of `new` over that of `old`, median of the runs."""
    return figures(runs, new, np.nanmean)["mae_coc_px"] / figures(other, old, np.nanmean)["mae_coc_px"]


def main(argv: list[str]) -> None:
    """Runs the parts asked for; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="network", description=__doc__)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--optics", nargs="+", default=OPTICS, choices=OPTICS)
    parser.add_argument("--conditions", nargs="+", default=CONDITIONS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--nothing-steps", type=int, default=FROM_NOTHING.steps)
    parser.add_argument("--paper-steps", type=int, default=100)
    parser.add_argument("--places", nargs="+", default=scene_names(), help="of the part `place`")
    parser.add_argument("--weights", default="default", help="a weights file, such as a training run's")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULT)
    chosen = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "Mean of empty slice|All-NaN slice")  # a scene may have no depth edge
    network = load_network(chosen.weights, CPU)
    print(f"weights {network.identity}, {network.about.get('validation')}, {network.about.get('calibration')}")
    goals: list[Goal] = []
    parts, seeds = set(chosen.parts), chosen.seeds
    made_with = network.about, *(load_weights(path, "settle")[1] for path in (MIDWAY_WEIGHTS, SETTLE_WEIGHTS))
    store = Store(chosen.output, " ".join(x["sha256"] for x in made_with), set() if chosen.resume else parts)
    scenes = {name: half_size_scene(name) for name in scene_names()}
    combos = [(o, c) for o in chosen.optics for c in chosen.conditions] if parts & {"zero", "refine"} else []

    def over_scenes(part: str, what: Callable[[FoundationStack], dict[str, Scores]], where: tuple[str, str]) -> Rows:
        rows = {}
        for name, scene in scenes.items():
            key = f"{part}, {' '.join(where)}, {name}"
            rows[name] = store.get(key, lambda scene=scene: what(foundation_stack(scene, *where)))
        return rows

    tables: defaultdict[tuple[str, str], Methods] = defaultdict(dict)
    if "zero" in parts:
        asked = [*combos, *((BASE[0], condition) for condition in HARDER.values() if BASE in combos)]
        swept = {where: over_scenes("zero", lambda s: zero_shot(s, by_network(network, s)), where) for where in asked}
        for where, rows in swept.items():
            for name, method in (("shape from focus", best_window(rows)), ("sweep", "sweep"), ("default", "network")):
                tables[where][name] = [rows], method
        goals += zero_goals(swept)
    if "refine" in parts:
        for where in (w for w in combos if w[0] == "dslr"):
            rows = over_scenes("refine", lambda stack: refined(network, stack), where)
            tables[where]["default, refined"] = [rows], "refined"
            if "default" in tables[where]:
                goals.append(
                    Goal(f"refined MAE / start {where}", ratio([rows], "refined", *tables[where]["default"]), 0.75)
                )
    stacks = (
        {name: foundation_stack(scene, *BASE) for name, scene in scenes.items()}
        if parts & {"tune", "nothing", "paper"}
        else {}
    )
    if "tune" in parts:
        unseen = list(stacks)[::3]
        runs = tuned(network, stacks, unseen, seeds, store, "tune")
        tables[BASE] |= tuned_methods(runs)
        goals += tuned_goals(runs, "other places")
    if "place" in parts:
        places = [place_tuned(network, name, seeds, store) for name in chosen.places]
        runs = [dict(itertools.chain(*(rows.items() for rows in each))) for each in zip(*places, strict=True)]
        tables["full size, a quarter each", "noisy"] = tuned_methods(runs)
        goals += tuned_goals(runs, "same place")
    if "nothing" in parts:
        runs = from_nothing(stacks, chosen.nothing_steps, seeds, store)
        rows = over_scenes("nothing", by_sweep, BASE)
        tables[BASE] |= {"sweep": ([rows], "sweep"), f"from nothing, {chosen.nothing_steps}": (runs, "nothing")}
        each = [ratio([run], "nothing", [rows], "sweep") for run in runs]
        print(f"\nfrom nothing MAE / plane sweep, seed by seed: {', '.join(f'{x:.3f}' for x in each)}")
        goals.append(Goal("from nothing MAE / plane sweep, median of seeds", float(np.median(each)), 1.0))
    if "paper" in parts:
        steps = chosen.paper_steps
        trained = [store.get(f"paper, {steps} steps, seed {s}", lambda s=s: paper(stacks, steps, s)) for s in seeds]
        tables[BASE][f"paper, {steps} steps"] = [run["rows"] for run in trained], "paper"
        print_paper(trained, steps)
    for where, methods in tables.items():
        if methods:
            print_table(", ".join(where), methods)
    if "motorcycle" in parts:
        scores = store.get("motorcycle", lambda: motorcycle_full_size(network))
        print(f"\nMotorcycle 640 x 480 x 5\n{'':25}{HEADER}{line('default', scores)}")
        goals.append(Goal("Motorcycle 640x480x5 AbsRel", scores["abs_rel"], 0.050))
        goals.append(Goal("Motorcycle 640x480x5 CPU s, one core", scores["cpu_s"], 1.5))
    if "any" in parts:
        cameras = list(any_cameras(scenes[ANY_SCENES[0]]))
        goals += print_any(
            {
                camera: {
                    name: store.get(
                        f"any, {camera}, {name}", lambda n=name, c=camera: any_camera(network, scenes[n], c)
                    )
                    for name in ANY_SCENES
                }
                for camera in cameras
            }
        )
    if "faithful" in parts:
        goals += print_faithful(
            {
                photograph: [
                    store.get(f"faithful, {photograph}, seed {s}", lambda p=photograph, s=s: faithful(p, s))
                    for s in range(TINY_SEEDS)
                ]
                for photograph in TINY_PHOTOGRAPHS
            },
            store.get(
                "faithful, dead starts", lambda: [dead_channels(tiny_stack()[0], seed) for seed in range(DEAD_STARTS)]
            ),
        )
    print("\ngoals")
    for goal in goals:
        print(goal)
    store.save(goals=[vars(goal) | {"met": bool(goal.met)} for goal in goals])


if __name__ == "__main__":
    main(sys.argv[1:])
