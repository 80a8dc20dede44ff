"""Learning from captured stacks, with nothing but the stacks themselves as teacher.

On site, a handful of stacks: *refine, then distil*. Each stack's depth is first improved through the renderer
(`reconstruct/refine.py`), then the network learns the refined maps, and retakes of the refined scenes and of mixtures
of them (`reconstruct/retake.py`), whose depth is exact. Direct photometric fine-tuning gains next to nothing
(notes/forward-model.md section 3).

The fewer the stacks, the more of the crops are of mixtures: three stacks of a place are soon learned by heart, and what
is learned then harms what they did not show (three places, the unseen quarter: mean error 0.88 of the start with
mixtures, 1.01 without).

To judge that, one frame of every stack is withheld from refinement and training alike. How well it is predicted, by
blurring an all-in-focus image through the predicted depth, decides whether the adapted network is better than its
start. That image is fitted to the other frames, depth fixed: an image fused from them holds foreground light smeared
over the background, so a smoothed or otherwise wrong depth predicts better with it than the truth does. The judge is
blind to small changes of depth, so a network that gains less than chance may (`reliably_lower`) is not kept.

What reads the frames (READING) stays as thousands of scenes have trained it: training it too makes a step an eighth
longer and gains nothing. And what is kept goes only KEPT_CHANGE of the way from the start's weights to the learned ones
("Robust fine-tuning of zero-shot models", Wortsman et al. 2022): most of the gain, and less is forgotten of what the
stacks did not show.

The paper's end-to-end training (`PhotometricTask`) is here too: render the network's image through the network's
depth, compare with the frames.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capture.errors import DataError
from capture.lens import coc_diameter_px
from reconstruct.checkpoint import load_weights, save_weights
from reconstruct.dataset import CapturedStack, StackBatch, kept, kept_prior, turned
from reconstruct.denoise import root_of
from reconstruct.device import own_share
from reconstruct.estimate import Estimate
from reconstruct.losses import PUBLISHED, charbonnier, laplace_surprise, match_exposure, published_terms
from reconstruct.misfit import Misfit
from reconstruct.network import SWEEP, DefaultNet, NetworkOutput, PaperNet, Prior, build, sweep_prior
from reconstruct.plane_sweep import gather_evidence, plane_sweep, quietened
from reconstruct.predict import TrainedNetwork, predict, wrap
from reconstruct.refine import RefineConfig, refine
from reconstruct.render import LAYER_STEP_PX, render_stack
from reconstruct.retake import altered, mixed, part_of, taken_again, within_sweep
from reconstruct.settle import LEARNED, stay
from reconstruct.spectrum import PsfShape
from reconstruct.train import TrainConfig, fit, is_first_process

MAPS = ("inverse_depth_dpt", "std_dpt", "confidence", "aif")
DISTILLED = "the stacks themselves: depth refined through the renderer, then distilled; no ground truth"
PHOTOMETRIC = "the stacks themselves: frames rendered from the network's own depth and image; no ground truth"

FINETUNE = TrainConfig(
    steps=3000,
    batch=4,
    crop_px=64,
    warmup_steps=10,
    ema_decay=0.97,
    weight_decay=0.0,
    validate_every=250,
    log_every=50,
    keep="best",
    patience=3,
)
STEPS_PER_STACK = 300  # few stacks are soon learned by heart
RETAKES = 3  # of every stack
DRAWN = 2  # how often a stack itself is drawn for each of its retakes' once
MIXTURES = 16  # of every stack, scenes made of two
MIXTURE_PX = 320  # longest side of those; they are cropped for learning anyway
VARIED = 8  # so many stacks need no mixtures, which cost ten of them 3 points of what they gained
IMAGE_STEPS = 8  # of the image that predicts a withheld frame
KEPT_CHANGE = 0.75  # of the learned change of weights: most of its gain and half of its harm elsewhere
IMAGE_HEAD = ("sharp", "sharp_gain", "touch")  # parts of `DefaultNet` that only its image depends on
READING = ("encoder", "profile", "mix", "place")  # and those next to its inputs
LESSON = RefineConfig(layer_step_px=LAYER_STEP_PX)  # finer, maps are better, but a network gains less: 0.850 for 0.837
LEAST_GAIN = 0.02  # share of one stack's withheld error; chosen on four places, own networks and each other's

FROM_NOTHING = FINETUNE.model_copy(
    update={
        "steps": 1000,
        "batch": 6,
        "crop_px": 160,
        "learning_rate": 6e-4,
        "warmup_steps": 50,
        "ema_decay": 0.9,
        "patience": 0,
    }
)
PAPER = TrainConfig(  # as published, notes/method.md section 4
    preset="paper",
    steps=25000,
    batch=32,
    crop_px=256,
    learning_rate=5e-4,
    weight_decay=5e-4,
    warmup_steps=0,
    ema_decay=0.0,
    gradient_clip=1e9,
)


def finetune_config(stacks: int) -> TrainConfig:
    """FINETUNE for so many stacks."""
    return FINETUNE.model_copy(update={"steps": min(FINETUNE.steps, STEPS_PER_STACK * stacks)})


class DistilTerms(NamedTuple):
    """Weighted loss terms against a refined map; their sum is minimised."""

    depth: Tensor
    gradient: Tensor
    spread: Tensor


@dataclass(frozen=True)
class Lesson:
    """A captured stack without its withheld frame, what the network should say about it, and the frame itself.

    `quiet`, its frames `quietened`, and `prior` are of the whole picture, as in inference, and made once: that takes as
    long as a training step.
    `psf` renders the frames better than the other one does. `exact` where depth is the truth: of retakes.
    """

    stack: CapturedStack
    quiet: Tensor
    prior: Prior
    wanted: Estimate
    full: CapturedStack
    withheld: int
    psf: PsfShape
    exact: bool = False

    @classmethod
    def prepare(
        cls,
        full: CapturedStack,
        start: TrainedNetwork | None,
        refine_steps: int,
        device: torch.device,
        folder: Path,
        *,
        withhold: bool = True,
        refined: Path | None = None,
        own: bool = True,
    ) -> Lesson:
        """Estimate depth (by `start`, else by plane sweep) and refine it, from all frames but one, or from all.

        What is too large for memory is mapped from `folder`. The refined maps are kept in `refined`: the process whose
        `own` it is writes them there unless they are, the others wait for that.
        """
        withheld = withheld_frame(full) if withhold else -1
        stack = full if withheld < 0 else full.without(withheld)
        frames, focus, kappa, valid = (x.to(device) for x in (stack.frames, stack.focus_dpt, stack.kappa, stack.valid))
        seen = None if bool(valid.all()) else valid
        quiet, context = quietened(frames, seen)
        evidence = gather_evidence(quiet, focus, kappa, seen, SWEEP, context)
        prior = sweep_prior(quiet, focus, kappa, seen, context=context, evidence=evidence)
        if refined is None or (own and not refined.with_suffix(".json").exists()):
            if start is None:
                first = plane_sweep(frames, focus, kappa, valid=seen, context=context, evidence=evidence)
            else:
                parts = (frames, focus, kappa, valid)
                first = predict(start, *parts, metric=stack.metric, context=context, evidence=evidence)
            misfit = Misfit(frames, focus, kappa, valid=valid)
            misfit.choose_psf(first)
            choices = (stay,) if start is None else LEARNED  # from nothing means without anything learned elsewhere
            more = {"valid": valid, "psf": misfit.psf, "choices": choices, "config": LESSON}
            wanted = refine(frames, focus, kappa, first, steps=refine_steps, **more)  # type: ignore[arg-type]
            maps, psf = {name: getattr(wanted, name).cpu() for name in MAPS}, misfit.psf
            if refined is not None:
                save_weights(refined, maps, {"psf": psf})
        else:
            while not refined.with_suffix(".json").exists():
                time.sleep(0.2)
            try:
                maps, about = load_weights(refined)
            except DataError as error:
                raise DataError(f"{error}; delete both, they are made anew") from None
            psf = about["psf"]
        wanted = Estimate(**maps, metric=stack.metric)
        return cls(stack, kept(quiet, folder), kept_prior(prior, folder), wanted, full, withheld, psf)

    def taken_again(self, seen: Estimate, rng: np.random.Generator, device: torch.device, folder: Path) -> Lesson:
        """The lesson that a scene, as `seen`, is to whoever takes it with this stack's camera."""
        seen = within_sweep(seen, self.stack)
        seen = seen._replace(aif=kept(seen.aif, folder))
        stack = taken_again(self.stack, seen, self.psf, rng)
        frames, *optics = (x.to(device) for x in (stack.frames, stack.focus_dpt, stack.kappa))
        quiet, context = quietened(frames)
        prior = kept_prior(sweep_prior(quiet, *optics, context=context), folder)
        stack = replace(stack, frames=kept(stack.frames, folder))
        return Lesson(stack, kept(quiet, folder), prior, seen, stack, -1, self.psf, exact=True)


