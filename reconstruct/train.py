"""The training loop, for pretraining on simulated stacks and for everything that starts from captured ones.

One visible loop in plain torch. Data order is a pure function of (seed, step) and every random state is stored, so
a run that was killed continues to bit-equal weights on a CPU.
"""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from capture.errors import DataError
from reconstruct.checkpoint import latest_state, load_state, save_state, save_weights
from reconstruct.dataset import ScenePool, SimulatedBatches, StackBatch
from reconstruct.network import DefaultNet, NetworkOutput, place_hypotheses

logger = logging.getLogger(__name__)


class TrainConfig(BaseModel):
    """Everything a training run depends on, apart from its data folders; YAML in `configs/train` overrides it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: Literal["default", "paper"] = "default"
    seed: int = 1
    steps: int = Field(1000, ge=1)
    batch: int = Field(6, ge=1)
    crop_px: int = Field(128, ge=32, multiple_of=16)
    scenes: int = Field(675, ge=1, description="simulated scenes in the pool")
    first_scenes: int = Field(300, ge=1, description="scenes used by the first step; one more with every 16 stacks")
    scene_px: int = Field(144, ge=32)
    learning_rate: float = Field(2e-3, gt=0)
    warmup_steps: int = Field(50, ge=0)
    weight_decay: float = Field(1e-4, ge=0)
    gradient_clip: float = Field(1.0, gt=0)
    ema_decay: float = Field(0.99, ge=0, lt=1)
    gradient_weight: float = Field(0.5, ge=0)
    distribution_weight: float = Field(0.15, ge=0)
    spread_weight: float = Field(0.05, ge=0)
    aif_weight: float = Field(2.0, ge=0)
    checkpoint_seconds: float = Field(150.0, gt=0)
    keep_states: int = Field(2, ge=1)
    validate_every: int = Field(250, ge=1)
    log_every: int = Field(20, ge=1)


class SupervisedTerms(NamedTuple):
    """Weighted loss terms against simulated truth; their sum is minimised."""

    depth: Tensor
    gradient: Tensor
    distribution: Tensor
    spread: Tensor
    aif: Tensor


def supervised_terms(output: NetworkOutput, batch: StackBatch, config: TrainConfig) -> SupervisedTerms:
    """Losses of a batch with truth. Depth errors count in pixels of CoC diameter, the same for every lens.

    depth: smooth L1 (beta 0.5 px); gradient: L1 of its differences at steps of 1 and 4 px; distribution: cross
    entropy of the hypotheses against truth spread linearly over the two nearest; spread: negative log-likelihood of
    a Laplace distribution whose standard deviation is the network's, with the error held fixed; aif: L1 in a gamma
    of 2.
    """
    assert batch.inverse_depth_dpt is not None
    assert batch.aif is not None
    kappa = batch.kappa.mean(1)[:, None, None, None]
    hypotheses = place_hypotheses(batch.focus_dpt, batch.kappa, output.logits.shape[1])  # type: ignore[union-attr]
    low, high = (hypotheses.dpt[:, i, None, None, None] for i in (0, -1))
    known = torch.isfinite(batch.inverse_depth_dpt)
    truth = torch.where(known, batch.inverse_depth_dpt, low).clamp(low, high)
    error_px = (output.inverse_depth_dpt - truth) * kappa * known
    share = known.float().mean().clamp_min(1e-6)
    depth = F.smooth_l1_loss(error_px, torch.zeros_like(error_px), beta=0.5) / share
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
    scale_px = output.std_dpt * kappa / math.sqrt(2.0)
    spread = ((torch.log(scale_px) + error_px.detach().abs() / scale_px) * known).mean() / share
    aif = (output.aif.clamp_min(1e-4).sqrt() - batch.aif.clamp_min(1e-4).sqrt()).abs().mean()
    return SupervisedTerms(
        depth,
        config.gradient_weight * gradient / 4,
        config.distribution_weight * distribution,
        config.spread_weight * spread,
        config.aif_weight * aif,
    )


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine down to 1 % of the peak."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


def validate(model: nn.Module, batches: list[StackBatch]) -> dict[str, float]:
    """Mean and median error in pixels of CoC, share within 1 px, and mean absolute AIF error, over `batches`."""
    errors, aif = [], []
    for batch in batches:
        with torch.inference_mode():
            output = model(batch.frames, batch.focus_dpt, batch.kappa)
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


class _Ema:
    """Exponential moving average of the weights; its horizon grows with the step, up to 1 / (1 - decay)."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, tensor in model.state_dict().items():
            self.tensors[name].lerp_(tensor, 1 - decay)


