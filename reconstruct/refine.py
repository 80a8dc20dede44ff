"""One stack's depth and all-in-focus image improved through the renderer: no training, no weights.

Adam on inverse depth and on a free all-in-focus image until the rendered stack matches the captured one
(`notes/forward-model.md` section 2). The image must be free: at the true depth, fused frames carry foreground light
smeared over the background, which a smoothed depth explains better. With a free image, though, many depths explain the
frames equally well, and descent alone makes a good depth worse. So a pixel leaves its start only as readily as the
start was unsure of it. Beginning at half size is cheaper but gains less (mean error -10 % instead of -14 %).

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

GAUSSIAN_GAIN = 0.25  # a Gaussian lens is told from a disc one; it has the disc's second moment
BLACK = 0.01  # linear light added before the square root, which gives dark and bright pixels the same noise
MOVED_PX = 0.3  # change of blur below which a move is not worth offering
LEAST_STD_PX = 0.02  # no start is surer than this
MOVES_AT = (0.16, 0.48)  # share of the steps before each round of moves
STEADY_SHARE = 0.5  # of the steps at full length; then they shrink to 0


@dataclass(frozen=True)
class RefineConfig:
    """How far and how carefully `refine` moves; "px of blur" is the std of blur, a quarter of the CoC.

    Attributes:
        depth_step_px: change of inverse depth per step, in px of blur.
        image_step: change of the all-in-focus image per step.
        charbonnier: differences below this count quadratically, in square roots of linear light.
        smoothness: weight of the edge-aware smoothness of depth in px of blur.
        prior: weight of the distance from the start, in the start's own standard deviations.
        moves_px: by how many pixels near surfaces are tried grown and shrunk.
        window_px: side of the square around a pixel over which a move is judged.
        floor_px: std of the lens's and sensor's own blur.
    """

    depth_step_px: float = 0.09
    image_step: float = 0.006
    charbonnier: float = 0.02
    smoothness: float = 0.006
    prior: float = 0.001
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
    psf: PsfShape | None = None,
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
        model: see `render_stack`; `scatter` takes a third of the time, but beside near objects it prefers a wrong depth
            (tests/benchmarks/bench_forward_model.py).
        psf: see `render_stack`; None takes what fits the frames better at the start.
        progress: called with each step's number and loss.
    """
    if steps == 0:
        return start
    usable = torch.isfinite(frames).all(1)
    if valid is not None:
        usable = usable & valid
    state = _Refinement(frames, usable, focus_dpt, kappa, start, model, psf or "disc", config or RefineConfig())
    if psf is None:
        state.choose_psf()
    move_at = {round(share * steps) for share in MOVES_AT} - {0}
    for step in range(steps):
        if step in move_at:
            state.try_moves()
        loss = state.descend(min(1.0, (1 - step / steps) / (1 - STEADY_SHARE)))
        if progress is not None:
            progress(step, loss)
    return state.best()


