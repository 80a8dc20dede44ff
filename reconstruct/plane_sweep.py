"""Depth, confidence and all-in-focus image of a focal stack without any training: a sweep over inverse depth.

    cost_volume(frames (B, S, 3, H, W), focus_dpt (B, S), kappa (B, S), hypotheses_dpt (N,) or (B, N),
                *, valid=None (B, S, H, W), psf="disc", window_px=5, context) -> (B, N, H, W) float32
    hypotheses(focus_dpt (S,), kappa (S,), count, beyond_px=2.0) -> (count,) dioptres, uniform, ascending
    plane_sweep(frames (S, 3, H, W), focus_dpt (S,), kappa (S,), *, valid=None (S, H, W), config, context, evidence)
        -> Estimate

If a pixel lies at inverse depth q, the blur of every frame there is known: CoC_k = kappa_k (q_k - q). The frame that
would be sharpest is then blurred to what each other frame should look like; no deconvolution is needed, because
blurring a disc of diameter a by sqrt(b^2 - a^2) gives the second moment of a disc of diameter b. The hypothesis
with the smallest difference wins. Only fine detail is compared: beside a depth edge the frames also hold the smooth
skirt of the other surface's blur, which would otherwise drag the edge outwards. notes/performance.md 3 and
notes/method.md 9b.5 compare this with other methods.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from capture.optics import BLACK
from reconstruct.denoise import denoised
from reconstruct.estimate import Estimate
from reconstruct.fusion import channel_noise_variance, filled_frames, fuse, noise_variance, usable_mask
from reconstruct.smoothing import box_mean, edge_aware_mean, mirrored
from reconstruct.spectrum import PsfShape

LEVEL_RATIO = 1.4  # neighbouring blur levels; a mix of two has the exact second moment in between
FINEST_LEVEL_PX = 1.0
RING_PX = 12  # reach of a sharp-edged disc beyond its edge, when sampled at whole pixels
SHEET_STRENGTH = 30.0  # of the smoothing that carries depth into places without texture; reach of a few px a sweep
SHEET_EDGE = 60.0  # how fast an image edge cuts it; per unit of the square root of linear light
SHEET_STEP = 0.5  # how fast a depth step cuts it; per pixel of CoC
SHEET_MOST_PX = 3.0  # larger depth steps cut no more: without texture they are wild guesses, not edges
DETAIL_SIGMA_PX = 2.0  # what a Gaussian of this width leaves is compared
GREY = 0.25  # mean brightness that pictures are brought to before their edges are judged
DARKEST = 1e-4  # mean brightness that black pictures are taken to have
COARSE_NOISE_SHARE = 0.4  # costs 15 noisy scenes 0.1 %; blank walls in JPEGs lose most of their hatch
LEAST_SEEN = 1e-3  # pairs of frames per pixel of a window; less is rounding
DETAIL_NOISE_SHARE = 1 - 3 / (4 * math.pi * DETAIL_SIGMA_PX**2)  # of white noise's variance in that
MOST_DRIFT = 0.2  # of exposure between frames
MOST_HYPOTHESES = 256  # `lowest` counts them in bytes
CPU_STRIP, GPU_STRIP = 1 << 24, 1 << 27  # values smoothed at once


@dataclass(frozen=True)
class SweepConfig:
    """How the plane sweep searches.

    Attributes:
        hypotheses: number of inverse depths tested, 3 to 256; a parabola finds the minimum between them.
        beyond_px: how far past the nearest and farthest focus they reach, pixels of CoC.
        psf: shape of the blur.
        window_px: side of the square over which differences are averaged; odd.
        small_step: price of a change by one hypothesis between neighbouring pixels, in units of the cost.
        jump: price of any larger change, where the image shows no edge.
        edge: how fast an image edge makes jumps cheaper; per unit of the square root of linear light.
    """

    hypotheses: int = 32
    beyond_px: float = 2.0
    psf: PsfShape = "disc"
    window_px: int = 5
    small_step: float = 0.2
    jump: float = 3.0
    edge: float = 8.0

    def __post_init__(self) -> None:
        if not 3 <= self.hypotheses <= MOST_HYPOTHESES:
            raise ValueError(f"hypotheses={self.hypotheses}: expected 3 (for a parabola) to {MOST_HYPOTHESES} of them")


class Photometry(NamedTuple):
    """What the whole picture says of its frames, so that its tiles are treated alike.

    Attributes:
        exposure: factor per frame that brings all to one exposure, (S,).
        luma_noise: variance of the pixel noise of the mean of the channels, after that factor; a scalar.
        noise: variance of the pixel noise of one channel, a scalar.
        grain: the same per light + BLACK, as `denoised` wants it; a scalar.
        brightness: mean of all frames, a scalar.
    """

    exposure: Tensor
    luma_noise: Tensor
    noise: Tensor
    grain: Tensor
    brightness: Tensor


class Evidence(NamedTuple):
    """What the frames say of every hypothesis.

    Attributes:
        cost: from `cost_volume`, (N, H, W).
        total: the same smoothed by `semi_global`, which hears the whole picture; (N, H, W).
    """

    cost: Tensor
    total: Tensor


class Swept(NamedTuple):
    """What the sweep makes of the evidence.

    Attributes:
        inverse_depth_dpt: 1/m, (H, W).
        error_px: the error to expect of it, 68 % being smaller, px of CoC, (H, W).
        sharp: brightness of the frame that is sharpest there, the mean of all frames being GREY; (H, W).
    """

    inverse_depth_dpt: Tensor
    error_px: Tensor
    sharp: Tensor


def photometry(
    frames: Tensor, valid: Tensor | None = None, captured: tuple[Tensor, Tensor] | None = None
) -> Photometry:
    """The `Photometry` of `frames` (S, 3, H, W), `valid` (S, H, W); `captured` is their `pixel_noise` if known."""
    luma, _ = filled_luma(frames, valid)
    exposure = relative_exposure(luma)
    luma_noise = detail_noise_variance(luma * exposure[:, None, None])
    noise, grain = captured or pixel_noise(frames, valid)
    return Photometry(exposure, luma_noise, noise, grain, _brightness(frames))


def pixel_noise(frames: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`noise` and `grain` of `Photometry`; arguments as for `photometry`."""
    noise = channel_noise_variance(filled_frames(frames, valid)[0])
    return noise, noise / (_brightness(frames) + BLACK)