def retakes(lesson: Lesson, seed: Sequence[int], device: torch.device, folder: Path) -> list[Lesson]:
    """The scene of `lesson` taken again; the first time as it is, then at other depths."""
    taken = []
    for i in range(RETAKES):
        rng = np.random.default_rng([*seed, i])
        seen = altered(lesson.wanted, lesson.stack, rng) if i > 0 else lesson.wanted
        taken.append(lesson.taken_again(seen, rng, device, folder))
    return taken


def mixtures(
    lesson: Lesson, lessons: Sequence[Lesson], seed: Sequence[int], device: torch.device, folder: Path
) -> list[Lesson]:
    """The scene of `lesson` with near parts of any of `lessons` before it."""
    taken = []
    for i in range(MIXTURES):
        rng = np.random.default_rng([*seed, i])
        other = lessons[int(rng.integers(len(lessons)))]
        ratio = float(other.stack.kappa.mean() / lesson.stack.kappa.mean())
        seen = mixed(part_of(lesson.wanted, MIXTURE_PX, rng), lesson.stack, other.wanted, ratio, rng)
        taken.append(lesson.taken_again(altered(seen, lesson.stack, rng), rng, device, folder))
    return taken


def prepare_lessons(
    stacks: Sequence[CapturedStack],
    start: TrainedNetwork | None,
    refine_steps: int,
    device: torch.device,
    run: Path,
    *,
    withhold: bool = True,
) -> list[Lesson]:
    """A lesson of every stack; what is refined once is kept in `run`.

    Under torchrun each process refines its share, and `run` must be on a disk they share.
    """
    rank, world = own_share()

    def prepare(i: int) -> Lesson:
        name = run / "refined" / f"{_fingerprint(stacks[i], start, refine_steps, withhold)}.safetensors"
        own = i % world == rank
        return Lesson.prepare(stacks[i], start, refine_steps, device, run, withhold=withhold, refined=name, own=own)

    ours_first = sorted(range(len(stacks)), key=lambda i: i % world != rank)
    lessons = {i: prepare(i) for i in ours_first}
    return [lessons[i] for i in range(len(stacks))]