class _Refinement:
    """The variables of one refinement and their descent."""

    def __init__(
        self,
        frames: Tensor,
        usable: Tensor,
        focus_dpt: Tensor,
        kappa: Tensor,
        start: Estimate,
        model: Model,
        psf: PsfShape,
        config: RefineConfig,
    ) -> None:
        self.frames, self.usable, self.start = frames, usable, start
        self.config, self.model, self.psf = config, model, psf
        self.focus_dpt, self.kappa = focus_dpt.to(frames), kappa.to(frames)
        self.weight = usable[:, None].to(frames)
        self.target = _perceived(torch.where(usable[:, None], frames, 0.0))
        self.dpt_per_px = 4.0 / float(self.kappa.abs().mean())
        self.std_dpt = torch.nan_to_num(start.std_dpt)
        # where the start does not say how sure it is, nothing holds the pixel
        known = self.std_dpt > 0
        self.std_px = torch.where(known, self.std_dpt / self.dpt_per_px, torch.inf).clamp_min(LEAST_STD_PX)
        self.expected_px = start.inverse_depth_dpt / self.dpt_per_px  # the start, and what moves made of it
        self.depth_px = self.expected_px.clone().requires_grad_()
        self.aif = start.aif.to(frames).clone().requires_grad_()
        self.rates = [(self.depth_px, config.depth_step_px), (self.aif, config.image_step)]
        self.optimizer = self._fresh_optimizer()
        self.lowest, self.kept_px = float("inf"), self.expected_px

    def _fresh_optimizer(self) -> torch.optim.Adam:
        return torch.optim.Adam([{"params": [variable], "lr": rate} for variable, rate in self.rates])

    @torch.no_grad()
    def choose_psf(self) -> None:
        """Believe in the point spread function that renders the frames better at the start."""
        shapes: tuple[PsfShape, ...] = ("disc", "gaussian")
        misfits = {}
        for self.psf in shapes:
            misfits[self.psf] = float(self.misfit(self.aif, self.depth_px).sum())
        self.psf = min(shapes, key=misfits.__getitem__)

    def descend(self, length: float) -> float:
        """One step of Adam of `length` times the configured size; returns the loss before it."""
        for group, (_, rate) in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * length
        self.optimizer.zero_grad()
        loss = self.loss()
        self._keep_if_best(float(loss.detach()))
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def misfit(self, aif: Tensor, depth_px: Tensor) -> Tensor:
        """Charbonnier difference of every rendered value, (S, 3, H, W), 0 where the frames hold no data."""
        rendered = render_stack(
            aif[None],
            (depth_px * self.dpt_per_px)[None, None],
            self.focus_dpt[None],
            self.kappa[None],
            model=self.model,
            psf=self.psf,
            gaussian_gain=GAUSSIAN_GAIN,
            floor_px=self.config.floor_px,
        )[0]
        difference = _perceived(rendered.clamp_min(0)) - self.target
        scale = self.config.charbonnier
        return ((difference.square() + scale * scale).sqrt() - scale) * self.weight

    def loss(self) -> Tensor:
        """What is minimised, a scalar: misfit, smoothness, and the distance from a start that was sure of itself."""
        config = self.config
        guide = _perceived(self.aif.detach().clamp_min(0))
        smoothness = edge_aware_smoothness(self.depth_px[None, None], guide[None])
        photometric = self.misfit(self.aif, self.depth_px).sum() / (3 * self.weight.sum().clamp_min(1))
        distance = ((1 + ((self.depth_px - self.expected_px) / self.std_px).square()).sqrt() - 1).mean()
        return photometric + config.smoothness * smoothness + config.prior * distance

    @torch.no_grad()
    def try_moves(self) -> None:
        """Let every pixel take the depth of a near surface grown or shrunk over it, if its surroundings then fit."""
        current = self._local_misfit(self.aif, self.depth_px)
        for reach in self.config.moves_px:
            for sign in (1, -1):
                moved = sign * _dilated(sign * self.depth_px, reach)
                offered = (moved - self.depth_px).abs() > MOVED_PX
                image = torch.where(offered, self._fused(moved), self.aif)
                taken = offered & (self._local_misfit(image, moved) < current)
                for variable, offer in ((self.depth_px, moved), (self.expected_px, moved), (self.aif, image)):
                    variable.copy_(torch.where(taken, offer, variable))
                current = self._local_misfit(self.aif, self.depth_px)
        self.optimizer = self._fresh_optimizer()  # moved pixels have no use for their momentum

    def _fused(self, depth_px: Tensor) -> Tensor:
        """The all-in-focus image that the frames show at this depth, (3, H, W)."""
        depth_dpt = depth_px * self.dpt_per_px
        return fuse(self.frames, self.focus_dpt, self.kappa, depth_dpt, self.std_dpt, valid=self.usable)

    def _local_misfit(self, aif: Tensor, depth_px: Tensor) -> Tensor:
        """Misfit around every pixel, all frames together, (H, W)."""
        window = self.config.window_px
        total = self.misfit(aif, depth_px).mean((0, 1))
        return functional.avg_pool2d(total[None], window, 1, window // 2, count_include_pad=False)[0]

    @torch.no_grad()
    def best(self) -> Estimate:
        """The state with the lowest loss so far, its error re-estimated."""
        start = self.start
        self._keep_if_best(float(self.loss()))
        inverse_depth = self.kept_px * self.dpt_per_px
        # the free image follows the noise of the frames; what the frames show at the new depth does not
        aif = self._fused(self.kept_px)
        # a pixel that had to move far was, and may still be, less sure than its start said
        std = torch.hypot(start.std_dpt, (inverse_depth - start.inverse_depth_dpt) / 2)
        kappa = self.kappa.mean()
        wider = (std * kappa).square() - (start.std_dpt * kappa).square()
        confidence = start.confidence / (1 + start.confidence * wider)
        return start._replace(inverse_depth_dpt=inverse_depth, std_dpt=std, confidence=confidence, aif=aif)

    def _keep_if_best(self, loss: float) -> None:
        if loss < self.lowest:
            self.lowest, self.kept_px = loss, self.depth_px.detach().clone()


def _perceived(linear: Tensor) -> Tensor:
    """Square root of light: shot noise has the same size everywhere on this scale."""
    return (linear.clamp_min(0) + BLACK).sqrt()


def _dilated(depth: Tensor, reach_px: int) -> Tensor:
    """Largest value within `reach_px` along rows and columns, (H, W)."""
    return functional.max_pool2d(depth[None], 2 * reach_px + 1, 1, reach_px)[0]