def _brightness(frames: Tensor) -> Tensor:
    return torch.nan_to_num(frames).mean().clamp_min(DARKEST)


def quietened(
    frames: Tensor, valid: Tensor | None = None, context: Photometry | None = None
) -> tuple[Tensor, Photometry]:
    """`frames` (S, 3, H, W) as depth is best read from them, and their photometry: `noise` and `grain` as captured,
    exposure and `luma_noise` as they are now. `context` is the latter where they are a tile of a larger picture."""
    if context is not None:
        return denoised(frames, context.grain, valid), context
    captured = pixel_noise(frames, valid)
    quiet = denoised(frames, captured[1], valid)
    return quiet, photometry(quiet, valid, captured)


def detail_noise_variance(luma: Tensor) -> Tensor:
    """Variance of the pixel noise of `luma` (S, H, W) as fine detail shows it, a scalar.

    Demosaicing and compression take noise away between neighbouring pixels and leave it a little coarser: means of 2x2
    pixels are asked too. Texture speaks there as well, so they count for COARSE_NOISE_SHARE only. JPEGs of three
    cameras had 8 to 13 times the pixels' variance there, scenes with white noise 1 to 3.5.
    """
    pixels = noise_variance(luma)
    if min(luma.shape[1:]) < 4:
        return pixels
    return torch.maximum(pixels, COARSE_NOISE_SHARE * 4 * noise_variance(F.avg_pool2d(luma[None], 2)[0]))


