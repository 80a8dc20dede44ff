"""The training loop: one visible `for`, used for pretraining, for training from nothing and for fine-tuning.

Data order is a pure function of (seed, step), and every state that training carries is stored, so a run that was
killed continues to bit-equal weights on a CPU. Under `torchrun` the processes share every batch and gradients are
averaged: the result does not depend on how many they are, nor on `accumulate`.
"""

from __future__ import annotations

import atexit
import importlib
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from capture.errors import DataError, StoppedError, UsageError
from reconstruct.checkpoint import latest_state, load_state, save_state, save_weights
from reconstruct.dataset import PHOTOGRAPHS, ScenePool, SimulatedBatches, StackBatch
from reconstruct.device import has_bf16, own_share
from reconstruct.losses import laplace_surprise
from reconstruct.memory import ran_out
from reconstruct.network import DefaultNet, NetworkOutput, PaperNet, build, place_hypotheses


class TrainConfig(BaseModel):
    """Everything a training run depends on, apart from its data folders; YAML in `configs/train` overrides it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    preset: Literal["default", "paper"] = "default"
    seed: int = Field(1, ge=0)
    steps: int = Field(3000, ge=1)
    batch: int = Field(5, ge=1, description="stacks a step, shared by all processes")
    accumulate: int = Field(1, ge=1, description="parts that a process works on one after the other, to save memory")
    crop_px: int = Field(160, ge=32, multiple_of=16)
    scenes: int = Field(2000, ge=1, description="simulated scenes in the pool")
    first_scenes: int = Field(400, ge=1, description="scenes used by the first step; one more with every 8 stacks")
    held_out_scenes: int = Field(24, ge=1, description="simulated scenes for validation only")
    scene_px: int = Field(208, ge=32)
    learning_rate: float = Field(1e-3, gt=0)
    schedule_steps: int = Field(
        0, ge=0, description="over which it falls, if `steps` is only their beginning; 0: steps"
    )
    restart_steps: tuple[int, ...] = Field((), description="where it rises again, to half of that; ascending")
    warmup_steps: int = Field(100, ge=0)
    weight_decay: float = Field(1e-4, ge=0)
    gradient_clip: float = Field(1.0, gt=0)
    ema_decay: float = Field(0.995, ge=0, lt=1)
    opinion_weight: float = Field(0.5, ge=0)
    gradient_weight: float = Field(0.5, ge=0)
    distribution_weight: float = Field(0.5, ge=0)
    spread_weight: float = Field(0.3, ge=0)
    aif_weight: float = Field(2.0, ge=0)
    checkpoint_seconds: float = Field(150.0, gt=0)
    keep: Literal["last", "best"] = Field("last", description="which averaged weights are the result")
    patience: int = Field(0, ge=0, description="stop after so many checks without progress; 0 never")
    keep_states: int = Field(2, ge=1)
    checkpoint_every: int = Field(500, ge=1, description="steps")
    validate_every: int = Field(150, ge=1)
    log_every: int = Field(20, ge=1)


# of the shipped weights; configs/train/default.yaml spells it out
RECIPE = TrainConfig(steps=16500, restart_steps=(3000, 4600, 7000), scenes=4000)
NOT_PART_OF_THE_RESULT = {"accumulate", "checkpoint_seconds", "checkpoint_every", "keep_states", "log_every"}
EXTENDABLE = {"steps"}  # a run may be made longer or shorter while it is under way


class SupervisedTerms(NamedTuple):
    """Weighted loss terms against simulated truth; their sum is minimised."""

    depth: Tensor
    opinion: Tensor
    gradient: Tensor
    distribution: Tensor
    spread: Tensor
    aif: Tensor


def supervised_terms(output: NetworkOutput, batch: StackBatch, config: TrainConfig) -> SupervisedTerms:
    """Losses of a batch with truth. Depth errors count in pixels of CoC diameter, the same for every lens.

    depth: smooth L1 (beta 0.1 px), so that small errors count as much as large ones; opinion: the same for the mean of
    the distribution; gradient: L1 of the error's differences at steps of 1 and 4 px; distribution: cross entropy of the
    hypotheses against truth spread linearly over the two nearest; spread: negative log-likelihood of a Laplace
    distribution whose standard deviation is the network's, with the error held fixed; aif: L1 in a gamma of 2.
    """
    assert batch.inverse_depth_dpt is not None
    assert batch.aif is not None
    assert output.aif is not None
    assert output.opinion_dpt is not None
    kappa = batch.kappa.mean(1)[:, None, None, None]
    hypotheses = place_hypotheses(batch.focus_dpt, batch.kappa)
    low, high = (hypotheses.dpt[:, i, None, None, None] for i in (0, -1))
    known = torch.isfinite(batch.inverse_depth_dpt)
    truth = torch.where(known, batch.inverse_depth_dpt, low).clamp(low, high)
    error_px = (output.inverse_depth_dpt - truth) * kappa * known
    share = known.float().mean().clamp_min(1e-6)
    depth = F.smooth_l1_loss(error_px, torch.zeros_like(error_px), beta=0.1) / share
    other_px = (output.opinion_dpt - truth) * kappa * known
    opinion = F.smooth_l1_loss(other_px, torch.zeros_like(other_px), beta=0.1) / share
    gradient = torch.zeros_like(depth)
    for step in (1, 4):
        both_x, both_y = known[..., step:] & known[..., :-step], known[..., step:, :] & known[..., :-step, :]
        gradient = gradient + ((error_px[..., step:] - error_px[..., :-step]).abs() * both_x).mean()
        gradient = gradient + ((error_px[..., step:, :] - error_px[..., :-step, :]).abs() * both_y).mean()
    place = (truth[:, 0, ::2, ::2] - low[:, 0]) / (high - low)[:, 0] * (hypotheses.dpt.shape[1] - 1)  # one in four
    below = place.floor().clamp(0, hypotheses.dpt.shape[1] - 2)
    upper = place - below
    log_p = output.logits.log_softmax(1)  # type: ignore[union-attr]
    index = below.long()[:, None]
    entropy = -(log_p.gather(1, index)[:, 0] * (1 - upper) + log_p.gather(1, index + 1)[:, 0] * upper)
    distribution = (entropy * known[:, 0, ::2, ::2]).mean() / share
    spread = (laplace_surprise(error_px.detach(), output.std_dpt * kappa) * known).mean() / share
    aif = (output.aif.clamp_min(1e-4).sqrt() - batch.aif.clamp_min(1e-4).sqrt()).abs().mean()
    return SupervisedTerms(
        depth,
        config.opinion_weight * opinion,
        config.gradient_weight * gradient / 4,
        config.distribution_weight * distribution,
        config.spread_weight * spread,
        config.aif_weight * aif,
    )


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine down to 1 % of the peak; the same from every restart, half as high.

    Warm restarts as in Loshchilov and Hutter 2017. Of a longer schedule (`schedule_steps`), its beginning.
    """
    whole = config.schedule_steps or config.steps
    starts = [0, *(start for start in config.restart_steps if start < whole), whole]
    leg = max(i for i, start in enumerate(starts[:-1]) if start <= step)
    begin, end = starts[leg], starts[leg + 1]
    peak = config.learning_rate / (2 if leg else 1)
    if step - begin < config.warmup_steps:
        return peak * (step - begin + 1) / config.warmup_steps
    done = (step - begin - config.warmup_steps) / max(1, end - begin - config.warmup_steps)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


