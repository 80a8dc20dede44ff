"""One stack's depth and all-in-focus image improved through the renderer: no training, no weights.

Inverse depth and a free all-in-focus image descend until the rendered stack matches the captured one
(`notes/forward-model.md` section 2). The image must be free: at the true depth, fused frames carry foreground light
smeared over the background, which a smoothed depth explains better. With a free image, though, many depths explain the
frames equally well, and descent alone makes a good depth worse. So a pixel leaves its start only as readily as the
start was unsure of it.

The image's own problem is nearly quadratic in the square root of light, so it takes Nesterov steps of the longest
stable length there: four of them fit as well as fourteen of Adam's (Motorcycle, depth fixed).

Gradients alone cannot carry an edge of a near object across more than a pixel. So on the way the depth map is offered
moves that no gradient finds: near surfaces grown or shrunk by a few pixels. Each offer first gets a few steps of its
own image; then every pixel takes the offer under which the frames around it fit best (fusion moves, Lempitsky et al.
2010, without the graph cut).
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
CHARBONNIER = 0.02  # differences below this count quadratically, in square roots of linear light
FLOOR_PX = 0.3  # std of the lens's and sensor's own blur
MOMENTUM = 0.8  # of the image
MOVED_PX = 0.3  # change of blur below which a move is not worth offering
LEAST_STD_PX = 0.02  # no start is surer than this
MOVES_AT = 0.4  # share of the steps before moves: the image fits by then, and enough are left to settle
STEADY_SHARE = 0.5  # of the steps at full length; then they shrink to 0


@dataclass(frozen=True)
class RefineConfig:
    """How far and how carefully `refine` moves; "px of blur" is the std of blur, a quarter of the CoC.

    Attributes:
        depth_step_px: change of inverse depth per step, in px of blur.
        smoothness: weight of the edge-aware smoothness of depth in px of blur.
        prior: weight of the distance from the start, in the start's own standard deviations.
        moves_px: by how many pixels near surfaces are tried grown and shrunk.
        trial_steps: of the image, before a move is judged.
        window_px: side of the square around a pixel over which a move is judged.
    """

    depth_step_px: float = 0.09
    smoothness: float = 0.006
    prior: float = 0.001
    moves_px: tuple[int, ...] = (1, 2, 3)
    trial_steps: int = 2
    window_px: int = 5


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
    misfit = Misfit(frames, focus_dpt, kappa, valid=valid, model=model, psf=psf or "disc")
    if psf is None:
        misfit.choose_psf(start)
    state = _Refinement(misfit, start, config or RefineConfig())
    for step in range(steps):
        if step == round(MOVES_AT * steps) > 0:
            state.try_moves()
        loss = state.descend(min(1.0, (1 - step / steps) / (1 - STEADY_SHARE)))
        if progress is not None:
            progress(step, loss)
    return state.best()


class Misfit:
    """A captured stack, and how badly it is rendered from an all-in-focus image and a depth.

    Images come as `root_of` them: there shot noise has the same size everywhere, and fitting is well-conditioned.
    """

    def __init__(
        self,
        frames: Tensor,
        focus_dpt: Tensor,
        kappa: Tensor,
        *,
        valid: Tensor | None = None,
        model: Model = "occlusion",
        psf: PsfShape = "disc",
    ) -> None:
        finite = torch.isfinite(frames).all(1)
        self.frames, self.usable = frames, finite if valid is None else finite & valid
        self.focus_dpt, self.kappa = focus_dpt.to(frames), kappa.to(frames)
        self.model, self.psf = model, psf
        self.weight = self.usable[:, None].to(frames)
        self.target = root_of(torch.where(self.usable[:, None], frames, 0.0))
        self.values = 3 * self.weight.sum().clamp_min(1)

    def rendered(self, root: Tensor, inverse_depth_dpt: Tensor) -> Tensor:
        """The stack as this image and depth would give it, (S, 3, H, W), linear."""
        return render_stack(
            (root.square() - BLACK)[None],
            inverse_depth_dpt[None, None],
            self.focus_dpt[None],
            self.kappa[None],
            model=self.model,
            psf=self.psf,
            gaussian_gain=GAUSSIAN_GAIN,
            floor_px=FLOOR_PX,
        )[0]

    def __call__(self, root: Tensor, inverse_depth_dpt: Tensor) -> Tensor:
        """Charbonnier difference of every rendered value, (S, 3, H, W), 0 where the frames hold no data."""
        difference = root_of(self.rendered(root, inverse_depth_dpt)) - self.target
        return ((difference.square() + CHARBONNIER**2).sqrt() - CHARBONNIER) * self.weight

    @torch.no_grad()
    def choose_psf(self, at: Estimate) -> None:
        """Believe in the point spread function that renders the frames better from this estimate."""
        shapes: tuple[PsfShape, ...] = ("disc", "gaussian")
        root = root_of(at.aif.to(self.frames))
        misfits = {}
        for self.psf in shapes:
            misfits[self.psf] = float(self(root, at.inverse_depth_dpt).sum())
        self.psf = min(shapes, key=misfits.__getitem__)

    def fused(self, inverse_depth_dpt: Tensor, std_dpt: Tensor) -> Tensor:
        """The all-in-focus image that the frames show at this depth, (3, H, W), linear."""
        return fuse(self.frames, self.focus_dpt, self.kappa, inverse_depth_dpt, std_dpt, valid=self.usable)

    def fitted(self, root: Tensor, inverse_depth_dpt: Tensor, steps: int) -> Tensor:
        """`root` after `steps` towards the image that suits this depth best, (3, H, W)."""
        root = root.detach().clone().requires_grad_()
        descent = ImageDescent(root, self)
        for _ in range(steps):
            loss = self(root, inverse_depth_dpt).sum() / self.values
            (gradient,) = torch.autograd.grad(loss, root)
            descent.step(gradient, float(loss.detach()))
        return root.detach()


class ImageDescent:
    """Nesterov steps of a root image; shortened when one made the loss rise."""

    def __init__(self, root: Tensor, misfit: Misfit) -> None:
        self.root, self.velocity, self.last = root, torch.zeros_like(root), float("inf")
        # each of S frames bends the sum of differences by up to 1 / CHARBONNIER
        self.rate = CHARBONNIER / len(misfit.frames) * float(misfit.values)

    @torch.no_grad()
    def step(self, gradient: Tensor, loss: float) -> None:
        """Go down `gradient`, found where the mean difference was `loss`."""
        if loss > self.last:
            self.velocity.zero_()
            self.rate /= 2
        self.last = loss
        self.velocity.mul_(MOMENTUM).add_(gradient)
        self.root.sub_(self.rate * (gradient + MOMENTUM * self.velocity))


class _Refinement:
    """The variables of one refinement and their descent."""

    def __init__(self, misfit: Misfit, start: Estimate, config: RefineConfig) -> None:
        self.misfit, self.start, self.config = misfit, start, config
        self.dpt_per_px = 4.0 / float(misfit.kappa.abs().mean())
        self.std_dpt = torch.nan_to_num(start.std_dpt)
        # where the start does not say how sure it is, nothing holds the pixel
        known = self.std_dpt > 0
        self.std_px = torch.where(known, self.std_dpt / self.dpt_per_px, torch.inf).clamp_min(LEAST_STD_PX)
        self.expected_px = start.inverse_depth_dpt / self.dpt_per_px  # the start, and what moves made of it
        self.depth_px = self.expected_px.clone().requires_grad_()
        self.root = root_of(start.aif.to(misfit.frames)).requires_grad_()
        self._restart()

    def _restart(self) -> None:
        self.adam = torch.optim.Adam([self.depth_px])
        self.image = ImageDescent(self.root, self.misfit)
        self.lowest, self.kept_px = float("inf"), self.depth_px.detach().clone()

    def descend(self, length: float) -> float:
        """One step, of depth by `length` times the configured size; returns the loss before it."""
        loss = self.loss()
        self._keep_if_best(float(loss.detach()))
        by_depth, by_root = torch.autograd.grad(loss, (self.depth_px, self.root))
        self.depth_px.grad = by_depth
        self.adam.param_groups[0]["lr"] = self.config.depth_step_px * length
        self.adam.step()
        self.image.step(by_root, float(loss.detach()))
        return float(loss.detach())

    def loss(self) -> Tensor:
        """What is minimised, a scalar: misfit, smoothness, and the distance from a start that was sure of itself."""
        config = self.config
        smoothness = edge_aware_smoothness(self.depth_px[None, None], self.root.detach()[None])
        photometric = self.misfit(self.root, self.depth_px * self.dpt_per_px).sum() / self.misfit.values
        distance = ((1 + ((self.depth_px - self.expected_px) / self.std_px).square()).sqrt() - 1).mean()
        return photometric + config.smoothness * smoothness + config.prior * distance

    def try_moves(self) -> None:
        """Let every pixel take the depth of a near surface grown or shrunk over it, if its surroundings then fit."""
        depth = self.depth_px.detach()
        chosen = depth
        root, least = self._tried(self.root, depth)
        for reach in self.config.moves_px:
            for sign in (1, -1):
                moved = sign * _dilated(sign * depth, reach)
                offered = (moved - depth).abs() > MOVED_PX
                if not offered.any():
                    continue
                moved = torch.where(offered, moved, depth)
                fused = self.misfit.fused(moved * self.dpt_per_px, self.std_dpt)
                image, left = self._tried(torch.where(offered, root_of(fused), self.root), moved)
                taken = offered & (left < least)
                chosen, root, least = (
                    torch.where(taken, new, old) for new, old in ((moved, chosen), (image, root), (left, least))
                )
        with torch.no_grad():
            self.expected_px = torch.where(chosen == depth, self.expected_px, chosen)
            self.depth_px.copy_(chosen)
            self.root.copy_(root)
        self._restart()  # moved pixels have no use for their momentum

    def _tried(self, root: Tensor, depth_px: Tensor) -> tuple[Tensor, Tensor]:
        """`root` fitted to this depth for a few steps, and the misfit that is left around every pixel, (H, W)."""
        depth_dpt, window = depth_px * self.dpt_per_px, self.config.window_px
        root = self.misfit.fitted(root, depth_dpt, self.config.trial_steps)
        with torch.no_grad():
            left = self.misfit(root, depth_dpt).mean((0, 1))
        return root, functional.avg_pool2d(left[None], window, 1, window // 2, count_include_pad=False)[0]

    @torch.no_grad()
    def best(self) -> Estimate:
        """The state with the lowest loss since the last moves, its error re-estimated."""
        start = self.start
        self._keep_if_best(float(self.loss()))
        inverse_depth = self.kept_px * self.dpt_per_px
        # the free image follows the noise of the frames; what the frames show at the new depth does not
        aif = self.misfit.fused(inverse_depth, self.std_dpt)
        # a pixel that had to move far was, and may still be, less sure than its start said
        std = torch.hypot(start.std_dpt, (inverse_depth - start.inverse_depth_dpt) / 2)
        kappa = self.misfit.kappa.mean()
        wider = (std * kappa).square() - (start.std_dpt * kappa).square()
        confidence = start.confidence / (1 + start.confidence * wider)
        return start._replace(inverse_depth_dpt=inverse_depth, std_dpt=std, confidence=confidence, aif=aif)

    def _keep_if_best(self, loss: float) -> None:
        if loss < self.lowest:
            self.lowest, self.kept_px = loss, self.depth_px.detach().clone()


def root_of(linear: Tensor) -> Tensor:
    """Square root of light: shot noise has the same size everywhere on this scale."""
    return (linear.clamp_min(0) + BLACK).sqrt()


def _dilated(depth: Tensor, reach_px: int) -> Tensor:
    """Largest value within `reach_px` along rows and columns, (H, W)."""
    return functional.max_pool2d(depth[None], 2 * reach_px + 1, 1, reach_px)[0]