def plane_sweep(
    frames: Tensor,
    focus_dpt: Tensor,
    kappa: Tensor,
    *,
    valid: Tensor | None = None,
    config: SweepConfig | None = None,
    context: Photometry | None = None,
    evidence: Evidence | None = None,
) -> Estimate:
    """Depth, its spread and the all-in-focus image of one stack; see `cost_volume` for the arguments without B.

    frames (S, 3, H, W), focus_dpt and kappa (S,), valid (S, H, W); `context` and `evidence` where the frames are a
    tile of a larger picture (`reconstruct/infer.py`), which has its own exposure and noise, and is smoothed as one.
    Memory: `reconstruct/memory.py`.
    """
    config = config or SweepConfig()
    if context is None:
        frames, focus_dpt, kappa, valid = far_to_near(frames, focus_dpt, kappa, valid)
    quiet, context = quietened(frames, valid, context)
    evidence = evidence or gather_evidence(quiet, focus_dpt, kappa, valid, config, context)
    swept = conclude(quiet, focus_dpt, kappa, valid, evidence, config, context)
    std = swept.error_px / kappa.mean()
    aif = fuse(frames, focus_dpt, kappa, swept.inverse_depth_dpt, std, valid=valid, noise=context.noise)
    return Estimate(swept.inverse_depth_dpt, std, 1.0 / (1.0 + swept.error_px), aif)