class Task(Protocol):
    """What a run learns from: where batches come from, what is minimised, how progress is judged."""

    teacher: str  # said in the log and stored with the weights

    def batch(self, step: int, part: int = 0, parts: int = 1) -> StackBatch:
        """Every `parts`-th stack of the batch of `step`, from `part` on: the same whenever it is asked for."""
        ...

    def terms(self, output: NetworkOutput, batch: StackBatch) -> NamedTuple:
        """Weighted loss terms; their sum is minimised."""
        ...

    def validate(self, net: nn.Module) -> dict[str, float]:
        """How good `net` is, the same question at every call; the first figure decides, lower is better."""
        ...

    def pictures(self, net: nn.Module) -> dict[str, Tensor]:
        """Images (N, C, H, W), 0 to 1, for TensorBoard."""
        ...


@dataclass
class SimulatedTask:
    """Supervised by simulated truth: scenes of a `ScenePool`, and others held out for validation."""

    config: TrainConfig
    pool: Path
    teacher = "supervised by simulated truth; no captured stack, no photograph with depth"

    def __post_init__(self) -> None:
        config = self.config
        if config.crop_px > config.scene_px:
            raise UsageError(
                f"crop_px is {config.crop_px}, scene_px {config.scene_px}: crops must fit into the simulated scenes; "
                "lower the one or raise the other in the config"
            )
        scenes = ScenePool(self.pool, config.seed, config.scene_px)
        self.data = SimulatedBatches(scenes, config.scenes, config.first_scenes, config.batch, config.crop_px)
        others = ScenePool(self.pool, config.seed + 1000, config.scene_px)
        held_out = SimulatedBatches(others, config.held_out_scenes, config.held_out_scenes, 6, config.crop_px)
        self.held_out = [held_out.batch(i) for i in range(4)]

    def batch(self, step: int, part: int = 0, parts: int = 1) -> StackBatch:
        return self.data.batch(step, part, parts)

    def terms(self, output: NetworkOutput, batch: StackBatch) -> NamedTuple:
        return supervised_terms(output, batch, self.config)

    def validate(self, net: nn.Module) -> dict[str, float]:
        return validate(net, self.held_out)

    def pictures(self, net: nn.Module) -> dict[str, Tensor]:
        return depth_pictures(net, self.held_out[0])


