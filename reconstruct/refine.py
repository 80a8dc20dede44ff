"""One stack's depth and all-in-focus image improved through the renderer: no training, no weights.

Adam on inverse depth and on a free all-in-focus image until the rendered stack matches the captured one
(`notes/forward-model.md` section 2). The image must be free: at the true depth, fused frames carry foreground light
smeared over the background, which a smoothed depth explains better.

Gradients alone cannot carry an edge of a near object across more than a pixel. So twice on the way the depth map is
offered moves that no gradient finds: near surfaces grown or shrunk by a pixel or two; every pixel takes the offer if
the rendered frames around it then fit better (fusion moves, Lempitsky et al. 2010, without the graph cut).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from reconstruct.estimate import Estimate
from reconstruct.fusion import fuse
from reconstruct.losses import edge_aware_smoothness
from reconstruct.render import Model, PsfShape, render_stack

BLACK = 0.01  # linear light added before the square root, which gives dark and bright pixels the same noise
MOVED_PX = 0.3  # change of blur below which a move is not worth offering
MOVES_AT = (0.16, 0.48)  # share of the steps before each round of moves
STEADY_SHARE = 0.6  # of the steps at full size; then they shrink to 0


@dataclass(frozen=True)
class RefineConfig:
    """How far and how carefully `refine` moves; "px of blur" is the std of blur, a quarter of the CoC.

    Attributes:
        depth_step_px: change of inverse depth per step, in px of blur.
        image_step: change of the all-in-focus image per step.
        focus_step_px: change of each frame's focus setting per step, in px of blur; 0 trusts the camera.
        focus_prior_px: how wrong the focus settings are expected to be.
        charbonnier: differences below this count quadratically, in square roots of linear light.
        smoothness: weight of the edge-aware smoothness of depth in px of blur.
        moves_px: by how many pixels near surfaces are tried grown and shrunk.
        window_px: side of the square around a pixel over which a move is judged.
        floor_px: std of the lens's and sensor's own blur.
    """

    depth_step_px: float = 0.09
    image_step: float = 0.006
    focus_step_px: float = 0.0
    focus_prior_px: float = 0.1
    charbonnier: float = 0.02
    smoothness: float = 0.006
    moves_px: tuple[int, ...] = (1, 2, 3)
    window_px: int = 9
    floor_px: float = 0.3


def refine(
    frames: Tensor,
    focus_dpt: Tensor,
    kappa: Tensor,
    start: Estimate,
    *,
    steps: int = 25,
    valid: Tensor | None = None,
    model: Model = "occlusion",
    psf: PsfShape = "disc",
    config: RefineConfig | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> Estimate:
    """`start` after `steps` of descent: the depth with the lowest loss, and the image fused from the frames at it.

    Args:
        frames: linear focal stack, (S, 3, H, W); pixels that are not finite do not count.
        focus_dpt: focus of each frame, (S,) in 1/m.
        kappa: blur gain of each frame, (S,), pixels of CoC diameter per dioptre.
        start: where to begin.
        valid: pixels that hold data, (S, H, W).
        model, psf: see `render_stack`; `scatter` takes a third of the time, but beside near objects it can prefer a
            wrong depth (tests/reconstruct/test_refine.py).
        progress: called with each step's number and loss.
    """
    state = _Refinement(frames, focus_dpt, kappa, start, valid, model, psf, config or RefineConfig())
    move_at = {round(share * steps) for share in MOVES_AT} - {0}
    for step in range(steps):
        state.slow_down(min(1.0, (1 - step / steps) / (1 - STEADY_SHARE)))
        if step in move_at:
            state.try_moves()
        loss = state.descend()
        if progress is not None:
            progress(step, loss)
    return state.best()


class _Refinement:
    """The variables of one refinement and their descent."""

    def __init__(
        self,
        frames: Tensor,
        focus_dpt: Tensor,
        kappa: Tensor,
        start: Estimate,
        valid: Tensor | None,
        model: Model,
        psf: PsfShape,
        config: RefineConfig,
    ) -> None:
        self.config, self.model, self.psf, self.start, self.valid = config, model, psf, start, valid
        self.focus_dpt, self.kappa = focus_dpt.to(frames), kappa.to(frames)
        usable = torch.isfinite(frames).all(1, keepdim=True)
        if valid is not None:
            usable = usable & valid[:, None]
        self.frames = frames
        self.usable = usable.to(frames.dtype)
        self.target = _perceived(torch.where(usable, frames, 0.0))
        self.dpt_per_px = 4.0 / float(self.kappa.abs().mean())
        self.depth_px = (start.inverse_depth_dpt / self.dpt_per_px).requires_grad_()
        self.aif = start.aif.to(frames).clone().requires_grad_()
        self.focus_px = torch.zeros_like(self.focus_dpt).requires_grad_(config.focus_step_px > 0)
        rates = [(self.depth_px, config.depth_step_px), (self.aif, config.image_step)]
        if config.focus_step_px > 0:
            rates.append((self.focus_px, config.focus_step_px))
        self.rates = [rate for _, rate in rates]
        self.optimizer = torch.optim.Adam([{"params": [variable], "lr": rate} for variable, rate in rates])
        self.lowest = float("inf")
        self.first = self.kept = self.depth_px.detach().clone()

    def slow_down(self, factor: float) -> None:
        """Take steps of `factor` times the configured size."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor

    def misfit(self, aif: Tensor, depth_px: Tensor) -> Tensor:
        """Charbonnier difference of every rendered value, (S, 3, H, W), 0 where the frames hold no data."""
        rendered = render_stack(
            aif[None],
            (depth_px * self.dpt_per_px)[None, None],
            (self.focus_dpt + self.focus_px * self.dpt_per_px)[None],
            self.kappa[None],
            model=self.model,
            psf=self.psf,
            floor_px=self.config.floor_px,
        )[0]
        difference = _perceived(rendered.clamp_min(0)) - self.target
        scale = self.config.charbonnier
        return ((difference.square() + scale * scale).sqrt() - scale) * self.usable

    def loss(self) -> Tensor:
        """What is minimised, a scalar."""
        guide = _perceived(self.aif.detach().clamp_min(0))
        smoothness = edge_aware_smoothness(self.depth_px[None, None], guide[None])
        photometric = self.misfit(self.aif, self.depth_px).sum() / (3 * self.usable.sum().clamp_min(1))
        prior = (self.focus_px / self.config.focus_prior_px).square().mean()
        return photometric + self.config.smoothness * smoothness + self.config.charbonnier**2 * prior

    def descend(self) -> float:
        """One step of Adam; returns the loss before it."""
        self.optimizer.zero_grad()
        loss = self.loss()
        self._keep_if_best(float(loss.detach()))
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    @torch.no_grad()
    def try_moves(self) -> None:
        """Let every pixel take the depth of a near surface grown or shrunk over it, if its surroundings then fit."""
        current = self._local_misfit(self.aif, self.depth_px)
        for reach in self.config.moves_px:
            for sign in (1, -1):
                moved = sign * _dilated(sign * self.depth_px, reach)
                offered = (moved - self.depth_px).abs() > MOVED_PX
                depth_dpt = moved * self.dpt_per_px
                fused = fuse(self.frames, self.focus_dpt, self.kappa, depth_dpt, self.start.std_dpt, valid=self.valid)
                image = torch.where(offered, fused, self.aif)
                taken = offered & (self._local_misfit(image, moved) < current)
                self.depth_px.copy_(torch.where(taken, moved, self.depth_px))
                self.aif.copy_(torch.where(taken, image, self.aif))
                current = self._local_misfit(self.aif, self.depth_px)

    def _local_misfit(self, aif: Tensor, depth_px: Tensor) -> Tensor:
        """Misfit around every pixel, all frames together, (H, W)."""
        window = self.config.window_px
        total = self.misfit(aif, depth_px).mean((0, 1))
        return functional.avg_pool2d(total[None], window, 1, window // 2, count_include_pad=False)[0]

    @torch.no_grad()
    def best(self) -> Estimate:
        """The state with the lowest loss so far, its error re-estimated."""
        self._keep_if_best(float(self.loss()))
        inverse_depth = self.kept * self.dpt_per_px
        # the free image follows the noise of the frames; what the frames show at the new depth does not
        aif = self.start.aif
        if not torch.equal(self.kept, self.first):
            aif = fuse(self.frames, self.focus_dpt, self.kappa, inverse_depth, self.start.std_dpt, valid=self.valid)
        # a pixel that had to move far was, and may still be, less sure than its start said
        std = torch.hypot(self.start.std_dpt, (inverse_depth - self.start.inverse_depth_dpt) / 2)
        wider = (std * self.kappa.mean()).square() - (self.start.std_dpt * self.kappa.mean()).square()
        confidence = self.start.confidence / (1 + self.start.confidence * wider)
        return self.start._replace(inverse_depth_dpt=inverse_depth, std_dpt=std, confidence=confidence, aif=aif)

    def _keep_if_best(self, loss: float) -> None:
        if loss < self.lowest:
            self.lowest = loss
            self.kept = self.depth_px.detach().clone()


def _perceived(linear: Tensor) -> Tensor:
    """Square root of light: shot noise has the same size everywhere on this scale."""
    return (linear.clamp_min(0) + BLACK).sqrt()


def _dilated(depth: Tensor, reach_px: int) -> Tensor:
    """Largest value within `reach_px` along rows and columns, (H, W)."""
    return functional.max_pool2d(depth[None], 2 * reach_px + 1, 1, reach_px)[0]