def far_to_near(
    frames: Tensor, focus_dpt: Tensor, kappa: Tensor, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The same stack in the order of focus: sums over frames round differently in every order, which would decide
    between two depths that fit equally well."""
    order = focus_dpt.argsort(stable=True)
    if bool((order.diff() > 0).all()):
        return frames, focus_dpt, kappa, valid
    return frames[order], focus_dpt[order], kappa[order], None if valid is None else valid[order]


def gather_evidence(
    frames: Tensor,
    focus_dpt: Tensor,
    kappa: Tensor,
    valid: Tensor | None,
    config: SweepConfig,
    context: Photometry,
) -> Evidence:
    """The `Evidence` of a whole picture; arguments as for `plane_sweep`, frames `quietened`."""
    cost, guide = sweep_cost(frames, focus_dpt, kappa, valid, config, context)
    return Evidence(cost, smoothed(cost, guide, config))


def conclude(
    frames: Tensor,
    focus_dpt: Tensor,
    kappa: Tensor,
    valid: Tensor | None,
    evidence: Evidence,
    config: SweepConfig,
    context: Photometry,
) -> Swept:
    """Depth from `evidence`; arguments as for `plane_sweep`, frames `quietened`."""
    tested = hypotheses(focus_dpt, kappa, config.hypotheses, config.beyond_px).to(frames.device)
    px_per_dpt = kappa.mean()
    found = peak(evidence.total, tested)
    rough_error_px = expected_error_px(
        found * px_per_dpt,
        peak(evidence.cost, tested) * px_per_dpt,
        focus_dpt.min() * px_per_dpt,
        focus_dpt.max() * px_per_dpt,
    )
    sharp = sharpest_luma(frames, focus_dpt, kappa, found, valid) * (GREY / context.brightness)
    return Swept(*spread_evidence(found, rough_error_px, px_per_dpt, sharp), sharp)


def sweep_cost(
    frames: Tensor,
    focus_dpt: Tensor,
    kappa: Tensor,
    valid: Tensor | None,
    config: SweepConfig,
    context: Photometry,
) -> tuple[Tensor, Tensor]:
    """What `plane_sweep` smooths: cost (N, H, W), and the image (H, W) whose edges it heeds; of frames `quietened`.

    No pixel of either depends on what is farther away than the widest blur.
    """
    tested = hypotheses(focus_dpt, kappa, config.hypotheses, config.beyond_px).to(frames.device)
    own = (frames[None], focus_dpt[None], kappa[None])
    seen = None if valid is None else valid[None]
    cost = cost_volume(*own, tested, valid=seen, psf=config.psf, window_px=config.window_px, context=context)[0]
    typical = _median([torch.nan_to_num(frame).clamp_min_(0).mean(0) for frame in frames])
    return cost, (typical * (GREY / context.brightness)).sqrt()


def _median(planes: list[Tensor]) -> Tensor:
    """The lower median of every pixel, (H, W); ten times as fast as sorting the few values of each pixel."""
    for rank in range((len(planes) + 1) // 2):
        for i in range(len(planes) - 1, rank, -1):
            one, two = planes[i - 1 : i + 1]
            planes[i - 1 : i + 1] = torch.minimum(one, two), torch.maximum(one, two)
    return planes[(len(planes) - 1) // 2]


def smoothed(cost: Tensor, guide: Tensor, config: SweepConfig, **where: Any) -> Tensor:
    """`semi_global` as `config` has it."""
    return semi_global(cost, guide, config.small_step, config.jump, config.edge, **where)


def semi_global(
    cost: Tensor,
    guide: Tensor,
    small_step: float,
    jump: float,
    edge: float,
    *,
    out: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Cost volume (N, H, W) with each pixel's neighbours' opinion added along four directions (Hirschmueller 2008).

    Columns know nothing of one another on the way down, nor rows on the way across: strips of the volume go to
    `device` in turn, so that next to nothing beyond `cost` and the result, `out`, is held.

    Args:
        guide: image (H, W) whose edges make depth jumps cheap.
        small_step, jump, edge: see `SweepConfig`.
    """
    device = device or cost.device
    total = torch.empty_like(cost) if out is None else out
    guide = guide.to(device)
    down = small_step + jump * torch.exp(-edge * _step(guide, 0))
    right = small_step + jump * torch.exp(-edge * _step(guide, 1))
    count, height, width = cost.shape
    at_once = CPU_STRIP if device.type == "cpu" else GPU_STRIP
    for cols in torch.arange(width).split(max(1, at_once // (count * height))):
        part = slice(int(cols[0]), int(cols[-1]) + 1)
        here = cost[:, :, part].to(device)
        sums = total[:, :, part] if total.device == device else torch.empty_like(here)
        _both_ways(here, down[:, part], small_step, sums)
        if total.device != device:
            total[:, :, part] = sums
    for rows in torch.arange(height).split(max(1, at_once // (count * width))):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        turned = _turned(cost[:, part].to(device))
        across = torch.empty_like(turned)
        _both_ways(turned, right[part].T.contiguous(), small_step, across)
        for target, plane in zip(total[:, part], across.mT, strict=True):
            target.add_(plane.contiguous().to(target.device)).div_(4)
    return total


def _step(guide: Tensor, dim: int) -> Tensor:
    """Absolute difference of each pixel to the one before it along `dim`, same shape."""
    return torch.diff(guide, dim=dim, prepend=guide.narrow(dim, 0, 1)).abs()


def _turned(volume: Tensor) -> Tensor:
    """(N, H, W) to (N, W, H), contiguous; a plane at a time, which on a CPU is twice as fast as all at once."""
    turned = volume.new_empty(volume.shape[0], volume.shape[2], volume.shape[1])
    for target, plane in zip(turned, volume, strict=True):
        target.copy_(plane.t())
    return turned


def _both_ways(cost: Tensor, jump: Tensor, small_step: float, total: Tensor) -> None:
    """Path costs of `cost` (N, T, X) summed over both directions along T, into `total`; `jump` (T, X): price from
    t - 1 to t. What a step needs is made before the first one: on a CPU half the time went into taking slices."""
    costs, prices, sums = cost.unbind(1), jump.unbind(0), total.unbind(1)
    padded = cost.new_full((cost.shape[0] + 2, cost.shape[2]), torch.inf)
    below, level, above = padded[:-2], padded[1:-1], padded[2:]
    path, best = torch.empty_like(level), cost.new_empty(cost.shape[2])

    def step(arrived: Tensor, price: Tensor) -> None:
        torch.amin(arrived, 0, out=best)
        torch.sub(arrived, best, out=path)
        torch.add(path, small_step, out=level)
        for other in (price, below, above):
            torch.minimum(path, other, out=path)

    sums[0].copy_(costs[0])
    for t in range(1, len(costs)):
        step(sums[t - 1], prices[t])
        torch.add(path, costs[t], out=sums[t])
    path.copy_(costs[-1])
    sums[-1].add_(path)
    for t in range(len(costs) - 2, -1, -1):
        step(path, prices[t + 1])
        sums[t].add_(path.add_(costs[t]))


def peak(cost: Tensor, tested_dpt: Tensor) -> Tensor:
    """Inverse depth (H, W) at the minimum of `cost` (N, H, W), refined by a parabola."""
    best = lowest(cost)
    middle = best.clamp(1, cost.shape[0] - 2)
    plane = best.numel()
    here = (middle.flatten() * plane).add_(torch.arange(plane, device=cost.device))
    left, centre, right = (cost.flatten().index_select(0, here + o * plane).view_as(best) for o in (-1, 0, 1))
    bend = left - 2 * centre + right
    offset = (left - right) / (2 * bend.clamp_min(1e-6))
    offset = torch.where(best == middle, offset.clamp(-0.5, 0.5), (best - middle).float())
    return tested_dpt[0] + (middle + offset) * (tested_dpt[1] - tested_dpt[0])


def lowest(volume: Tensor) -> Tensor:
    """Index (H, W) of the smallest of `volume` (N <= 256, H, W); on a CPU six times as fast as its argmin."""
    if volume.device.type != "cpu":
        return volume.argmin(0)
    least = volume[0].clone()
    index = torch.zeros(least.shape, dtype=torch.uint8)
    for n in range(1, len(volume)):
        torch.maximum(index, (volume[n] < least).view(torch.uint8).mul_(n), out=index)
        torch.minimum(least, volume[n], out=least)
    return index.long()


def sharpest_luma(
    frames: Tensor, focus_dpt: Tensor, kappa: Tensor, inverse_depth_dpt: Tensor, valid: Tensor | None
) -> Tensor:
    """Brightness of the frame that is sharpest at each pixel's depth, (H, W), 0 where no frame has data."""
    luma = frames.mean(1)
    mask = usable_mask(torch.isfinite(luma), valid)
    coc_px = (kappa[:, None, None] * (focus_dpt[:, None, None] - inverse_depth_dpt)).abs()
    chosen = torch.where(mask, coc_px, torch.inf).min(0).indices
    return torch.nan_to_num(luma.gather(0, chosen[None])[0]).clamp_min(0)


def spread_evidence(found_dpt: Tensor, error_px: Tensor, px_per_dpt: Tensor, sharp: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse depth and expected error in px of CoC, (H, W) each, after neighbours shared what they know.

    A mean weighted by 1 / error^2 that crosses neither edges of `sharp` (H, W), linear light, nor clear steps in
    depth. Where texture is missing depth becomes a smooth sheet hung from its surroundings. The same mean of the
    weights says how much evidence arrived; it is not taken to add up, because neighbours err together.
    """
    guide, depth_px = sharp.sqrt(), found_dpt * px_per_dpt
    down, right = (
        torch.exp(
            -SHEET_EDGE * torch.diff(guide, dim=d).abs()
            - SHEET_STEP * torch.diff(depth_px, dim=d).abs().clamp_max(SHEET_MOST_PX)
        )
        for d in (0, 1)
    )
    weight = error_px.pow(-2)
    arrived = edge_aware_mean(torch.stack((weight * found_dpt, weight)), down, right, SHEET_STRENGTH)
    return arrived[0] / arrived[1], arrived[1].rsqrt()


def expected_error_px(found: Tensor, unaided: Tensor, far_end: Tensor, near_end: Tensor) -> Tensor:
    """Error to expect of the depth `found`, (H, W), 68 % of the errors being smaller; all in pixels of CoC.

    Three signs of trouble, with exponents and scale fitted once to the errors on 30 procedural scenes through
    aperture-sampled optics (`python -m tests.benchmarks foundation` prints what they are worth on 15 others): depth
    that differs from its surroundings, because occlusion spoils the comparison there; a pixel's own evidence
    (`unaided`, before its neighbours were heard) that differs from what was found, because there is no texture; and
    depth outside the sweep, from `far_end` to `near_end`, which is where the comparison goes when nothing fits.
    """
    unevenness = box_mean((found - box_mean(found, 15)).abs(), 9)
    disagreement = box_mean((unaided - found).abs(), 9)
    outside = torch.maximum(found - near_end, far_end - found).clamp_min(0.0)
    error = torch.full_like(found, 1.81)
    for sign, exponent in ((unevenness, 0.540), (outside, 0.087), (disagreement, 0.243)):
        error *= (sign + 0.1) ** exponent
    return error


def hypotheses(focus_dpt: Tensor, kappa: Tensor, count: int, beyond_px: float = 2.0) -> Tensor:
    """Inverse depths to test, (count,) dioptres, uniform and ascending.

    They reach `beyond_px` of CoC past the nearest and the farthest focus, so that a scene slightly outside the
    sweep is still found.
    """
    margin = beyond_px / float(kappa.mean())
    return torch.linspace(float(focus_dpt.min()) - margin, float(focus_dpt.max()) + margin, count)


def cost_volume(
    frames: Tensor,
    focus_dpt: Tensor,
    kappa: Tensor,
    hypotheses_dpt: Tensor,
    *,
    valid: Tensor | None = None,
    psf: PsfShape = "disc",
    window_px: int = 5,
    context: Photometry | None = None,
) -> Tensor:
    """How badly each inverse depth explains the frames, (B, N, H, W) float32, 0 where noise explains the rest.

    The cost is log(1 + E / noise), E being the mean squared difference between the frames and the blurred
    reference in a window. Its offset and scale need no tuning between scenes: in a textureless window it is flat
    near log 2, in a textured one its minimum stays there and the wrong hypotheses rise above it.

    Args:
        frames: linear RGB, (B, S, 3, H, W), S >= 2, any order.
        focus_dpt: focus of each frame, (B, S) in 1/m.
        kappa: blur gain of each frame, (B, S), pixels of CoC diameter per dioptre.
        hypotheses_dpt: inverse depths to test, (N,) or (B, N).
        valid: pixels that hold data, (B, S, H, W) bool; None when all do.
        psf: shape of the blur.
        window_px: side of the square over which differences are averaged; odd.
        context: of the picture that `frames` are a tile of.
    """
    if frames.ndim != 5 or frames.shape[1] < 2 or frames.shape[2] != 3:
        raise ValueError(f"frames must be (B, S >= 2, 3, H, W), got {tuple(frames.shape)}")
    volumes = []
    for b in range(frames.shape[0]):
        tested = hypotheses_dpt if hypotheses_dpt.ndim == 1 else hypotheses_dpt[b]
        luma, mask = filled_luma(frames[b], None if valid is None else valid[b])
        luma = luma * (relative_exposure(luma) if context is None else context.exposure)[:, None, None]
        noise = detail_noise_variance(luma) if context is None else context.luma_noise
        holes = None if bool(mask.all()) else mask
        volumes.append(_stack_cost(luma, holes, noise, focus_dpt[b], kappa[b], tested, psf, window_px))
    return volumes[0][None] if len(volumes) == 1 else torch.stack(volumes)


def filled_luma(frames: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Brightness of `frames` (S, 3, H, W) with holes filled, (S, H, W), and where it is data (1, else 0).

    Holes (not `valid`, or not finite) take the mean of the frames that see the pixel, so that blurring beside them
    mixes in something plausible; they carry no weight themselves.
    """
    luma = frames.mean(1)
    mask = usable_mask(torch.isfinite(luma), valid)
    if bool(mask.all()):
        return luma, mask.float()
    luma = torch.where(mask, luma, 0.0)
    seen = mask.sum(0)
    common = luma.sum(0) / seen.clamp_min(1)
    overall = luma.sum() / mask.sum().clamp_min(1)
    common = torch.where(seen > 0, common, overall)
    luma = torch.where(mask, luma, common)
    return luma, mask.float()


def relative_exposure(luma: Tensor) -> Tensor:
    """Factor per frame, (S,), that brings all frames of `luma` (S, H, W) to one exposure.

    Defocus moves light by a few pixels only, so block means far larger than the blur differ by exposure alone; the
    median of their ratios ignores the blocks where something else happened. Corrections beyond MOST_DRIFT are not made:
    such frames differ by more than exposure.
    """
    blocks = F.adaptive_avg_pool2d(luma[None], (min(8, luma.shape[1]), min(8, luma.shape[2])))[0].flatten(1)
    target = blocks.median(0).values
    ratio = (target[None] / blocks.clamp_min(1e-4)).median(1).values
    return ratio.clamp(1 / (1 + MOST_DRIFT), 1 + MOST_DRIFT)


class BlurLevels:
    """The detail in the frames of one stack, blurred by a ladder of discs; each made when asked for and kept."""

    def __init__(self, luma: Tensor, largest_px: float, psf: PsfShape) -> None:
        self.luma = luma
        self.diameters_px = [0.0, FINEST_LEVEL_PX]
        while self.diameters_px[-1] < largest_px:
            self.diameters_px.append(self.diameters_px[-1] * LEVEL_RATIO)
        height, width = luma.shape[1:]
        pad = math.ceil(self.diameters_px[-1] / 2) + RING_PX
        self._rows = mirrored(height, pad, _fast_length(height + 2 * pad), luma.device)
        self._cols = mirrored(width, pad, _fast_length(width + 2 * pad), luma.device)
        self._pad, self._psf = pad, psf
        padded = luma[:, self._rows][:, :, self._cols]
        self._size = (padded.shape[1], padded.shape[2])
        detail = 1 - _transfer(*self._size, 4 * DETAIL_SIGMA_PX, "gaussian", str(luma.device))
        # in float32 what an FFT rounds depends on its size, and decided between two hypotheses at 1 pixel in 10^5
        self._spectra = torch.fft.rfft2(padded.double()) * detail
        self._levels: dict[tuple[int, int], Tensor] = {}

    def level(self, frame: int, index: int) -> Tensor:
        """Frame `frame` blurred by `diameters_px[index]`, (H, W)."""
        if (frame, index) not in self._levels:
            spectrum = self._spectra[frame]
            if index:
                spectrum = spectrum * _transfer(*self._size, self.diameters_px[index], self._psf, str(self.luma.device))
            blurred = torch.fft.irfft2(spectrum, s=self._size)
            height, width = self.luma.shape[1:]
            inside = blurred[self._pad : self._pad + height, self._pad : self._pad + width]
            self._levels[frame, index] = inside.float()
        return self._levels[frame, index]

    def blurred(self, frame: int, diameter_px: float) -> Tensor:
        """Frame `frame` blurred by any diameter up to the largest, (H, W)."""
        index = max(int(np.searchsorted(self.diameters_px, diameter_px)) - 1, 0)
        index = min(index, len(self.diameters_px) - 2)
        below, above = self.diameters_px[index], self.diameters_px[index + 1]
        mix = (diameter_px**2 - below**2) / (above**2 - below**2)
        return torch.lerp(self.level(frame, index), self.level(frame, index + 1), min(mix, 1.0))


def _fast_length(length: int) -> int:
    """The next length with no prime factor above 5, at which FFTs are several times as fast as at a prime."""
    while True:
        rest = length
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return length
        length += 1


@lru_cache(maxsize=64)
def _transfer(height: int, width: int, diameter_px: float, psf: PsfShape, device: str) -> Tensor:
    """Transfer function of a blur of `diameter_px` on an rfft2 grid.

    A disc's, 2 J1(x) / x, would ring on for ever on a grid of pixels, each size of picture in its own way. The rings
    end RING_PX beyond the disc, so that what is far away changes nothing.
    """
    if psf == "gaussian":
        return torch.exp(-2 * (math.pi * _frequency(height, width) * diameter_px / 4) ** 2).to(device)
    reach = math.ceil(diameter_px / 2) + RING_PX
    size = _fast_length(4 * reach)
    x = _frequency(size, size) * diameter_px * math.pi
    disc = torch.fft.irfft2(
        torch.where(x > 1e-3, 2 * torch.special.bessel_j1(x) / x.clamp_min(1e-3), 1.0), s=(size, size)
    )
    offset = torch.arange(-reach, reach + 1)
    radius = torch.hypot(offset[:, None].double(), offset[None].double())
    fade = ((reach - radius) / (RING_PX - 1)).clamp(0, 1)
    kernel = disc[offset % size][:, offset % size] * (0.5 - 0.5 * torch.cos(math.pi * fade))
    grid = torch.zeros(height, width, dtype=torch.float64)
    grid[(offset % height)[:, None], (offset % width)[None]] = kernel / kernel.sum()
    return torch.fft.rfft2(grid).real.contiguous().to(device)


def _frequency(height: int, width: int) -> Tensor:
    """Cycles a pixel on an rfft2 grid."""
    rows, cols = torch.fft.fftfreq(height, dtype=torch.float64), torch.fft.rfftfreq(width, dtype=torch.float64)
    return torch.hypot(rows[:, None], cols[None])


def _stack_cost(
    luma: Tensor,
    mask: Tensor | None,
    noise: Tensor,
    focus_dpt: Tensor,
    kappa: Tensor,
    tested_dpt: Tensor,
    psf: PsfShape,
    window_px: int,
) -> Tensor:
    """Cost of each hypothesis for one stack, (N, H, W); see `cost_volume`."""
    focus, gain, tested = (x.detach().cpu().double().numpy() for x in (focus_dpt, kappa, tested_dpt))
    coc_px = np.abs(gain[:, None] * (focus[:, None] - tested[None]))  # (S, N)
    levels = BlurLevels(luma, float(coc_px.max()), psf)
    noise = noise * DETAIL_NOISE_SHARE
    cost = torch.empty((len(tested), *luma.shape[1:]), device=luma.device)
    heard = torch.empty(cost.shape if mask is not None else 0, dtype=torch.bool, device=luma.device)
    for n in range(len(tested)):
        energy, pairs = _compared(levels, coc_px[:, n], mask)
        if mask is None:
            torch.log1p(box_mean(energy, window_px).div_((len(focus) - 1) * noise), out=cost[n])
            continue
        seen = box_mean(pairs, window_px)
        heard[n] = seen > LEAST_SEEN
        cost[n] = torch.log1p(box_mean(energy, window_px) / (seen.clamp_min(LEAST_SEEN) * noise)) * heard[n]
    if mask is not None:  # a hypothesis that no two frames can speak on is neither good nor bad
        typical = cost.sum(0) / heard.sum(0).clamp_min(1)
        for known, plane in zip(heard, cost, strict=True):
            plane.copy_(torch.where(known, plane, typical))
    return cost


def _compared(levels: BlurLevels, coc_px: NDArray[np.float64], mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Squared differences of the frames from their reference, summed, and how many there were; (H, W) each.

    `coc_px` (S,) is their blur. The reference is the sharpest frame, or the next where that has no data. Without a
    `mask` (S, H, W) all frames have data, and the pairs are not counted: an empty tensor.
    """
    order = coc_px.argsort(kind="stable")
    energy = torch.zeros_like(levels.luma[0])

    def difference(k: int, reference: int) -> Tensor:
        relative_px = math.sqrt(max(coc_px[k] ** 2 - coc_px[reference] ** 2, 0.0))
        return levels.blurred(reference, relative_px).sub_(levels.level(k, 0))

    if mask is None:
        for k in order[1:]:
            left = difference(k, order[0])
            energy.addcmul_(left, left)
        return energy, torch.empty(0)
    pairs, waiting = torch.zeros_like(energy), torch.ones_like(energy)
    for rank, reference in enumerate(order[:-1]):
        here = waiting * mask[reference]
        if rank and not bool(here.any()):
            continue
        for k in order[rank + 1 :]:
            left, both = difference(k, reference), mask[k] * here
            energy.addcmul_(left * both, left)
            pairs += both
        waiting -= here
        if not bool(waiting.any()):
            break
    return energy, pairs


GAIN_SEARCH_PX = 160  # longer side of the reduced frames that the gain is sought on
WIDEST_COC_PX = tuple(1.5 * 1.25**i for i in range(18))  # over the whole sweep, in reduced pixels; up to 67 px


def estimate_gain(frames: Tensor, focus_dpt: Tensor) -> float:
    """Blur gain in pixels of CoC per dioptre of `focus_dpt` that explains `frames` (S, 3, H, W) best.

    One gain for all frames, from a search over what the best hypothesis leaves unexplained. Only the frames' own
    blur tells, so an error of a tenth is normal, and a scene at one depth without texture says nothing at all.
    """
    span = float(focus_dpt.max() - focus_dpt.min())
    factor = min(math.ceil(max(frames.shape[2:]) / GAIN_SEARCH_PX), *frames.shape[2:])
    small = F.avg_pool2d(torch.nan_to_num(frames), factor)
    widest = [w for w in WIDEST_COC_PX if w < min(small.shape[2:]) / 2] or [WIDEST_COC_PX[0]]
    left = []
    for coc_px in widest:
        kappa = torch.full_like(focus_dpt, coc_px / span)
        cost = cost_volume(small[None], focus_dpt[None], kappa[None], hypotheses(focus_dpt, kappa, 24))
        left.append(float(cost[0].amin(0).mean()))
    best = int(np.argmin(left))
    at = math.log(widest[best])
    if 0 < best < len(left) - 1:
        below, lowest, above = left[best - 1 : best + 2]
        at += math.log(1.25) * (below - above) / (2 * (below - 2 * lowest + above) + 1e-12)
    return math.exp(at) * factor / span
