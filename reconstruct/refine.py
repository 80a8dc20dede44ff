"""One stack's depth and all-in-focus image improved through the renderer.

Inverse depth and a free all-in-focus image descend until the rendered stack matches the captured one
(`notes/forward-model.md` section 2). The image must be free: at the true depth, fused frames carry foreground light
smeared over the background, which a smoothed depth explains better. With a free image, though, many depths explain the
frames equally well, and descent alone makes a good depth worse. So a pixel leaves its start only as readily as the
start was unsure of it. The frames are `quietened` first: their noise is nothing to be explained (five noisy scenes:
-24.7 % for -21.2).

Single pixels know little: where a surface as a whole lies too near, the slope at each of its pixels drowns in noise. So
surfaces are shifted whole first, by as much as the misfit pooled along them says once the image is fitted anew.

Between two layers of the renderer a surface is blurred like a mixture of two discs, which leaves fine detail another
contrast than the disc between them. Over layers 2.5 px apart (`LAYER_STEP_PX`) fine texture between two focus settings
seemed nearer the closer one, by up to 0.1 px. So depth descends and surfaces are shifted over layers half as far apart.

Gradients alone cannot carry an edge of a near object across more than a pixel. So on the way the depth map is offered
moves that no gradient finds: near surfaces grown or shrunk by a few pixels. And since a plain background looks too near
beside a near object, whose blurred outline is all the detail there, depth is offered to recede to that of neighbours
of the same colour. Each offer first gets a few steps of its own image; then every pixel takes the offer under which the
frames around it fit best (fusion moves, Lempitsky et al. 2010, without the graph cut).

The last of the rounds, and one more in the end, are judged by small networks that were trained on simulated scenes; the
one in the end says how wrong its choice may be, too (`settle.py`). They know misfits and shapes, not what scenes look
like.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from reconstruct.denoise import root_of
from reconstruct.estimate import Estimate
from reconstruct.fusion import fuse
from reconstruct.lens_fit import HOLD, Explained, corrected_focus, corrected_gain, frame_misfits
from reconstruct.losses import edge_aware_smoothness
from reconstruct.misfit import ImageDescent, Misfit
from reconstruct.plane_sweep import Photometry, quietened
from reconstruct.render import LAYER_STEP_PX, Model
from reconstruct.settle import LEARNED, Choice, Closing, Settled, stay
from reconstruct.smoothing import edge_aware_mean
from reconstruct.spectrum import PsfShape

logger = logging.getLogger(__name__)

MOVED_PX = 0.3  # change of blur below which growing or shrinking is not worth offering
LEAST_STD_PX = 0.02  # no start is surer than this
EDGE_PX, EDGE_ROOT = 0.3, 0.3  # differences of depth, of the root image's channels together, that end a surface
PROBE_PX = 0.25  # change of blur at which the misfit's slope is taken
UNEXPLAINED = 2.0  # times the median misfit: pixels with more say little about depth
LEAST_CURVATURE = 1e-4  # of the misfit per px of blur squared: where nothing tells depth, it stays
MOVES_AT = 0.3  # share of the steps before moves: the image fits by then, and enough are left to settle
STEADY_SHARE = 0.5  # of the steps at full length; then they shrink to 0
NOISE_PX = 0.05  # changes of blur that noise alone brings about in a pixel
MEAN_DECAY, SQUARE_DECAY = 0.9, 0.999  # of Adam
FEW, ENOUGH = 0.5, 0.75  # shares of the frames that hold data: with so few the start stays, with so many it does not


@dataclass(frozen=True)
class RefineConfig:
    """How far and how carefully `refine` moves; "px of blur" is the std of blur, a quarter of the CoC.

    Attributes:
        depth_step_px: change of inverse depth per step, in px of blur.
        smoothness: weight of the edge-aware smoothness of depth in px of blur.
        prior: weight of the distance from the start, in the start's own standard deviations.
        moves_px: by how many pixels near surfaces are tried grown and shrunk.
        recede_px: from how far neighbours are tried to make a pixel recede.
        colour_price_px: px of blur that a pixel may stay nearer than a neighbour whose root image differs by EDGE_ROOT.
        rounds: how often all moves are offered, each time to the depth that the last round made.
        trial_steps: of the image, before a move is judged.
        window_px: side of the square around a pixel over which a move is judged.
        shifts: how often surfaces are shifted after the moves; once they are before the first step.
        reach_px: over how far along a surface a shift is pooled.
        hold: weight of the sum of all shifts in the start's own standard deviations, and of the frames' errors in
            theirs, in usual misfits: where frames are noisy, priors count for more.
        layer_step_px: CoC diameter between the layers over which depth descends; moves are judged by LAYER_STEP_PX.
        focus_std_px: expected error of a frame's reported focus.
        gain_std: expected relative error of a frame's blur gain.
    """

    depth_step_px: float = 0.09
    smoothness: float = 0.006
    prior: float = 0.0003
    moves_px: tuple[int, ...] = (1, 2, 3)
    recede_px: tuple[int, ...] = (4, 12)
    colour_price_px: float = 20.0
    rounds: int = 3
    trial_steps: int = 3
    window_px: int = 5
    shifts: int = 6
    reach_px: float = 3.0
    hold: float = HOLD
    layer_step_px: float = LAYER_STEP_PX / 2
    focus_std_px: float = 0.2
    gain_std: float = 0.01


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
    context: Photometry | None = None,
    progress: Callable[[int, float], None] | None = None,
    choices: Sequence[Choice] = LEARNED,
) -> Estimate:
    """`start` after `steps` of descent: what the best state makes of its depth, and the image fused from the frames.

    Args:
        frames: linear focal stack, (S, 3, H, W); pixels that are not finite do not count.
        focus_dpt: focus of each frame, (S,) in 1/m.
        kappa: blur gain of each frame, (S,), pixels of CoC diameter per dioptre.
        start: where to begin.
        valid: pixels that hold data, (S, H, W); where only half of the frames or fewer do, the start stays.
        model: see `render_stack`; `scatter` takes a third of the time, but beside near objects it prefers a wrong depth
            (tests/benchmarks/bench_forward_model.py).
        psf: see `render_stack`; None takes what fits the frames better at the start.
        context: of the whole picture, where `frames` are a tile of it.
        progress: called with each step's number and loss.
        choices: the last chooses the depth in the end and says how sure it is; each before it, a round of moves.
    """
    if steps == 0:
        return start
    config = config or RefineConfig()
    quiet, _ = quietened(frames, valid, context)
    misfit = Misfit(quiet, focus_dpt, kappa, valid=valid, model=model, psf=psf or "disc")
    misfit = misfit.layered(config.layer_step_px)
    if psf is None:
        misfit.choose_psf(start)
    state = _Refinement(misfit, start, config)
    *midway, conclude = choices
    for step in range(steps):
        if step == 0:
            state.shift_surfaces()
        elif step == round(MOVES_AT * steps):
            for _ in range(state.config.rounds - len(midway)):
                state.try_moves()
            for choice in midway:
                state.choose(choice)
            state.fit_lens()
            for _ in range(state.config.shifts):
                state.shift_surfaces()
            state.fit_lens()
        loss = state.descend(min(1.0, (1 - step / steps) / (1 - STEADY_SHARE)))
        if progress is not None:
            progress(step, loss)
    logger.info(
        "frames seem focused at %s dpt from where they say, their blur to be off by %s %%",
        [round(float(x), 4) for x in misfit.focus_dpt - focus_dpt.to(misfit.focus_dpt)],
        [round(100 * float(x), 2) for x in misfit.kappa / kappa.to(misfit.kappa) - 1],
    )
    found = state.best(conclude)
    # the free image follows what is left of the noise; what the frames show at the new depth does not
    aif = fuse(frames, misfit.focus_dpt, misfit.kappa, found.inverse_depth_dpt, start.std_dpt, valid=valid)
    return found._replace(aif=aif)


class Adam:
    """Steps of one tensor (Kingma and Ba 2015); PyTorch's own first takes a second to import its compiler."""

    def __init__(self, values: Tensor) -> None:
        self.values, self.steps = values, 0
        self.mean, self.square = torch.zeros_like(values), torch.zeros_like(values)

    @torch.no_grad()
    def step(self, gradient: Tensor, length: float) -> None:
        """Go down `gradient`, where it keeps its sign by `length`."""
        self.steps += 1
        self.mean.lerp_(gradient, 1 - MEAN_DECAY)
        self.square.lerp_(gradient.square(), 1 - SQUARE_DECAY)
        size = (self.square / (1 - SQUARE_DECAY**self.steps)).sqrt() + 1e-8
        self.values.sub_(length / (1 - MEAN_DECAY**self.steps) * self.mean / size)


