"""How badly an all-in-focus image, a depth and a lens explain a captured stack, and the image that explains it best.

The image's own problem is nearly quadratic in the square root of light, so it takes Nesterov steps of the longest
stable length there: four of them fit as well as fourteen of Adam's (Motorcycle, depth fixed).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from capture.optics import BLACK
from reconstruct.denoise import root_of
from reconstruct.estimate import Estimate
from reconstruct.fusion import fuse
from reconstruct.render import (
    LAYER_STEP_PX,
    FixedDepth,
    Hidden,
    Model,
    continued_behind,
    hidden_inverse_depth,
    render_stack,
)
from reconstruct.spectrum import Psf, PsfShape

GAUSSIAN_GAIN = 0.25  # a Gaussian lens is told from a disc one; it has the disc's second moment
CHARBONNIER = 0.02  # differences below this count quadratically, in square roots of linear light
FLOOR_PX = 0.3  # std of the lens's and sensor's own blur
MOMENTUM = 0.8  # of the image
HIDDEN_RATE = 4.0  # of what near edges hide, which few frames show: it bends the misfit less


class Misfit:
    """A captured stack, and how badly it is rendered from an all-in-focus image and a depth.

    Images come as `root_of` them: there shot noise has the same size everywhere, and fitting is well-conditioned. An
    image is (3, H, W), or (6, H, W) with the background that near edges hide (`with_hidden`).
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
        self.model, self.psf, self.layer_step_px = model, psf, LAYER_STEP_PX
        self.weight = self.usable[:, None].to(frames)
        self.target = root_of(torch.where(self.usable[:, None], frames, 0.0))
        self.values = 3 * self.weight.sum().clamp_min(1)

    def through(self, focus_dpt: Tensor, kappa: Tensor) -> Misfit:
        """That of the same frames, were they taken so."""
        other = copy.copy(self)
        other.focus_dpt, other.kappa = focus_dpt, kappa
        return other

    def layered(self, step_px: float) -> Misfit:
        """The same, rendered from layers so far apart, px of CoC diameter."""
        other = copy.copy(self)
        other.layer_step_px = step_px
        return other

    def rendered(self, root: Tensor, inverse_depth_dpt: Tensor) -> Tensor:
        """The stack as this image and depth would give it, (S, 3, H, W), linear."""
        aif, *behind = (root.square() - BLACK)[None].split(3, 1)
        depth, kappa = inverse_depth_dpt[None, None], self.kappa[None]
        return render_stack(
            aif,
            depth,
            self.focus_dpt[None],
            kappa,
            hidden=Hidden(behind[0], hidden_inverse_depth(depth, kappa)) if behind else None,
            model=self.model,
            psf=self.psf,
            gaussian_gain=GAUSSIAN_GAIN,
            floor_px=FLOOR_PX,
            layer_step_px=self.layer_step_px,
        )[0]

    def at(self, inverse_depth_dpt: Tensor, *, hidden: bool) -> Callable[[Tensor], Tensor]:
        """What calling this with images and always this depth gives, in less time; do they hold what is `hidden`?"""
        if self.model != "occlusion":
            return partial(self, inverse_depth_dpt=inverse_depth_dpt)
        behind = hidden_inverse_depth(inverse_depth_dpt[None, None], self.kappa[None])[0, 0] if hidden else None
        psf = Psf(self.psf, GAUSSIAN_GAIN, FLOOR_PX)
        render = FixedDepth(inverse_depth_dpt, self.focus_dpt, self.kappa, psf, behind, self.layer_step_px)
        return lambda root: self._compared(render(*(root.square() - BLACK).split(3)))

    def with_hidden(self, root: Tensor, inverse_depth_dpt: Tensor) -> Tensor:
        """`root` (3, H, W) and a first guess of what near edges hide, (6, H, W); `fitted` improves both."""
        hidden_dpt = hidden_inverse_depth(inverse_depth_dpt[None, None], self.kappa[None])[0, 0]
        return torch.cat([root, continued_behind(root, inverse_depth_dpt, hidden_dpt, self.kappa)])

    def __call__(self, root: Tensor, inverse_depth_dpt: Tensor) -> Tensor:
        """Charbonnier difference of every rendered value, (S, 3, H, W), 0 where the frames hold no data."""
        return self._compared(self.rendered(root, inverse_depth_dpt))

    def _compared(self, rendered: Tensor) -> Tensor:
        difference = root_of(rendered) - self.target
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

    def fitted(self, root: Tensor, inverse_depth_dpt: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """`root` after `steps` towards the image that suits this depth best, and what calling this then gives."""
        root = root.detach().clone().requires_grad_()
        misfit = self.at(inverse_depth_dpt, hidden=len(root) > 3)
        descent = ImageDescent(root, self)
        for _ in range(steps):
            loss = misfit(root).sum() / self.values
            (gradient,) = torch.autograd.grad(loss, root)
            descent.step(gradient, float(loss.detach()))
        with torch.no_grad():
            return root.detach(), misfit(root)


class ImageDescent:
    """Nesterov steps of a root image; shortened when one made the loss rise."""

    def __init__(self, root: Tensor, misfit: Misfit) -> None:
        self.root, self.velocity, self.last = root, torch.zeros_like(root), float("inf")
        # each of S frames bends the sum of differences by up to 1 / CHARBONNIER
        self.rate = CHARBONNIER / len(misfit.frames) * float(misfit.values) * torch.ones_like(root[:, :1, :1])
        self.rate[3:] *= HIDDEN_RATE

    @torch.no_grad()
    def step(self, gradient: Tensor, loss: float) -> None:
        """Go down `gradient`, found where the mean difference was `loss`."""
        if loss > self.last:
            self.velocity.zero_()
            self.rate /= 2
        self.last = loss
        self.velocity.mul_(MOMENTUM).add_(gradient)
        self.root.sub_(self.rate * (gradient + MOMENTUM * self.velocity))