def _all_of(stacks: Sequence[CapturedStack]) -> str:
    """What tells these stacks from others, short enough to be said."""
    digest = hashlib.sha256()
    for stack in stacks:
        digest.update(f"{stack.name} {stack.focus_dpt.tolist()} {stack.kappa.tolist()}".encode())
        digest.update(stack.frames.numpy().tobytes())
    return f"{len(stacks)} of SHA-256 {digest.hexdigest()[:12]}"


def _fingerprint(stack: CapturedStack, start: TrainedNetwork | None, refine_steps: int, withhold: bool) -> str:
    """What refined maps depend on, in a few letters."""
    optics = f"{stack.focus_dpt.tolist()} {stack.kappa.tolist()}"
    what = f"{version('daif')} {stack.name} {optics} {refine_steps} {withhold} {start and start.identity}"
    return hashlib.sha256(stack.frames.numpy().tobytes() + what.encode()).hexdigest()[:16]


def withheld_frame(stack: CapturedStack) -> int:
    """Index of the frame whose focus is in the middle of the sweep; -1 where there are too few frames to spare one."""
    if len(stack.frames) < 3:
        return -1
    return int(stack.focus_dpt.argsort()[len(stack.frames) // 2])


def _crop_px(stacks: Sequence[CapturedStack], config: TrainConfig) -> int:
    """Side of the crops: as configured, or what the smallest stack has."""
    return min(config.crop_px, *(min(stack.frames.shape[-2:]) // 16 * 16 for stack in stacks))


def _predict(network: TrainedNetwork, stack: CapturedStack, device: torch.device) -> Estimate:
    frames, focus, kappa, valid = (x.to(device) for x in (stack.frames, stack.focus_dpt, stack.kappa, stack.valid))
    return predict(network, frames, focus, kappa, valid, metric=stack.metric)


def withheld_error(lesson: Lesson, estimate: Estimate) -> float:
    """How badly `estimate`, made without the withheld frame, predicts it: Charbonnier difference x 1000.

    The all-in-focus image is fitted to the other frames at the estimate's depth, and blurred by the occlusion renderer.
    """
    stack, full, index = lesson.stack, lesson.full, lesson.withheld
    depth = estimate.inverse_depth_dpt
    device = depth.device
    parts = (x.to(device) for x in (stack.frames, stack.focus_dpt, stack.kappa))
    misfit = Misfit(*parts, valid=stack.valid.to(device), psf=lesson.psf)
    root, _ = misfit.fitted(root_of(estimate.aif), depth, IMAGE_STEPS)
    seen, target = full.valid[index].to(device), full.frames[index].to(device)
    one = Misfit(
        target[None],
        full.focus_dpt[index : index + 1].to(device),
        full.kappa[index : index + 1].to(device),
        valid=seen[None],
        psf=lesson.psf,
    )
    with torch.no_grad():
        rendered = match_exposure(one.rendered(root, depth)[None], target[None, None])[0, 0]
    return 1000 * float(charbonnier(rendered[:, seen], target[:, seen]))


class DistilTask:
    """Crops of the stacks with their refined maps, of retakes and mixtures of them; judged by the withheld frames.

    Retakes and mixtures are mapped from `folder`.
    """

    teacher = DISTILLED

    def __init__(self, lessons: Sequence[Lesson], config: TrainConfig, device: torch.device, folder: Path) -> None:
        self.lessons, self.config, self.device = list(lessons), config, device
        self.crop = _crop_px([lesson.stack for lesson in self.lessons], config)
        again = [retakes(x, [config.seed, 6, i], device, folder) for i, x in enumerate(self.lessons)]
        self.drawn = [*self.lessons * DRAWN, *itertools.chain(*again)]
        self.mixed_share, self.mixed = max(0.0, 1 - len(self.lessons) / VARIED), list[Lesson]()
        if self.mixed_share:
            for i, lesson in enumerate(self.lessons):
                self.mixed += mixtures(lesson, self.lessons, [config.seed, 7, i], device, folder)

    def batch(self, step: int, part: int = 0, parts: int = 1) -> StackBatch:
        """Random crops of stacks with as many frames as the first that was drawn; mirrored and turned."""
        rng = np.random.default_rng([self.config.seed, 4, step])
        first = self.drawn[int(rng.integers(len(self.drawn)))]
        alike, mixed_alike = (
            [lesson for lesson in group if len(lesson.stack.frames) == len(first.stack.frames)]
            for group in (self.drawn, self.mixed)
        )
        taken: list[Lesson] = []
        crops: list[list[Tensor]] = [[] for _ in range(2 + len(first.prior.maps))]  # frames, depth, prior
        for place in range(self.config.batch):
            group = mixed_alike if self.mixed and rng.random() < self.mixed_share else alike
            lesson = group[int(rng.integers(len(group)))]
            stack, wanted = lesson.stack, lesson.wanted
            height, width = stack.frames.shape[-2:]
            top, left = int(rng.integers(height - self.crop + 1)), int(rng.integers(width - self.crop + 1))
            window = (..., slice(top, top + self.crop), slice(left, left + self.crop))
            turn, mirror = int(rng.integers(4)), rng.random() < 0.5
            if place % parts != part:
                continue
            taken.append(lesson)
            maps = (lesson.quiet, wanted.inverse_depth_dpt[None], *(x[0] for x in lesson.prior.maps))
            for taken_so_far, x in zip(crops, maps, strict=True):
                taken_so_far.append(turned(x[window], turn, mirror).float())
        frames, depth, *swept = map(torch.stack, crops)
        focus, kappa = (torch.stack([getattr(x.stack, name) for x in taken]) for name in ("focus_dpt", "kappa"))
        scalars = map(torch.cat, zip(*(lesson.prior.scalars for lesson in taken), strict=True))
        exact = torch.tensor([float(lesson.exact) for lesson in taken])
        return StackBatch(frames, focus, kappa, depth, prior=Prior(*swept, *scalars), exact=exact)

    def terms(self, output: NetworkOutput, batch: StackBatch) -> DistilTerms:
        """Smooth L1 and differences of depth in px of CoC, and the spread.

        None for the image, which `predict` fuses from the frames: with one, depth gained less and the network's own
        image no more (10 scenes: depth errors -14.4 for -14.9 %, 5 others -6.3 for -7.8 %).

        Spread is learned from retakes only: how far the network is from a refined map says little about how far both
        are from the truth. With such a term a third of the true errors fell out of one std (0.70 to 0.39 within, 10
        scenes).
        """
        assert batch.inverse_depth_dpt is not None
        assert batch.exact is not None
        kappa = batch.kappa.mean(1)[:, None, None, None]
        error_px = (output.inverse_depth_dpt - batch.inverse_depth_dpt) * kappa
        surprise = laplace_surprise(error_px.detach(), output.std_dpt * kappa)
        return DistilTerms(
            depth=F.smooth_l1_loss(error_px, torch.zeros_like(error_px), beta=0.1),
            gradient=0.25 * (error_px.diff(dim=-1).abs().mean() + error_px.diff(dim=-2).abs().mean()),
            spread=0.3 * (surprise.mean((1, 2, 3)) * batch.exact).mean(),
        )

    def validate(self, net: nn.Module) -> dict[str, float]:
        """Mean distance from the refined maps, px of CoC: of whole stacks, but of those that are learned from."""
        assert isinstance(net, DefaultNet | PaperNet)
        network = wrap(net.eval(), {}, "in training")
        distances = []
        for lesson in self.lessons:
            found = _predict(network, lesson.stack, self.device).inverse_depth_dpt.cpu()
            away_px = (found - lesson.wanted.inverse_depth_dpt).abs() * lesson.stack.kappa.mean()
            distances.append(float(away_px.mean()))
        return {"from_refined_px": float(np.mean(distances))}

    def errors(self, net: nn.Module) -> dict[str, float]:
        """Error of each stack's withheld frame."""
        assert isinstance(net, DefaultNet | PaperNet)
        network = wrap(net.eval(), {}, "in training")
        judged = [lesson for lesson in self.lessons if lesson.withheld >= 0]
        return {x.full.name: withheld_error(x, _predict(network, x.stack, self.device)) for x in judged}

    def pictures(self, net: nn.Module) -> dict[str, Tensor]:
        """Wanted and found depth of the first stack side by side."""
        assert isinstance(net, DefaultNet | PaperNet)
        lesson = self.lessons[0]
        found = _predict(wrap(net, {}, "in training"), lesson.stack, self.device).inverse_depth_dpt.cpu()
        both = torch.cat([lesson.wanted.inverse_depth_dpt, found], 1)[None, None]
        return {"wanted_and_found": ((both - both.min()) / (both.max() - both.min())).clamp(0, 1)}


@dataclass(frozen=True)
class Adaptation:
    """What fine-tuning did.

    Attributes:
        before, after: error of each stack's withheld frame, x 1000.
        weights: the file written, None when the network did not get better and was not kept.
    """

    before: dict[str, float]
    after: dict[str, float]
    weights: Path | None

    def table(self) -> str:
        """Before and after, stack by stack, as text."""
        wide = max([len("mean"), *map(len, self.before)])
        rows = [f"{'withheld frame, error x 1000':{wide}}  before   after  change"]
        for name in self.before:
            old, new = self.before[name], self.after[name]
            rows.append(f"{name:{wide}}  {old:6.3f}  {new:6.3f}  {100 * (new / old - 1):+5.1f} %")
        old, new = float(np.mean(list(self.before.values()))), float(np.mean(list(self.after.values())))
        rows.append(f"{'mean':{wide}}  {old:6.3f}  {new:6.3f}  {100 * (new / old - 1):+5.1f} %")
        return "\n".join(rows)


def reliably_lower(before: Sequence[float], after: Sequence[float]) -> bool:
    """Whether `after` is lower than `before`, paired, by a mean ratio that chance does not explain.

    That is beyond its standard error, and beyond LEAST_GAIN of one stack, as it falls in a mean of several.
    """
    change = np.log(np.asarray(after) / np.asarray(before))
    spread = max(LEAST_GAIN, change.std(ddof=1) if len(change) > 1 else 0.0)
    return bool(change.mean() + spread / np.sqrt(len(change)) < 0)


def adapt(
    stacks: Sequence[CapturedStack],
    start: TrainedNetwork | None,
    run: Path,
    config: TrainConfig = FINETUNE,
    *,
    device: torch.device,
    refine_steps: int = 25,
    resume: bool = False,
) -> Adaptation:
    """Refine the stacks, distil them into a copy of `start` (a new network if None), keep it if it is better.

    Whether that helps is judged without the withheld frames (in `run/judged`). If they are then predicted better
    (`reliably_lower`), the network goes on to learn from all frames and is written to `run/weights.safetensors`. A new
    network has no before: it is compared with the plane sweep, never sees the withheld frames, and is kept in any case.

    Stacks whose every frame is of one colour are left out, which is said. Raises DataError when that leaves none, or
    when no stack has three frames: then nothing can be withheld to judge by.
    """
    stacks = _not_plain(told_apart(stacks))
    if all(withheld_frame(stack) < 0 for stack in stacks):
        raise DataError("every stack has two frames only: none can be withheld to judge by; capture at least three")
    run.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(config.seed)
    net = build(config.preset if start is None else start.preset)
    if start is not None:
        net.load_state_dict(start.net.state_dict())
    only_adaptable(net, anew=start is None)
    net.to(device)

    made_from = {
        "stacks": _all_of(stacks),
        "the start": "nothing" if start is None else start.identity,
        "refinement steps": str(refine_steps),
    }

    def teach(task: DistilTask, states: Path) -> None:
        learned = fit(net, task, task.config, states, device=device, resume=resume, made_from=made_from)
        net.load_state_dict(learned)

    def lessons(*, withhold: bool) -> list[Lesson]:
        which = "all frames but one" if withhold else "all frames"
        if is_first_process():
            print(f"refining {len(stacks)} stack(s) from {which}", file=sys.stderr, flush=True)
        return prepare_lessons(stacks, start, refine_steps, device, run, withhold=withhold)

    first = config if start is None else config.model_copy(update={"seed": config.seed + 1})  # other crops and retakes
    judge = DistilTask(lessons(withhold=True), first, device, run)
    teach(judge, run if start is None else run / "judged")
    if start is None:
        before = {x.full.name: _sweep_error(x, device) for x in judge.lessons if x.withheld >= 0}
    else:
        before = judge.errors(start.net)
    after = judge.errors(_tempered(start, net))
    if start is not None:
        if not reliably_lower(list(before.values()), list(after.values())):
            return Adaptation(before, after, None)
        teach(DistilTask(lessons(withhold=False), config, device, run), run)
    kept = _tempered(start, net)
    about: dict[str, Any] = {
        "preset": "paper" if isinstance(kept, PaperNet) else "default",
        "teacher": DISTILLED,
        "started_from": "nothing" if start is None else start.identity,
        "config": config.model_dump(),
        "stacks": [stack.name for stack in stacks],
        "withheld_before": before,
        "withheld_after": after,
    }
    if start is not None:
        gain = start.std_gain * _spread_ratio(start, kept, stacks, device)
        about["calibration"] = {"std_gain": gain, "std_floor_px": start.std_floor_px}
    if is_first_process():
        save_weights(run / "weights.safetensors", kept.state_dict(), about)
    return Adaptation(before, after, run / "weights.safetensors")


def only_adaptable(net: nn.Module, *, anew: bool = False) -> None:
    """Freeze what distilling leaves alone: IMAGE_HEAD, and READING unless `net` learns `anew`."""
    frozen = IMAGE_HEAD if anew else IMAGE_HEAD + READING
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name.split(".")[0] not in frozen)


def _not_plain(stacks: Sequence[CapturedStack]) -> list[CapturedStack]:
    """Those that show anything: any depth predicts a frame of one colour."""
    showing = []
    for stack in stacks:
        if bool((stack.frames.amax((2, 3)) > stack.frames.amin((2, 3))).any()):
            showing.append(stack)
        elif is_first_process():
            print(f"{stack.name}: every frame is of one colour, which tells no depth; left out", file=sys.stderr)
    if not showing:
        raise DataError("every frame of every stack is of one colour: there is nothing to learn depth from")
    return showing


def _tempered(start: TrainedNetwork | None, net: DefaultNet | PaperNet) -> DefaultNet | PaperNet:
    """A network KEPT_CHANGE of the way from the weights of `start` to those of `net`; `net` where there is no start."""
    if start is None:
        return net
    between = copy.deepcopy(net)
    learned = net.state_dict()
    weights = start.net.state_dict().items()
    between.load_state_dict({name: torch.lerp(old, learned[name], KEPT_CHANGE) for name, old in weights})
    return between


def told_apart(stacks: Sequence[CapturedStack]) -> list[CapturedStack]:
    """`stacks` under names of their own: a second `stack` (from another folder) becomes `stack (2)`."""
    met: Counter[str] = Counter()
    found = []
    for stack in stacks:
        met[stack.name] += 1
        count = met[stack.name]
        found.append(stack if count == 1 else replace(stack, name=f"{stack.name} ({count})"))
    return found


def _spread_ratio(
    start: TrainedNetwork, net: DefaultNet | PaperNet, stacks: Sequence[CapturedStack], device: torch.device
) -> float:
    """Mean ratio, over pixels and stacks, of the std of `start` to that of `net` under the same calibration.

    Retakes teach which pixels to doubt, but not what is wrong about the refined maps themselves: with the spread they
    teach, 57 % of the true errors fall within one std. So a fine-tuned network is on average as doubtful as its start.
    """
    tuned = wrap(net.eval(), start.about, "fine-tuned")
    ratios = [
        (_predict(start, stack, device).std_dpt / _predict(tuned, stack, device).std_dpt).log().nanmean()
        for stack in stacks
    ]
    return float(torch.stack(ratios).mean().exp())


def _sweep_error(lesson: Lesson, device: torch.device) -> float:
    stack = lesson.stack
    parts = (x.to(device) for x in (stack.frames, stack.focus_dpt, stack.kappa))
    return withheld_error(lesson, plane_sweep(*parts, valid=stack.valid.to(device)))


# ------------------------------------------------------------------------------------------------- the paper's way


class PublishedTerms(NamedTuple):
    """The published loss terms times the published weights; the last has no gradient (notes/method.md section 7.4)."""

    reconstruction: Tensor
    coarse_aif: Tensor
    smoothness: Tensor
    sharpness: Tensor
    coarse_sharpness: Tensor


class PhotometricTask:
    """End-to-end self-supervision as published: operator, losses, weights; for `PaperNet`."""

    teacher = PHOTOMETRIC

    def __init__(self, stacks: Sequence[CapturedStack], config: TrainConfig) -> None:
        self.stacks, self.config = list(stacks), config
        self.crop = _crop_px(self.stacks, config)

    def batch(self, step: int, part: int = 0, parts: int = 1) -> StackBatch:
        """Random crops of one stack, unchanged: the published training has no augmentation."""
        rng = np.random.default_rng([self.config.seed, 5, step])
        stack = self.stacks[int(rng.integers(len(self.stacks)))]
        height, width = stack.frames.shape[-2:]
        crops = []
        for place in range(self.config.batch):
            top, left = int(rng.integers(height - self.crop + 1)), int(rng.integers(width - self.crop + 1))
            if place % parts == part:
                crops.append(stack.frames[..., top : top + self.crop, left : left + self.crop])
        count = len(crops)
        return StackBatch(torch.stack(crops), stack.focus_dpt.expand(count, -1), stack.kappa.expand(count, -1))

    def terms(self, output: NetworkOutput, batch: StackBatch) -> PublishedTerms:
        """The published five, through the published operator (7 x 7 window, gate at one pixel)."""
        inverse_depth = output.inverse_depth_dpt
        assert output.aif is not None
        rendered = render_stack(output.aif, inverse_depth, batch.focus_dpt, batch.kappa, model="published")
        coc_px = coc_diameter_px(batch.kappa[..., None, None], batch.focus_dpt[..., None, None], inverse_depth)
        terms = published_terms(rendered, batch.frames, output.aif, 1.0 / inverse_depth, coc_px)
        return PublishedTerms(*(getattr(PUBLISHED, name) * term for name, term in terms._asdict().items()))

    def validate(self, net: nn.Module) -> dict[str, float]:
        """The loss on fixed crops, and the share of pixels whose raw depth is dead (zero)."""
        assert isinstance(net, PaperNet)
        device = next(net.parameters()).device
        batch = self.batch(10**9).to(device)
        with torch.inference_mode():
            loss = torch.stack(list(self.terms(net(batch.frames, batch.focus_dpt, batch.kappa), batch))).sum()
            raw = net.raw(batch.frames, 1.0 / batch.focus_dpt.clamp_min(1e-2))
        return {"loss": float(loss), "dead_depth": float((raw[:, 3] == 0).float().mean())}

    def pictures(self, net: nn.Module) -> dict[str, Tensor]:
        """The all-in-focus image of a fixed crop."""
        batch = self.batch(10**9).to(next(net.parameters()).device)
        with torch.inference_mode():
            return {"aif": net(batch.frames, batch.focus_dpt, batch.kappa).aif.sqrt()}


def train_paper(
    stacks: Sequence[CapturedStack], run: Path, config: TrainConfig, *, device: torch.device, resume: bool = False
) -> Path:
    """Train `PaperNet` end to end on the stacks, as published; returns the weights file in `run`."""
    if not all(stack.metric for stack in stacks):
        unknown = ", ".join(stack.name for stack in stacks if not stack.metric)
        raise DataError(f"the paper preset needs focus distances, unknown in {unknown}; use the default preset")
    torch.manual_seed(config.seed)
    task, net = PhotometricTask(stacks, config), PaperNet()
    made_from = {"stacks": _all_of(stacks)}
    net.load_state_dict(fit(net, task, config, run, device=device, resume=resume, made_from=made_from))
    about = {"preset": "paper", "teacher": PHOTOMETRIC, "config": config.model_dump(), "validation": task.validate(net)}
    if is_first_process():
        save_weights(run / "weights.safetensors", net.state_dict(), about)
    return run / "weights.safetensors"