def depth_pictures(net: nn.Module, batch: StackBatch) -> dict[str, Tensor]:
    """Depth wanted and depth found side by side, and the all-in-focus image, for TensorBoard."""
    batch = batch.to(next(net.parameters()).device)
    assert batch.inverse_depth_dpt is not None
    with torch.inference_mode():
        output = net(batch.frames, batch.focus_dpt, batch.kappa, noise=batch.noise)
    both = torch.cat([batch.inverse_depth_dpt, output.inverse_depth_dpt], 3)
    low, high = batch.inverse_depth_dpt.amin(), batch.inverse_depth_dpt.amax()
    return {"wanted_and_found": ((both - low) / (high - low)).clamp(0, 1), "aif": output.aif.clamp(0, 1).sqrt()}


def validate(model: nn.Module, batches: list[StackBatch]) -> dict[str, float]:
    """Errors over `batches` in pixels of CoC diameter (mean, median, RMSE, share below 1 px) and of the AIF (L1)."""
    errors, aif = [], []
    device = next(model.parameters()).device
    for batch in (batch.to(device) for batch in batches):
        assert batch.inverse_depth_dpt is not None
        assert batch.aif is not None
        with torch.inference_mode():
            output = model(batch.frames, batch.focus_dpt, batch.kappa, noise=batch.noise)
        kappa = batch.kappa.mean(1)[:, None, None, None]
        error = ((output.inverse_depth_dpt - batch.inverse_depth_dpt) * kappa).abs()
        errors.append(error[torch.isfinite(error)])
        aif.append((output.aif - batch.aif).abs().mean())
    every = torch.cat(errors)
    return {
        "mae_px": float(every.mean()),
        "median_px": float(every.median()),
        "rmse_px": float(every.square().mean().sqrt()),
        "within_1px": float((every < 1).float().mean()),
        "aif_l1": float(torch.stack(aif).mean()),
    }