def pretrain(config: TrainConfig, run: Path, pool: Path, *, resume: bool = False) -> Path:
    """Train on simulated stacks with their truth; returns the weights file in `run`.

    Raises DataError if the loss is no longer finite; the last good state stays in `run`.
    """
    torch.manual_seed(config.seed)
    model: nn.Module = DefaultNet()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    average = _Ema(model, config.ema_decay)
    data = SimulatedBatches(
        ScenePool(pool, config.seed, config.scene_px), config.scenes, config.first_scenes, config.batch, config.crop_px
    )
    held_out = SimulatedBatches(ScenePool(pool, config.seed + 1000, config.scene_px), 24, 24, 6, config.crop_px)
    validation = [held_out.batch(i) for i in range(4)]
    start = 0
    state = latest_state(run) if resume else None
    if state is not None:
        parts, about = load_state(state)
        model.load_state_dict(parts["model"])
        average.tensors = parts["average"]
        _load_optimizer(optimizer, model, parts["optimizer"])
        start = about["step"]
    saved_at = time.monotonic()
    history: list[dict[str, Any]] = []
    began, stacks = time.monotonic(), 0
    for step in range(start, config.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        batch = data.batch(step)
        terms = supervised_terms(model(batch.frames, batch.focus_dpt, batch.kappa), batch, config)
        loss = torch.stack(list(terms)).sum()
        if not torch.isfinite(loss):
            raise DataError(f"step {step}: loss is {loss.item()}; the last good state is in {run}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
        optimizer.step()
        average.update(model, step)
        stacks += config.batch
        done = step + 1
        if done % config.log_every == 0:
            rate = stacks / (time.monotonic() - began)
            named = " ".join(f"{name} {float(term):.3f}" for name, term in terms._asdict().items())
            logger.info("step %d/%d  %s  |g| %.2f  %.2f stacks/s", done, config.steps, named, float(norm), rate)
        if done % config.validate_every == 0 or done == config.steps:
            shown = DefaultNet()
            shown.load_state_dict(average.tensors)
            metrics = validate(shown, validation)
            history.append({"step": done, **metrics})
            logger.info("validation at %d: %s", done, json.dumps(metrics))
        if time.monotonic() - saved_at > config.checkpoint_seconds or done == config.steps:
            parts = {
                "model": model.state_dict(),
                "average": average.tensors,
                "optimizer": _optimizer_tensors(optimizer, model),
            }
            save_state(run, done, parts, {"config": config.model_dump(), "history": history})
            for old in sorted(run.glob("step-*"))[: -config.keep_states]:
                for file in old.iterdir():
                    file.unlink()
                old.rmdir()
            saved_at = time.monotonic()
    path = run / "weights.safetensors"
    save_weights(path, average.tensors, {"preset": config.preset, "config": config.model_dump(), "validation": history})
    return path


def _optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """AdamW's state by parameter name: `NAME.exp_avg`, `NAME.exp_avg_sq`, `NAME.step`."""
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def _load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        prefix = f"{name}."
        optimizer.state[parameter] = {
            key.removeprefix(prefix): value for key, value in tensors.items() if key.rpartition(".")[0] == name
        }