class _Refinement:
    """The variables of one refinement and their descent."""

    def __init__(self, misfit: Misfit, start: Estimate, config: RefineConfig) -> None:
        self.misfit, self.start, self.config = misfit, start, config
        self.told_focus_dpt, self.told_kappa = misfit.focus_dpt, misfit.kappa
        self.dpt_per_px = 4.0 / float(misfit.kappa.abs().mean())
        self.std_dpt = torch.nan_to_num(start.std_dpt)
        # where the start does not say how sure it is, nothing holds the pixel
        known = self.std_dpt > 0
        self.std_px = torch.where(known, self.std_dpt / self.dpt_per_px, torch.inf).clamp_min(LEAST_STD_PX)
        self.start_px = start.inverse_depth_dpt / self.dpt_per_px
        self.expected_px = self.start_px  # and what moves and shifts made of it
        self.depth_px = self.expected_px.clone().requires_grad_()
        root = root_of(start.aif.to(misfit.frames))
        step = (root.diff(dim=axis).abs().sum(0) / EDGE_ROOT for axis in (1, 2))
        self.price_px = [config.colour_price_px * x.square() for x in step]
        self.root = root.requires_grad_()
        self.shift_px = torch.zeros_like(self.expected_px)  # sum of all shifts
        self._restart()

    def _restart(self) -> None:
        self.adam = Adam(self.depth_px)
        self.image = ImageDescent(self.root, self.misfit)
        self.lowest, self.kept_px = float("inf"), self.depth_px.detach().clone()

    def descend(self, length: float) -> float:
        """One step, of depth by `length` times the configured size; returns the loss before it."""
        loss = self.loss()
        self._keep_if_best(float(loss.detach()))
        by_depth, by_root = torch.autograd.grad(loss, (self.depth_px, self.root))
        self.adam.step(by_depth, self.config.depth_step_px * length)
        self.image.step(by_root, float(loss.detach()))
        return float(loss.detach())

    def loss(self) -> Tensor:
        """What is minimised, a scalar: misfit, smoothness, and the distance from a start that was sure of itself."""
        config = self.config
        smoothness = edge_aware_smoothness(self.depth_px[None, None], self.root.detach()[None])
        photometric = self.misfit(self.root, self.depth_px * self.dpt_per_px).sum() / self.misfit.values
        distance = ((1 + ((self.depth_px - self.expected_px) / self.std_px).square()).sqrt() - 1).mean()
        return photometric + config.smoothness * smoothness + config.prior * distance

    def shift_surfaces(self) -> None:
        """Move surfaces nearer or farther: a Gauss-Newton step of the misfit that is left with the image fitted anew.

        The misfit is compared at this depth and a little nearer and farther, everywhere at once. Its slope and
        curvature are pooled along surfaces, and so is the sum of all shifts, for single pixels follow the noise.
        """
        _, nearer = self._shifted(PROBE_PX)
        _, farther = self._shifted(-PROBE_PX)
        root, here = self._shifted(0.0)
        # what no depth explains, beside edges above all, does not tell how to change it
        weight = 1 / (1 + (here / (UNEXPLAINED * here.median()).clamp_min(1e-9)).square())
        slope = weight * (nearer - farther) / (2 * PROBE_PX)
        curvature = weight * (nearer + farther - 2 * here) / PROBE_PX**2
        wanted, stiffness = edge_aware_mean(
            torch.stack([curvature * self.shift_px - slope, curvature]),
            self._links(self.depth_px.detach(), 0),
            self._links(self.depth_px.detach(), 1),
            self.config.reach_px**2,
        )
        held = self.config.hold * here.median() / self.std_px.square() + LEAST_CURVATURE
        change = wanted / (stiffness.clamp_min(0) + held) - self.shift_px
        change = change.clamp(-2 * PROBE_PX, 2 * PROBE_PX)
        with torch.no_grad():
            self.root.copy_(root)
            self.depth_px += change
        self.shift_px += change
        self.expected_px = self.expected_px + change
        self._restart()

    def _shifted(self, by_px: float) -> tuple[Tensor, Tensor]:
        """The image a step closer to what suits the depth so much nearer, and the misfit of every pixel, (H, W)."""
        depth_dpt = (self.depth_px.detach() + by_px) * self.dpt_per_px
        root, left = self.misfit.fitted(self.root, depth_dpt, 1)
        return root, left.mean((0, 1))

    def fit_lens(self) -> None:
        """Correct every frame's focus and blur gain by what the frames say at this depth."""
        misfit, config = self.misfit, self.config
        explained = [Explained(misfit, self.root.detach(), self.depth_px.detach() * self.dpt_per_px)]
        here = frame_misfits(explained, misfit.focus_dpt, misfit.kappa)
        focus_dpt = corrected_focus(explained, here, self.told_focus_dpt, config.focus_std_px, config.hold)
        misfit.kappa = corrected_gain(explained, here, self.told_kappa, config.gain_std, config.hold)
        misfit.focus_dpt = focus_dpt
        self._restart()

    def _links(self, depth_px: Tensor, along: int) -> Tensor:
        """How surely neighbours along an axis are of one surface, 0 to 1."""
        by_depth = (depth_px.diff(dim=along) / EDGE_PX).square()
        by_image = self.root.detach().diff(dim=along + 1).abs().sum(0) / EDGE_ROOT
        return torch.exp(-by_depth - by_image)

    def try_moves(self) -> None:
        """Let every pixel take the depth of an offer under which its surroundings fit better."""
        depth = self.depth_px.detach()
        chosen = depth
        root, least = self._tried(self.root, depth)
        for moved in self._offers(depth):
            if torch.equal(moved, depth):
                continue
            image, left = self._tried_offer(moved, depth)
            taken = (moved != depth) & (left < least)
            chosen, root, least = (
                torch.where(taken, new, old) for new, old in ((moved, chosen), (image, root), (left, least))
            )
        with torch.no_grad():
            self.expected_px = torch.where(chosen == depth, self.expected_px, chosen)
            self.depth_px.copy_(chosen)
            self.root.copy_(root)
        self._restart()  # moved pixels have no use for their momentum

    def _offers(self, depth_px: Tensor) -> Iterator[Tensor]:
        """Depths to try, (H, W), the same as `depth_px` where they have nothing to offer."""
        for reach in self.config.moves_px:
            for sign in (1, -1):
                moved = sign * _dilated(sign * depth_px, reach)
                yield torch.where((moved - depth_px).abs() > MOVED_PX, moved, depth_px)
        for reach in self.config.recede_px:
            yield self._receded(depth_px, reach)

    def _receded(self, depth_px: Tensor, reach_px: int) -> Tensor:
        """`depth_px` made no nearer than neighbours within `reach_px`, but for differences in colour on the way there
        and the start's std."""
        farther = depth_px
        for _ in range(reach_px):
            farther = _no_nearer(farther, self.price_px[0])
            farther = _no_nearer(farther.T, self.price_px[1].T).T
        return torch.maximum(farther, depth_px - self.std_px)

    def _tried_offer(self, moved_px: Tensor, depth_px: Tensor, window_px: int | None = None) -> tuple[Tensor, Tensor]:
        """`_tried`, with the image fused anew where there is an offer."""
        fused = self.misfit.fused(moved_px * self.dpt_per_px, self.std_dpt)
        return self._tried(torch.where(moved_px != depth_px, root_of(fused), self.root), moved_px, window_px)

    def _tried(self, root: Tensor, depth_px: Tensor, window_px: int | None = None) -> tuple[Tensor, Tensor]:
        """`root` fitted to this depth for a few steps, and the misfit that is left around every pixel, (H, W)."""
        depth_dpt, window = depth_px * self.dpt_per_px, window_px or self.config.window_px
        misfit = self.misfit.layered(LAYER_STEP_PX)
        if misfit.model == "occlusion":  # without light for what near edges hide, truth would not win beside them
            root = misfit.with_hidden(root.detach(), depth_dpt)
        root, left = misfit.fitted(root, depth_dpt, self.config.trial_steps)
        left = left.mean((0, 1))
        return root[:3], functional.avg_pool2d(left[None], window, 1, window // 2, count_include_pad=False)[0]

    def choose(self, choice: Choice) -> None:
        """Let `choice` choose the depth among this one and all offers."""
        here = self.depth_px.detach().clone()
        depth = choice(self._closing(here)).depth_px
        moved = (depth - here).abs() >= NOISE_PX  # only so much replaces what is expected; less carries it along
        with torch.no_grad():
            self.expected_px = torch.where(moved, depth, self.expected_px + depth - here)
            self.depth_px.copy_(depth)
        self._restart()

    def best(self, conclude: Choice) -> Estimate:
        """What is made of the state with the lowest loss since the last moves."""
        self._keep_if_best(float(self.loss().detach()))
        depth_px, std_px = self._kept_back(conclude(self._closing(self.kept_px, offering=conclude is not stay)))
        confidence = torch.nan_to_num(1 / (1 + 4 * std_px))  # per px of CoC, as in prediction
        inverse_depth, std = depth_px * self.dpt_per_px, std_px * self.dpt_per_px
        return self.start._replace(inverse_depth_dpt=inverse_depth, std_dpt=std, confidence=confidence)

    def _kept_back(self, found: Settled) -> Settled:
        """`found`, or the start where few frames hold data, as at borders: what explains few may be anything."""
        enough = ((self.misfit.usable.float().mean(0) - FEW) / (ENOUGH - FEW)).clamp(0, 1)
        depth_px = torch.lerp(self.start_px, found.depth_px, enough)
        unsure_px = torch.where(self.std_px.isinf(), torch.nan, torch.maximum(self.std_px, found.std_px))
        return Settled(depth_px, torch.where(enough < 1, unsure_px, found.std_px))

    def _closing(self, depth: Tensor, *, offering: bool = True) -> Closing:
        """What is known of a depth; of what moves would make of it only when `offering`, for that takes long."""
        with torch.no_grad():
            self.depth_px.copy_(depth)
        _, here = self._shifted(0.0)
        shifted = torch.stack([self._shifted(by_px)[1] for by_px in (PROBE_PX, -PROBE_PX, 1.0, -1.0)])
        root, least = self._tried(self.root, depth, 1)
        offers, left = [], [least]
        for moved in self._offers(depth) if offering else ():
            offers.append(moved)
            left.append(self._tried_offer(moved, depth, 1)[1])
        offered = torch.stack([depth, *offers])[1:]
        maps = depth, *self._settled(depth), here, shifted, offered, torch.stack(left), root
        return Closing(self.start_px, self.std_px, *maps)

    def _settled(self, depth_px: Tensor) -> tuple[Tensor, Tensor]:
        """`depth_px` pooled along surfaces: less the changes that noise alone makes of the start, and as it is."""
        down, right = (self._links(depth_px, along) for along in (0, 1))
        pooled = edge_aware_mean(depth_px[None], down, right, self.config.reach_px**2)[0]
        change = pooled - self.start_px
        return self.start_px + change * change.square() / (change.square() + NOISE_PX**2), pooled

    def _keep_if_best(self, loss: float) -> None:
        if loss < self.lowest:
            self.lowest, self.kept_px = loss, self.depth_px.detach().clone()


def _no_nearer(depth: Tensor, price: Tensor) -> Tensor:
    """`depth` (H, W), nowhere larger than a neighbour's in the column plus the `price` (H - 1, W) between them."""
    farther = depth.clone()
    farther[1:] = torch.minimum(depth[1:], depth[:-1] + price)
    farther[:-1] = torch.minimum(farther[:-1], depth[1:] + price)
    return farther


def _dilated(depth: Tensor, reach_px: int) -> Tensor:
    """Largest value within `reach_px` along rows and columns, (H, W)."""
    return functional.max_pool2d(depth[None], 2 * reach_px + 1, 1, reach_px)[0]