def calibrate_spread(model: nn.Module, batches: list[StackBatch]) -> dict[str, float]:
    """Gain and floor that make the network's spread honest, std = hypot(gain * spread, floor), in px of CoC.

    Over the pixels of `batches`, 68 % of the errors shall be below one std; of all such pairs, the one under which a
    Laplace distribution of that std finds the errors likeliest.
    """
    errors, spreads = [], []
    device = next(model.parameters()).device
    for batch in (batch.to(device) for batch in batches):
        with torch.inference_mode():
            output = model(batch.frames, batch.focus_dpt, batch.kappa, noise=batch.noise)
        assert batch.inverse_depth_dpt is not None
        for b, kappa in enumerate(batch.kappa):
            depth, truth = output.inverse_depth_dpt[b, 0], batch.inverse_depth_dpt[b, 0]
            known = torch.isfinite(truth)
            errors.append(((depth - truth) * kappa.mean()).abs()[known][::7])
            spreads.append((output.std_dpt[b, 0] * kappa.mean())[known][::7])
    error, spread = torch.cat(errors), torch.cat(spreads)
    best = (math.inf, 1.0, 0.0)
    for floor in (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4):
        low, high = 0.01, 100.0
        for _ in range(30):
            gain = math.sqrt(low * high)
            covered = float((error < torch.hypot(gain * spread, torch.tensor(floor))).float().mean())
            low, high = (gain, high) if covered < 0.68 else (low, gain)
        std = torch.hypot(gain * spread, torch.tensor(floor))
        unlikely = float((torch.log(std) + math.sqrt(2.0) * error / std).mean())
        best = min(best, (unlikely, gain, floor))
    return {"std_gain": best[1], "std_floor_px": best[2]}


# -------------------------------------------------------------------------------------------------------- the loop


class Average:
    """Exponential moving average of the weights; its horizon grows with the step, up to 1 / (1 - decay)."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, tensor in model.state_dict().items():
            self.tensors[name].lerp_(tensor, 1 - decay)


def fit(
    net: DefaultNet | PaperNet,
    task: Task,
    config: TrainConfig,
    run: Path,
    *,
    device: torch.device,
    resume: bool = False,
    made_from: Mapping[str, str] | None = None,
) -> dict[str, Tensor]:
    """Train `net` in place on `task`; returns the averaged weights, and leaves states and logs in `run`.

    Args:
        net: where training starts; ignored when a state is resumed.
        task: data and loss.
        config: everything else.
        run: folder for the states (`step-...`), TensorBoard events and, at the end, nothing else.
        device: from `pick_device`.
        resume: continue from the newest state in `run`, if there is one.
        made_from: what else the result depends on, by name (stacks, start ...); a state made from anything else is not
            resumed.

    Raises:
        DataError: a state that is damaged or belongs to another config or `made_from`; a loss that is not finite (the
            last good state stays).
        UsageError: `run` holds states and `resume` is False; the batch does not fit into memory or cannot be shared.
        StoppedError: SIGINT or SIGTERM came to a single process; the step in hand was finished and its state kept.
    """
    rank, world = _join_processes(device)
    shares = world * config.accumulate
    if config.batch < shares:
        raise UsageError(
            f"a batch of {config.batch} cannot be shared by {world} process(es) x accumulate {config.accumulate}; "
            f"make `batch` at least {shares}"
        )
    net.to(device)
    if device.type == "cuda":
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    fused = device.type in ("cpu", "cuda")
    decay = config.weight_decay
    optimizer = torch.optim.AdamW(net.parameters(), config.learning_rate, weight_decay=decay, fused=fused)
    average = Average(net, config.ema_decay)
    made_of = config.model_dump() | dict(made_from or {})
    start, history, best = _resume(net, optimizer, average, made_of, run, resume)
    model: nn.Module = net
    if world > 1:
        model = nn.parallel.DistributedDataParallel(net)
        warnings.filterwarnings("ignore", "Grad strides do not match")  # a 1x1 weight's may be written in two ways
    scores = [entry["score"] for entry in history]
    if _out_of_patience(config, scores):
        return _on_all(best or average.tensors, device, world)
    board = _tensorboard(run) if rank == 0 else None
    saved_at = time.monotonic()
    shown, stopping = display(config.steps, start, quiet=rank != 0), _stop_request(world == 1)
    with shown as show, stopping as stop, _in_bf16(net, device):
        show.note(
            f"{type(net).__name__}: {task.teacher}; steps {start} to {config.steps} on {device}, {world} process(es)"
        )
        for step in range(start, config.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            optimizer.zero_grad(set_to_none=True)
            named: dict[str, float] = {}
            try:
                for turn in range(config.accumulate):
                    batch = task.batch(step, rank * config.accumulate + turn, shares).to(device)
                    weight = len(batch.frames) * world / config.batch  # the processes' gradients are averaged
                    apart = isinstance(model, nn.parallel.DistributedDataParallel) and turn < config.accumulate - 1
                    with model.no_sync() if apart else nullcontext():  # type: ignore[operator]
                        optics = batch.focus_dpt, batch.kappa
                        asked = {"prior": batch.prior, "noise": batch.noise, "with_aif": batch.aif is not None}
                        output = model(batch.frames, *optics, **asked)
                        terms = task.terms(output, batch)
                        _check_finite(terms, step, run)
                        (weight * torch.stack(list(terms)).sum()).backward()
                    for name, term in terms._asdict().items():
                        named[name] = named.get(name, 0.0) + weight * float(term.detach())
            except (RuntimeError, MemoryError) as error:
                if not ran_out(error):
                    raise
                raise UsageError(
                    f"out of memory with batch {config.batch} of {config.crop_px} px crops; "
                    "raise `accumulate`, or lower `batch` or `crop_px`, in the config"
                ) from error
            norm = nn.utils.clip_grad_norm_(net.parameters(), config.gradient_clip)
            if not torch.isfinite(norm):
                raise DataError(f"step {step}: the gradient is {float(norm)}; the last good state is in {run}")
            optimizer.step()
            average.update(net, step)
            done = step + 1
            show.step(done, named, config.batch, log=done % config.log_every == 0)
            if board is not None and done % config.log_every == 0:
                for name, value in (named | {"gradient_norm": float(norm)}).items():
                    board.add_scalar(f"train/{name}", value, done)
            last = done == config.steps
            if rank == 0 and (done % config.validate_every == 0 or last):
                metrics = _validate_average(net, average, task, board, done)
                show.note(f"step {done}, held out: " + ", ".join(f"{k} {v:.4g}" for k, v in metrics.items()))
                history.append({"step": done, "score": next(iter(metrics.values())), **metrics})
                scores.append(history[-1]["score"])
                if config.keep == "best" and scores[-1] <= min(scores):
                    best = {name: tensor.clone() for name, tensor in average.tensors.items()}
                if _out_of_patience(config, scores):
                    show.note(f"stopped at step {done}: no better for {config.patience} checks")
                    last = True
            if world > 1 and config.patience and done % config.validate_every == 0:
                last = _told_by_the_first(last, device)
            due = time.monotonic() - saved_at > config.checkpoint_seconds or done % config.checkpoint_every == 0
            if rank == 0 and (due or last or stop):
                parts = {
                    "model": net.state_dict(),
                    "average": average.tensors,
                    "optimizer": _optimizer_tensors(optimizer, net),
                    "random": {"torch": torch.get_rng_state()},
                    "best": best,
                }
                save_state(run, done, parts, {"made_of": made_of, "history": history})
                for old in sorted(run.glob("step-*"))[: -config.keep_states]:
                    shutil.rmtree(old)
                saved_at = time.monotonic()
            if last:
                break
            if stop:
                again = "the same command with --resume goes on from there"
                raise StoppedError(f"stopped after step {done} of {config.steps}; {again}", stop[0])
    if board is not None:
        board.close()
    return _on_all(best or average.tensors, device, world)


def _out_of_patience(config: TrainConfig, scores: list[float]) -> bool:
    return bool(config.patience and scores) and len(scores) - 1 - scores.index(min(scores)) >= config.patience


def _on_all(tensors: dict[str, Tensor], device: torch.device, world: int) -> dict[str, Tensor]:
    """What the first process holds, in all of them: only that knows which weights were best."""
    answer = {name: tensor.to(device) for name, tensor in tensors.items()}
    if world > 1:
        for name in sorted(answer):  # a resumed run has them in another order
            torch.distributed.broadcast(answer[name], 0)
    return answer


@contextmanager
def _stop_request(wanted: bool) -> Iterator[list[int]]:
    """Holds the first SIGINT or SIGTERM, if `wanted` and in the main thread; a second does what it always does."""
    asked: list[int] = []
    before: dict[int, Any] = {}

    def on_signal(number: int, _: object) -> None:
        asked.append(number)
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    if wanted and threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        restore()


@contextmanager
def _in_bf16(net: DefaultNet | PaperNet, device: torch.device) -> Iterator[None]:
    """What of `net` gains by it is in bf16, if `device` has units for that; the published network never is."""
    if not isinstance(net, DefaultNet):
        yield
        return
    net.bf16 = has_bf16(device)
    try:
        yield
    finally:
        net.bf16 = False


def pretrain(config: TrainConfig, run: Path, pool: Path, *, device: torch.device, resume: bool = False) -> Path:
    """Train a new network on simulated stacks with their truth; returns the weights file in `run`."""
    torch.manual_seed(config.seed)
    task = SimulatedTask(config, pool)
    net = build(config.preset)
    tensors = fit(net, task, config, run, device=device, resume=resume)
    net.load_state_dict(tensors)
    if not is_first_process():
        return run / "weights.safetensors"
    about = {
        "preset": config.preset,
        "teacher": task.teacher,
        "data": f"procedural scenes; textures: drawn patterns and scikit-image's {', '.join(PHOTOGRAPHS)}",
        "config": config.model_dump(),
        "validation": task.validate(net),
        "calibration": calibrate_spread(net, task.held_out) if config.preset == "default" else {},
    }
    save_weights(run / "weights.safetensors", tensors, about)
    return run / "weights.safetensors"


def is_first_process() -> bool:
    """Whether this process is the one that writes, prints and decides; always, unless torchrun started several."""
    return own_share()[0] == 0


def _told_by_the_first(decision: bool, device: torch.device) -> bool:
    """What the first process decided, in all of them."""
    told = torch.tensor(float(decision), device=device)
    torch.distributed.broadcast(told, 0)
    return bool(told)


def _join_processes(device: torch.device) -> tuple[int, int]:
    """(rank, number of processes); under torchrun joins the others (gloo on CPU, nccl on CUDA)."""
    if own_share()[1] == 1:
        return 0, 1
    if not torch.distributed.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # imported later, as DDP does, it keeps the group as a default argument: then gloo's threads outlive Python, and
        # one that still lets go of a tensor aborts the process
        importlib.import_module("torch.distributed.nn.functional")
        store, rank, world = next(torch.distributed.rendezvous("env://"))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the store still holds what killed ones wrote
        torch.distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=torch.distributed.PrefixStore(f"attempt-{attempt}", store),
            rank=rank,
            world_size=world,
        )
        atexit.register(torch.distributed.destroy_process_group)  # not before: fine-tuning trains twice
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def refuse_another(run: Path, *, resume: bool) -> None:
    """UsageError if `run` holds a training run that is not to be resumed."""
    state = latest_state(run)
    if state is not None and not resume:
        raise UsageError(
            f"{run} already holds a training run at {state.name}; use --resume to continue it, or another -o"
        )


def _resume(
    net: nn.Module, optimizer: torch.optim.Optimizer, average: Average, made_of: dict[str, Any], run: Path, resume: bool
) -> tuple[int, list[dict[str, Any]], dict[str, Tensor]]:
    """Put the newest state of `run` into place; (next step, validation history so far, best weights so far)."""
    refuse_another(run, resume=resume)
    state = latest_state(run)
    if state is None:
        return 0, [], {}
    try:
        parts, about = load_state(state)
    except DataError as error:
        raise DataError(f"{error}; delete {state.name} to go on from the state before it") from error
    stored = about.get("made_of")
    if not isinstance(stored, dict):
        raise DataError(f"{state}: made by another version of daif; use another -o")
    for name, now in json.loads(json.dumps(made_of)).items():
        if name not in NOT_PART_OF_THE_RESULT | EXTENDABLE and stored.get(name) != now:
            raise DataError(
                f"{state}: was trained with {name} = {stored.get(name)!r}, now {now!r}; "
                "continue with the old value or use another -o"
            )
    try:
        net.load_state_dict(parts["model"])
    except (RuntimeError, KeyError) as error:
        raise DataError(f"{state}: does not fit this version's network; use another -o") from error
    device = next(net.parameters()).device
    average.tensors = {name: tensor.to(device) for name, tensor in parts["average"].items()}
    states: dict[int, dict[str, Tensor]] = {}
    for i, (name, _) in enumerate(net.named_parameters()):
        states[i] = {k.rpartition(".")[2]: v for k, v in parts["optimizer"].items() if k.rpartition(".")[0] == name}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})  # which knows where each part belongs
    if "random" in parts:
        torch.set_rng_state(parts["random"]["torch"])
    return int(about["step"]), list(about["history"]), parts.get("best", {})


def _optimizer_tensors(optimizer: torch.optim.Optimizer, net: nn.Module) -> dict[str, Tensor]:
    """AdamW's state by parameter name: `NAME.exp_avg`, `NAME.exp_avg_sq`, `NAME.step`."""
    return {
        f"{name}.{key}": value
        for name, parameter in net.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def _check_finite(terms: Any, step: int, run: Path) -> None:
    wrong = [f"{name} = {float(term.detach())}" for name, term in terms._asdict().items() if not torch.isfinite(term)]
    if wrong:
        raise DataError(f"step {step}: the loss is not finite ({', '.join(wrong)}); the last good state is in {run}")


def _validate_average(
    net: DefaultNet | PaperNet, average: Average, task: Task, board: Any, done: int
) -> dict[str, float]:
    shown = build("paper" if isinstance(net, PaperNet) else "default").to(next(net.parameters()).device)
    shown.load_state_dict(average.tensors)
    metrics = task.validate(shown)
    if board is not None:
        for name, value in metrics.items():
            board.add_scalar(f"held_out/{name}", value, done)
        for name, images in task.pictures(shown).items():
            board.add_images(name, images, done)
    return metrics


def _tensorboard(run: Path) -> Any:
    """A TensorBoard writer into `run`, or None where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("TensorBoard is not installed (pip install 'daif[train]'): no curves are written", file=sys.stderr)
        return None
    return SummaryWriter(str(run / "tensorboard"))


class _Display:
    """Loss terms, stacks per second and time left on stderr: a live bar on a terminal, plain lines elsewhere."""

    def __init__(self, total: int, start: int, bar: Any, quiet: bool) -> None:
        self.total, self.quiet, self.bar = total, quiet, bar
        self.task = bar.add_task("training", total=total, completed=start, text="") if bar is not None else None
        self.began, self.start, self.stacks = time.monotonic(), start, 0

    def step(self, done: int, terms: dict[str, float], stacks: int, *, log: bool) -> None:
        self.stacks += stacks
        if self.quiet or not (log or self.bar is not None):
            return
        passed = time.monotonic() - self.began
        left_s = passed / (done - self.start) * (self.total - done)
        named = " ".join(f"{name} {value:.3f}" for name, value in terms.items())
        text = f"{named}  {self.stacks / passed:.2f} stacks/s"
        if self.bar is not None:
            self.bar.update(self.task, completed=done, text=text)
        else:
            self.note(f"step {done}/{self.total}  {text}  {left_s / 60:.1f} min left")

    def note(self, text: str) -> None:
        if self.quiet:
            return
        if self.bar is not None:
            self.bar.console.print(text)
        else:
            print(text, file=sys.stderr, flush=True)


@contextmanager
def display(total: int, start: int, *, quiet: bool) -> Iterator[_Display]:
    """How far steps `start` to `total` have come, said while the context lasts."""
    if quiet or not sys.stderr.isatty():
        yield _Display(total, start, None, quiet)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(), TextColumn("{task.fields[text]}"))
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield _Display(total, start, bar, quiet)


# ----------------------------------------------------------------------------------------------------- before a run


def step_memory_bytes(config: TrainConfig, frames: int = 5) -> int:
    """What one training step holds at its peak: weights, gradients, AdamW, average, and tensors kept for backward.

    The last are counted on one crop and scaled to the batch.
    """
    net = build(config.preset)
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    image = torch.rand(1, frames, 3, config.crop_px, config.crop_px)
    focus, kappa = torch.linspace(0.5, 1.5, frames)[None], torch.full((1, frames), 10.0)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        output = net(image, focus, kappa)
    del output
    weights = sum(p.numel() * p.element_size() for p in net.parameters())
    return 5 * weights + -(-config.batch // config.accumulate) * sum(kept.values())
