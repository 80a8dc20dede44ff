"""All-in-focus image + depth to focal stack, differentiable in image, depth, focus and blur gain; plain torch.

Four models (`notes/forward-model.md` has the evidence):

- `occlusion` (default): the scene is split into layers evenly spaced in inverse depth; pixel p has the hat weight
  w_l(p) in layer l. Every layer is blurred as a whole and the layers are composited front to back. Colour and opacity
  of layer l in frame k are divided by E_kl = B_kl(sum of w over l and everything behind it), B_kl being its blur, so
  that soft neighbours of one surface add up to exactly 1. Beside a near edge a wide lens also sees background that the
  sharp image does not show. As `Hidden`, it is a second image and depth behind the first; without it, background in
  sight spreads under the edge instead, and the true depth looks wrong there: of 15 noisy stacks it then has the lowest
  loss in 10, else in 14 (`python -m tests.benchmarks forward_model`).
- `scatter`: the same layers without order, in a third of the time,

      out_k = sum_l B_kl(I w_l) / sum_l B_kl(w_l).

  A frame's layers are summed *before* the inverse transform: L + S transforms for L x S blurs.
  It was meant to be the default. But on 15 whole noise-free stacks with real hidden background, whose image was fitted
  from the plane sweep's, the true depth beat the plane sweep and a smoothed truth 0 times under it and 12 times under
  `occlusion`. `python -m tests.benchmarks forward_model` asks harder: noise, edges only, the network's answer too.
- `gather`: every pixel reads the image blurred by its *own* width. Wrong at depth edges, where truth loses to a
  smoothed depth; it serves the plane sweep only.
- `published`: the operator of DEReD (arXiv 2303.10752, `notes/method.md` section 3), exact to its formula.

Blurs are products in the frequency domain (`spectrum.py`), so their cost does not depend on the width and nothing is
truncated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, groupby
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from capture.lens import coc_diameter_px
from reconstruct.smoothing import gaussian_mean
from reconstruct.spectrum import TAIL_SIGMAS, Psf, PsfShape, Spectrum, spectrum_of

Model = Literal["scatter", "occlusion", "gather", "published"]

LAYER_STEP_PX = 2.5  # CoC diameter between layers: 0.6 to 0.7 px of blur std (notes/forward-model.md, "Cost")
MAX_LAYERS = 48
TILE_PX = 300  # side of the tiles that large images are rendered in: bounded memory, warm caches
OCCLUSION_TILE_PX = 280  # the same for occlusion, which holds every layer of a tile three times
PUBLISHED_TILE_PX = 128  # the same for the published operator, which holds all frames of a tile
LEAST_WEIGHT = 1e-3  # of a layer and everything behind it, below which it has no colour
SCALE_KNEE, SCALE_RATIO = 0.3, 1.5  # of the gather's blur levels (notes/performance.md 1.1, last row)
GATHER_REACHES = 5  # side of its tiles: it holds three colours of every level
NARROW_PX = 32  # halo below which a narrower one saves less than its transforms cost
EXTRA_LEVEL = (3, -3, 1)  # of the first three levels: the one before them, on their parabola
KEPT_BYTES = 128e6  # blurred layers or levels up to this size are kept for the way back, not made again


class Hidden(NamedTuple):
    """What lies behind every pixel, seen only from beside it.

    It counts from one to two layers behind the pixel on, rising with the distance; where nothing lies behind, its depth
    is the pixel's own.

    Attributes:
        aif: linear colour, (B, 3, H, W).
        inverse_depth_dpt: (B, 1, H, W), finite; a constant, without gradient.
    """

    aif: Tensor
    inverse_depth_dpt: Tensor


def render_stack(
    aif: Tensor,
    inverse_depth_dpt: Tensor,
    focus_dpt: Tensor,
    kappa: Tensor,
    *,
    model: Model = "occlusion",
    psf: PsfShape = "disc",
    gaussian_gain: float = 0.27,
    floor_px: float = 0.3,
    layer_step_px: float = LAYER_STEP_PX,
    window: int = 7,
    hidden: Hidden | None = None,
) -> Tensor:
    """Blur `aif` as the lens would at each focus setting; returns (B, S, 3, H, W), linear light.

    Gradients flow to all four tensors and the hidden image. They are exact for the layers in use: these lie at
    multiples of a step in inverse depth that follows from the largest `kappa` (not differentiated), so a change of
    depth never moves them.

    Args:
        aif: linear all-in-focus image, (B, 3, H, W).
        inverse_depth_dpt: 1 / depth, (B, 1, H, W), finite.
        focus_dpt: focus setting of each frame, (B, S).
        kappa: blur gain of each frame, px of CoC diameter per dioptre, (B, S).
        model: see the top of this file.
        psf: point spread function; `published` and `gather` are Gaussian by definition.
        gaussian_gain: std of the Gaussian per px of CoC diameter (`published` has 1/4).
        floor_px: std of the blur in perfect focus; `published` has none.
        layer_step_px: CoC diameter between layers.
        window: taps per axis of the published operator.
        hidden: background that `aif` does not show; for `occlusion` only.
    """
    batch, _, height, width = aif.shape
    if inverse_depth_dpt.shape != (batch, 1, height, width):
        expected = (batch, 1, height, width)
        raise ValueError(f"inverse_depth_dpt must be {expected} to match aif, got {tuple(inverse_depth_dpt.shape)}")
    if focus_dpt.shape != kappa.shape or focus_dpt.shape[0] != batch or focus_dpt.ndim != 2:
        shapes = f"{tuple(focus_dpt.shape)} and {tuple(kappa.shape)}"
        raise ValueError(f"focus_dpt and kappa must both be (B, S) with B = {batch}, got {shapes}")
    if model == "published":
        coc_px = coc_diameter_px(kappa[..., None, None], focus_dpt[..., None, None], inverse_depth_dpt)
        return published_blur(aif, coc_px.abs() / 2, window)
    shape = Psf(psf, gaussian_gain, floor_px)
    if model == "gather":
        return _joined(
            [_Gather.apply(shape, aif[b], inverse_depth_dpt[b, 0], focus_dpt[b], kappa[b]) for b in range(batch)]
        )
    if hidden is not None and (model != "occlusion" or hidden.inverse_depth_dpt.shape != inverse_depth_dpt.shape):
        raise ValueError(f"hidden background of shape {tuple(hidden.inverse_depth_dpt.shape)} does not suit {model}")
    items = []
    for b in range(batch):
        surfaces = [(aif[b], inverse_depth_dpt[b, 0])]
        if hidden is not None:
            surfaces.append((hidden.aif[b], hidden.inverse_depth_dpt[b, 0].detach()))
        items.append(_layered(surfaces, focus_dpt[b], kappa[b], shape, layer_step_px, model))
    return _joined(items)


def _joined(stacks: list[Tensor]) -> Tensor:
    """`torch.stack`, but a single large stack is not copied."""
    return stacks[0][None] if len(stacks) == 1 else torch.stack(stacks)


def hidden_inverse_depth(inverse_depth_dpt: Tensor, kappa: Tensor) -> Tensor:
    """Inverse depth of what goes on behind every pixel beside a farther surface, (B, 1, H, W); elsewhere its own.

    From the far rim of the lens a near edge is seen shifted against what lies behind it by half their difference in
    CoC, whatever the focus. So far the farther surface is continued at its edge's depth, ring by ring.

    Args:
        inverse_depth_dpt: (B, 1, H, W), finite.
        kappa: blur gain of each frame, (B, S).
    """
    depth = inverse_depth_dpt.detach()
    parallax = kappa.detach().abs().amax(1)[:, None, None, None] / 2  # px per dioptre
    known, hidden = torch.zeros_like(depth, dtype=torch.bool), depth
    source = depth
    for ring in count(1):
        farthest = -functional.max_pool2d(-source, 3, 1, 1)
        reached = ~known & (parallax * (depth - farthest) >= ring)
        if not reached.any():
            break
        known |= reached
        hidden = torch.where(reached, farthest, hidden)
        source = torch.where(known, hidden, torch.inf)
    return hidden


def continued_behind(image: Tensor, inverse_depth_dpt: Tensor, hidden_dpt: Tensor, kappa: Tensor) -> Tensor:
    """A first guess of the hidden image, (3, H, W): `image` of the pixels at the hidden depth, averaged nearby.

    Args:
        image: (3, H, W).
        inverse_depth_dpt, hidden_dpt: (H, W).
        kappa: blur gain of each frame, (S,).
    """
    layers = Layers.spanning(torch.stack([inverse_depth_dpt, hidden_dpt]), kappa, LAYER_STEP_PX)
    place, hidden_place = layers.position(inverse_depth_dpt), layers.position(hidden_dpt)
    farthest_px = float(kappa.abs().max() * (inverse_depth_dpt - hidden_dpt).max()) / 2
    light, weight = torch.zeros_like(image), torch.zeros_like(place)
    for layer in _used_layers(hidden_place, layers.count):
        own, wanted = _hat(place, layer), _hat(hidden_place, layer)
        spread = gaussian_mean(torch.cat([image * own, own[None]]), max(farthest_px / 2, 1.0))
        light.addcmul_(wanted, spread[:3])
        weight.addcmul_(wanted, spread[3])
    return torch.where(weight > LEAST_WEIGHT, light / weight.clamp_min(LEAST_WEIGHT), image)


# --- layers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layers:
    """Planes of constant inverse depth, `first` to `first + count - 1` in steps of `step_dpt` from 0 dioptres."""

    first: int
    count: int
    step_dpt: float

    @classmethod
    def spanning(cls, inverse_depth_dpt: Tensor, kappa: Tensor, step_px: float) -> Layers:
        """The layers that `inverse_depth_dpt` touches; coarser by powers of 2 where they would exceed MAX_LAYERS."""
        near, far = float(inverse_depth_dpt.max()), float(inverse_depth_dpt.min())
        step = step_px / max(float(kappa.detach().abs().max()), 1e-6)
        step *= 2.0 ** max(0, math.ceil(math.log2(max((near - far) / step / (MAX_LAYERS - 2), 1e-6))))
        first = math.floor(far / step)
        return cls(first, math.floor(near / step) + 2 - first, step)

    def inverse_depth_dpt(self, like: Tensor) -> Tensor:
        """Where the layers lie, (L,)."""
        return (torch.arange(self.count, dtype=like.dtype, device=like.device) + self.first) * self.step_dpt

    def position(self, inverse_depth_dpt: Tensor) -> Tensor:
        """Inverse depth counted in layers, 0 to count - 1."""
        return inverse_depth_dpt / self.step_dpt - self.first


def _hat(position: Tensor, layer: int) -> Tensor:
    return (1 - (position - layer).abs()).clamp_min_(0)


def _hat_slope(position: Tensor, layer: int) -> Tensor:
    """Derivative of `_hat`; on a layer, that of the cell behind it, so that all hats still add up to 1."""
    offset = position - layer
    return ((offset >= -1) & (offset < 0)).to(position.dtype) - ((offset >= 0) & (offset < 1)).to(position.dtype)


def _used_layers(position: Tensor, count: int) -> list[int]:
    """Layers with any weight, or any slope of it, far to near."""
    cells = torch.bincount(position.long().flatten(), minlength=count).nonzero()[:, 0].tolist()
    return sorted({layer for cell in cells for layer in (cell, cell + 1) if layer < count})


def _layered(
    surfaces: list[tuple[Tensor, Tensor]],
    focus_dpt: Tensor,
    kappa: Tensor,
    psf: Psf,
    step_px: float,
    model: Model,
) -> Tensor:
    """One item of the batch, (S, 3, H, W); the image and inverse depth of what is in front, and perhaps behind it."""
    coc_px, places = _placed([depth for _, depth in surfaces], focus_dpt, kappa, step_px)
    placed = [tensor for (image, _), place in zip(surfaces, places, strict=True) for tensor in (image, place)]
    function = _Occlusion if model == "occlusion" else _Scatter
    return function.apply(psf, coc_px, *placed)


def _placed(depths_dpt: list[Tensor], focus_dpt: Tensor, kappa: Tensor, step_px: float) -> tuple[Tensor, list[Tensor]]:
    """CoC of every frame and layer, (S, L), and the inverse depths counted in these layers, (H, W) each."""
    layers = Layers.spanning(torch.stack([depth.detach() for depth in depths_dpt]), kappa, step_px)
    coc_px = coc_diameter_px(kappa[:, None], focus_dpt[:, None], layers.inverse_depth_dpt(kappa))
    return coc_px, [layers.position(depth) for depth in depths_dpt]


@dataclass(frozen=True)
class Tile:
    """A rectangle of the image, and the same with a halo as wide as the widest blur."""

    rows: slice
    columns: slice
    wide_rows: slice
    wide_columns: slice

    @property
    def proper(self) -> tuple[slice, slice]:
        """The rectangle in the image."""
        return self.rows, self.columns

    @property
    def wide(self) -> tuple[slice, slice]:
        """The rectangle and its halo in the image."""
        return self.wide_rows, self.wide_columns

    @property
    def inner(self) -> tuple[slice, slice]:
        """The rectangle within its halo."""
        top, left = self.rows.start - self.wide_rows.start, self.columns.start - self.wide_columns.start
        return (
            slice(top, top + self.rows.stop - self.rows.start),
            slice(left, left + self.columns.stop - self.columns.start),
        )

    @property
    def wide_size(self) -> tuple[int, int]:
        """Height and width of the rectangle and its halo."""
        rows, columns = self.wide
        return rows.stop - rows.start, columns.stop - columns.start

    @property
    def whole(self) -> tuple[slice, slice]:
        """The rectangle and its halo within themselves."""
        height, width = self.wide_size
        return slice(0, height), slice(0, width)

    def narrowed(self, reach: int) -> Tile:
        """The same rectangle with a halo of `reach` at most."""
        rows, columns = (
            slice(max(proper.start - reach, wide.start), min(proper.stop + reach, wide.stop))
            for proper, wide in zip(self.proper, self.wide, strict=True)
        )
        return Tile(self.rows, self.columns, rows, columns)


def _tiles(height: int, width: int, reach: int, reaches: int = 6, least_px: int = TILE_PX) -> Iterator[Tile]:
    """Tiles that cover the image, each with a halo of `reach`; the wider the blur, the larger, `reaches` times that."""
    side = max(least_px, reaches * reach)
    tall, wide = (math.ceil(length / max(1, round(length / side))) for length in (height, width))
    for top in range(0, height, tall):
        bottom = min(top + tall, height)
        for left in range(0, width, wide):
            right = min(left + wide, width)
            yield Tile(
                slice(top, bottom),
                slice(left, right),
                slice(max(top - reach, 0), min(bottom + reach, height)),
                slice(max(left - reach, 0), min(right + reach, width)),
            )


def _tile_spectrum(tile: Tile, reach: int, like: Tensor) -> Spectrum:
    # light that leaves on one side must not come back on the other; where both sides have a halo, it dies there
    lengths = []
    for proper, wide in ((tile.rows, tile.wide_rows), (tile.columns, tile.wide_columns)):
        haloed = proper.start - wide.start == reach == wide.stop - proper.stop
        lengths.append(wide.stop - wide.start + (0 if haloed else reach))
    return spectrum_of(lengths[0], lengths[1], like.dtype, like.device)


class _Scatter(torch.autograd.Function):
    """Normalised layered scatter of one image; keeps the rendered stack and its denominators only."""

    @staticmethod
    def forward(ctx: Any, psf: Psf, coc_px: Tensor, aif: Tensor, position: Tensor) -> Tensor:
        n_frames, n_layers = coc_px.shape
        height, width = position.shape
        out = aif.new_empty(n_frames, 3, height, width)
        weight = aif.new_empty(n_frames, 1, height, width)
        reach = psf.reach_px(float(coc_px.abs().max()))
        for tile in _tiles(height, width, reach):
            spectrum = _tile_spectrum(tile, reach, aif)
            sums = spectrum.zeros(n_frames, 4)
            for layer, source in _sources(aif, position, tile, n_layers):
                sums.addcmul_(spectrum.transfer(coc_px[:, layer], psf)[:, None], spectrum.forward(source))
            for k, total in enumerate(sums):
                spread = spectrum.inverse(total, *tile.inner)
                weight[(k, slice(None), *tile.proper)] = spread[3:]
                out[(k, slice(None), *tile.proper)] = spread[:3] / spread[3:]
            del sums  # before the next tile's are made
        ctx.save_for_backward(aif, position, coc_px, out, weight)
        ctx.psf = psf
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        aif, position, coc_px, out, weight = ctx.saved_tensors
        psf: Psf = ctx.psf
        n_frames, n_layers = coc_px.shape
        grad_aif, grad_position = torch.zeros_like(aif), torch.zeros_like(position)
        grad_coc = torch.zeros_like(coc_px) if ctx.needs_input_grad[1] else None
        reach = psf.reach_px(float(coc_px.abs().max()))
        for tile in _tiles(position.shape[0], position.shape[1], reach):
            spectrum = _tile_spectrum(tile, reach, aif)
            wanted = spectrum.zeros(n_frames, 4)
            wanted_here = None if grad_coc is None else torch.empty_like(wanted)
            for k in range(n_frames):
                box = (k, slice(None), *tile.wide)
                norm_grad = (grad_out[box] * out[box]).sum(0, keepdim=True).neg_()
                grad_sums = torch.cat([grad_out[box], norm_grad]).div_(weight[box])
                wanted[k] = spectrum.forward(grad_sums)
                if wanted_here is not None:
                    wanted_here[k] = _weighted_spectrum(grad_sums, tile, spectrum)
            here, image = position[tile.proper], aif[(..., *tile.proper)]
            returned = spectrum.zeros(4)
            for layer, source in _sources(aif, position, tile, n_layers):
                transfer = spectrum.transfer(coc_px[:, layer], psf)
                returned.zero_()
                for k in range(n_frames):
                    returned.addcmul_(transfer[k], wanted[k])
                spread = spectrum.inverse(returned, *tile.inner)
                grad_aif[(..., *tile.proper)] += _hat(here, layer) * spread[:3]
                received = (image * spread[:3]).sum(0).add_(spread[3])
                grad_position[tile.proper] += _hat_slope(here, layer).mul_(received)
                if grad_coc is not None and wanted_here is not None:
                    slope = spectrum.transfer_slope(coc_px[:, layer], psf)
                    grad_coc[:, layer] += _agreement(wanted_here, spectrum.forward(source)).mul_(slope).sum((1, 2))
            del wanted, wanted_here  # before the next tile's are made
        return None, grad_coc, grad_aif, grad_position


def _sources(aif: Tensor, position: Tensor, tile: Tile, count: int) -> Iterator[tuple[int, Tensor]]:
    """Each layer with weight in the tile or its halo, and its light: (4, h, w), colour times weight, and weight."""
    image, place = aif[(..., *tile.wide)], position[tile.wide]
    source = image.new_empty(4, *place.shape)
    for layer in _used_layers(place, count):
        source[3] = _hat(place, layer)
        torch.mul(image, source[3], out=source[:3])
        yield layer, source


def _weighted_spectrum(stack: Tensor, tile: Tile, spectrum: Spectrum) -> Tensor:
    """Spectrum of `stack` without the tile's halo, scaled so that products with another sum up as the pixels do."""
    alone = torch.zeros_like(stack)
    alone[(..., *tile.inner)] = stack[(..., *tile.inner)]
    return spectrum.forward(alone).mul_(spectrum.parseval)


def _agreement(stack: Tensor, source: Tensor) -> Tensor:
    """Products of spectra (n, C, h, w) and (C, h, w), summed over channels: (n, h, w)."""
    total = stack[:, 0] * source[0]
    for channel in range(1, source.shape[0]):
        total.addcmul_(stack[:, channel], source[channel])
    return total


class _Occlusion(torch.autograd.Function):
    """Front-to-back compositing of normalised layers.

    In frame k, layer l has colour C_l = B(I w_l) / E_l and opacity A_l = B(w_l) / E_l, with E_l the blur B of all
    weight from l on backwards; out = sum_l T_l C_l / sum_l T_l A_l with T_l = prod_(j in front of l) (1 - A_j).
    What is hidden joins the sums of the layers at least one behind the pixel itself, fully from two behind on.
    """

    @staticmethod
    def forward(ctx: Any, psf: Psf, coc_px: Tensor, *surfaces: Tensor) -> Tensor:
        aif, position = surfaces[:2]
        n_frames, n_layers = coc_px.shape
        height, width = position.shape
        out = aif.new_empty(n_frames, 3, height, width)
        reach = psf.reach_px(float(coc_px.abs().max()))
        tiles = list(_tiles(height, width, reach, least_px=OCCLUSION_TILE_PX))
        keep = len(tiles) == 1 and n_frames * n_layers * 5 * position.nbytes <= KEPT_BYTES
        ctx.kept = []
        for tile in tiles:
            spectrum = _tile_spectrum(tile, reach, aif)
            layers, spectra = _ordered_spectra(surfaces, tile, spectrum, n_layers)
            for k in range(n_frames):
                front, kept = _Front(position[tile.proper]), []
                light = aif.new_zeros(3, *front.weight.shape)
                for blurred in _blurred(spectra, spectrum, coc_px[k, layers], psf, tile):
                    light.addcmul_(blurred[:3], front.share(*blurred[3:]))
                    if keep:
                        kept.append(blurred)
                if keep:
                    ctx.kept.append(kept)
                out[(k, slice(None), *tile.proper)] = light / front.weight
            del spectra  # before the next tile's are made
        ctx.save_for_backward(coc_px, *surfaces)
        ctx.psf = psf
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        coc_px, *surfaces = ctx.saved_tensors
        aif, position = surfaces[:2]
        psf: Psf = ctx.psf
        n_frames, n_layers = coc_px.shape
        grads = [torch.zeros_like(tensor) for tensor in surfaces]
        grad_coc = torch.zeros_like(coc_px) if ctx.needs_input_grad[1] else None
        reach = psf.reach_px(float(coc_px.abs().max()))
        for tile in _tiles(position.shape[0], position.shape[1], reach, least_px=OCCLUSION_TILE_PX):
            spectrum = _tile_spectrum(tile, reach, aif)
            layers, spectra = _ordered_spectra(surfaces, tile, spectrum, n_layers)
            returned = torch.zeros_like(spectra)
            placed = spectrum.blank(5)
            for k in range(n_frames):
                blurred = ctx.kept[k] if ctx.kept else list(_blurred(spectra, spectrum, coc_px[k, layers], psf, tile))
                for index, grad in _front_backward(blurred, grad_out[(k, slice(None), *tile.proper)]):
                    placed[(..., *tile.inner)] = grad
                    grad_spectrum = spectrum.forward(placed)
                    coc = coc_px[k, layers[index : index + 1]]
                    returned[index].addcmul_(grad_spectrum, spectrum.transfer(coc, psf))
                    if grad_coc is not None:
                        shared = (grad_spectrum * spectra[index]).sum(0)
                        slope = spectrum.transfer_slope(coc, psf)[0]
                        grad_coc[k, layers[index]] += (shared * slope * spectrum.parseval).sum()
                del blurred  # before the next frame's are made
            del spectra
            # light of the halo reaches the tile, so sources there get their share of the gradient
            image, place, *hidden = (tensor[(..., *tile.wide)] for tensor in surfaces)
            grad_image, grad_place, *grad_hidden = (tensor[(..., *tile.wide)] for tensor in grads)
            behind = torch.zeros_like(place)
            for index, layer in enumerate(layers):
                spread = spectrum.inverse(returned[index], *tile.whole)
                behind += spread[4]
                hat, slope = _hat(place, layer), _hat_slope(place, layer)
                grad_image += hat * spread[:3]
                # w_l is part of its own layer and of E of every layer in front of it, itself included
                grad_place += slope * ((image * spread[:3]).sum(0) + spread[3] + behind)
                if hidden:
                    share, hat, rest = _hidden_weights(place, hidden[1], layer)
                    grad_hidden[0] += share * hat * spread[:3]
                    by_share = hat * ((hidden[0] * spread[:3]).sum(0) + spread[3]) + rest * spread[4]
                    grad_place += by_share * ((share > 0) & (share < 1))
            del returned
        given = [None] * len(surfaces[3:])  # where what is hidden lies
        return None, grad_coc, *grads[:3], *given


def _blurred(spectra: Iterable[Tensor], spectrum: Spectrum, coc_px: Tensor, psf: Psf, tile: Tile) -> Iterator[Tensor]:
    """One frame's sheets (C, h, w) within the tile, each blurred by its own CoC, near to far."""
    for sheet, coc in zip(spectra, coc_px.split(1), strict=True):
        yield spectrum.inverse(sheet * spectrum.transfer(coc, psf), *tile.inner)


def _ordered_spectra(
    surfaces: Sequence[Tensor], tile: Tile, spectrum: Spectrum, count: int
) -> tuple[list[int], Tensor]:
    """Layers of the tile from near to far, and spectra (n, 5, h, w): colour, weight, weight from here on backwards."""
    around = [tensor[(..., *tile.wide)] for tensor in surfaces]
    images, places = around[::2], around[1::2]
    layers = _used_layers(torch.stack(places), count)[::-1]
    spectra = spectrum.zeros(len(layers), 5)
    for sheet, target in zip(_sheets(places, layers), spectra, strict=True):
        light = _lit(images, sheet.weights)
        target.copy_(spectrum.forward(torch.cat([light, sheet.weight[None], sheet.rest[None]])))
    return layers, spectra


class _Sheet(NamedTuple):
    """What one layer holds of every surface, and what lies in it and behind it, (h, w) each."""

    weights: list[Tensor]
    rest: Tensor

    @property
    def weight(self) -> Tensor:
        """Of all surfaces."""
        return self.weights[0] if len(self.weights) == 1 else self.weights[0] + self.weights[1]


def _sheets(places: Sequence[Tensor], layers: Sequence[int]) -> Iterator[_Sheet]:
    """The `layers`, near to far; `places` are where the scene and perhaps what it hides lie, counted in layers."""
    place, *hidden_place = places
    rest = torch.ones_like(place)
    for layer in layers:
        hat = _hat(place, layer)
        if hidden_place:
            share, hidden_hat, hidden_rest = _hidden_weights(place, hidden_place[0], layer)
            yield _Sheet([hat, share * hidden_hat], torch.addcmul(rest, share, hidden_rest))
        else:
            yield _Sheet([hat], rest)
        rest = rest - hat


def _lit(images: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """The light of a sheet, (3, h, w)."""
    light = images[0] * weights[0]
    for image, weight in zip(images[1:], weights[1:], strict=True):
        light.addcmul_(image, weight)
    return light


def _hidden_weights(place: Tensor, hidden_place: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """How far what is hidden counts in this layer, its weight in it, and its weight in it and those behind, (h, w)."""
    share = (place - (layer + 1)).clamp_(0, 1)
    return share, _hat(hidden_place, layer), (layer + 1 - hidden_place).clamp_(0, 1)


class FixedDepth:
    """Occlusion at a depth that stays: renders any image, (S, 3, H, W), linear light, differentiable in the image.

    Which share of a frame every blurred sheet has is a matter of depth alone, so it is found once. With it the stack is
    linear in the image, out_k = sum_l G_kl B_kl(I w_l): three blurs a layer and frame instead of five.

    Args:
        inverse_depth_dpt: 1 / depth, (H, W), finite.
        focus_dpt: focus setting of each frame, (S,).
        kappa: blur gain of each frame, px of CoC diameter per dioptre, (S,).
        psf: point spread function.
        hidden_dpt: inverse depth of what is hidden, (H, W) as in `Hidden`; None where nothing is.
        layer_step_px: CoC diameter between layers.
    """

    @torch.no_grad()
    def __init__(
        self,
        inverse_depth_dpt: Tensor,
        focus_dpt: Tensor,
        kappa: Tensor,
        psf: Psf,
        hidden_dpt: Tensor | None = None,
        layer_step_px: float = LAYER_STEP_PX,
    ) -> None:
        self.psf = psf
        depths = [inverse_depth_dpt] if hidden_dpt is None else [inverse_depth_dpt, hidden_dpt]
        self.coc_px, places = _placed(depths, focus_dpt, kappa, layer_step_px)
        self.reach = psf.reach_px(float(self.coc_px.abs().max()))
        height, width = inverse_depth_dpt.shape
        tiles = _tiles(height, width, self.reach, least_px=OCCLUSION_TILE_PX)
        self.parts = [self._part(tile, [place[tile.wide] for place in places]) for tile in tiles]

    def __call__(self, *images: Tensor) -> Tensor:
        """The stack that this image (3, H, W), and perhaps that of what is hidden, would give."""
        out: Tensor = _AtFixedDepth.apply(self, *images)
        return out

    def _part(self, tile: Tile, places: list[Tensor]) -> _Part:
        layers = _used_layers(torch.stack(places), self.coc_px.shape[1])[::-1]
        sheets = list(_sheets(places, layers))
        spectrum = _tile_spectrum(tile, self.reach, places[0])
        spectra = [spectrum.forward(torch.stack([sheet.weight, sheet.rest])) for sheet in sheets]
        here = places[0][tile.inner]
        shares = here.new_empty(len(self.coc_px), len(layers), *here.shape)
        for coc_px, of_frame in zip(self.coc_px, shares, strict=True):
            front = _Front(here)
            every = _blurred(spectra, spectrum, coc_px[layers], self.psf, tile)
            for blurred, share in zip(every, of_frame, strict=True):
                share.copy_(front.share(*blurred))
            of_frame /= front.weight
        return _Part(tile, spectrum, self.coc_px[:, layers], [sheet.weights for sheet in sheets], shares)


class _Part(NamedTuple):
    """A tile of a `FixedDepth`: CoC of every frame and sheet (S, n), the sheets' weights of every surface (h, w) with
    the halo, and their shares G (S, n, h, w)."""

    tile: Tile
    spectrum: Spectrum
    coc_px: Tensor
    weights: list[list[Tensor]]
    shares: Tensor


class _AtFixedDepth(torch.autograd.Function):
    """A `FixedDepth` applied to images; the way back is the transpose."""

    @staticmethod
    def forward(ctx: Any, at: FixedDepth, *images: Tensor) -> Tensor:
        out = images[0].new_zeros(len(at.coc_px), *images[0].shape)
        for tile, spectrum, coc_px, weights, shares in at.parts:
            around = [image[(..., *tile.wide)] for image in images]
            spectra = [spectrum.forward(_lit(around, of_sheet)) for of_sheet in weights]
            for k, frame in enumerate(out[(..., *tile.proper)]):
                for blurred, share in zip(_blurred(spectra, spectrum, coc_px[k], at.psf, tile), shares[k], strict=True):
                    frame.addcmul_(blurred, share)
        ctx.at = at
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        at: FixedDepth = ctx.at
        grads = [torch.zeros_like(grad_out[0]) for _ in ctx.needs_input_grad[1:]]
        for tile, spectrum, coc_px, weights, shares in at.parts:
            placed = spectrum.blank(3)
            for index, of_sheet in enumerate(weights):
                returned = spectrum.zeros(3)
                for k, grad in enumerate(grad_out[(..., *tile.proper)]):
                    torch.mul(grad, shares[k, index], out=placed[(..., *tile.inner)])
                    returned.addcmul_(spectrum.forward(placed), spectrum.transfer(coc_px[k, index : index + 1], at.psf))
                # light of the halo reaches the tile, so sources there get their share of the gradient
                spread = spectrum.inverse(returned, *tile.whole)
                for grad, weight in zip(grads, of_sheet, strict=True):
                    grad[(..., *tile.wide)].addcmul_(spread, weight)
        return None, *grads


class _Front:
    """How much weight has been composited so far, from the front, and what it leaves open."""

    def __init__(self, like: Tensor) -> None:
        self.weight, self.open = torch.zeros_like(like), torch.ones_like(like)

    def share(self, weight: Tensor, rest: Tensor) -> Tensor:
        """What a sheet's blurred light counts behind all that; of its blurred weight, alone and from it backwards."""
        share = self.open / _behind(rest)
        seen = weight * share
        self.weight += seen
        self.open -= seen
        return share


def _behind(rest: Tensor) -> Tensor:
    """E of a sheet, kept away from zero: where nothing of it nor behind it comes near, there is nothing to divide."""
    return rest.clamp_min(LEAST_WEIGHT)


def _front_backward(blurred: list[Tensor], grad_out: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Number of each blurred sheet of one frame, far to near, and the gradient (5, h, w) by it.

    `grad_out` (3, h, w) is the gradient by the composited frame.
    """
    front, light, shares = _Front(grad_out[0]), torch.zeros_like(grad_out), []
    for sheet in blurred:
        shares.append(front.share(*sheet[3:]))
        light.addcmul_(sheet[:3], shares[-1])
    grad_light = grad_out / front.weight
    grad_weight = (grad_light * light).sum(0).div_(front.weight).neg_()
    grad_open = torch.zeros_like(front.open)  # by what is open behind the sheet at hand
    for index in range(len(blurred) - 1, -1, -1):
        sheet, share = blurred[index], shares[index]
        net = grad_weight - grad_open
        by_share = (grad_light * sheet[:3]).sum(0).addcmul_(net, sheet[3])
        grad = torch.empty_like(sheet)
        torch.mul(grad_light, share, out=grad[:3])
        torch.mul(net, share, out=grad[3])
        by_share /= _behind(sheet[4])
        torch.mul(by_share, share, out=grad[4]).neg_().mul_(sheet[4] > LEAST_WEIGHT)
        grad_open = grad_open + by_share
        yield index, grad


# --- gather ---------------------------------------------------------------------------------------------------------


class _Gather(torch.autograd.Function):
    """Every pixel reads the image blurred by its own variance: image (3, H, W), inverse depth (H, W) to (S, 3, H, W).

    The image is blurred once at a few levels, which all frames share and which are even in log(SCALE_KNEE + variance);
    each pixel interpolates between four of them (Catmull-Rom). Light comes from inside the image only.
    """

    @staticmethod
    def forward(ctx: Any, psf: Psf, aif: Tensor, inverse_depth_dpt: Tensor, focus_dpt: Tensor, kappa: Tensor) -> Tensor:
        settings = list(zip(kappa, focus_dpt, strict=True))
        scales = Scales.covering(psf.gaussian_variance(coc_diameter_px(*lens, inverse_depth_dpt)) for lens in settings)
        out = aif.new_empty(len(settings), *aif.shape)
        tiles = list(_tiles(aif.shape[1], aif.shape[2], scales.reach, GATHER_REACHES))
        ctx.kept = None
        for tile in tiles:
            table = _levels(aif, tile, scales)
            depth = inverse_depth_dpt[tile.proper]
            keep = len(tiles) == 1 and 2 * table.nbytes + 16 * len(settings) * depth.nbytes <= KEPT_BYTES
            every = []
            for k, lens in enumerate(settings):
                taps = scales.taps(psf.gaussian_variance(coc_diameter_px(*lens, depth)))
                out[(k, slice(None), *tile.proper)] = taps.mixed(table, taps.weights).view(3, *depth.shape)
                if keep:
                    every.append(taps)
            if keep:
                ctx.kept = table, every
            del table, every, taps  # before the next tile's are made
        ctx.save_for_backward(aif, inverse_depth_dpt, focus_dpt, kappa)
        ctx.psf, ctx.scales = psf, scales
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        aif, inverse_depth_dpt, focus_dpt, kappa = ctx.saved_tensors
        psf: Psf = ctx.psf
        scales: Scales = ctx.scales
        grad_aif, grad_depth = torch.zeros_like(aif), torch.zeros_like(inverse_depth_dpt)
        grad_focus, grad_kappa = torch.zeros_like(focus_dpt), torch.zeros_like(kappa)
        for tile in _tiles(aif.shape[1], aif.shape[2], scales.reach, GATHER_REACHES):
            table, every = ctx.kept or (_levels(aif, tile, scales), None)
            depth = inverse_depth_dpt[tile.proper]
            grad_levels = aif.new_zeros(3, scales.count + 1, *depth.shape)
            for k, gain in enumerate(kappa):
                per_kappa = coc_diameter_px(1.0, focus_dpt[k], depth)
                coc_px = gain * per_kappa
                taps = every[k] if every else scales.taps(psf.gaussian_variance(coc_px))
                grad = grad_out[(k, slice(None), *tile.proper)]
                by_variance = taps.mixed(table, taps.slopes).view_as(grad).mul_(grad).sum(0)
                by_coc = by_variance.mul_(coc_px).mul_(2 * psf.gain**2)
                grad_kappa[k] += (by_coc * per_kappa).sum()
                grad_focus[k] += gain * by_coc.sum()
                grad_depth[tile.proper] -= by_coc.mul_(gain)
                taps.spread(grad, grad_levels)
            del table, every, taps
            by_level = scales.pull_back(grad_levels.transpose(0, 1))
            for levels, near, spectrum in _halos(tile, scales, aif):
                returned = spectrum.zeros(3)
                for level, variance in levels:
                    seen = by_level[level].div_(spectrum.gaussian_of_ones(variance, near.wide_size, near.inner))
                    transfer = spectrum.gaussian(variance)
                    values = transfer.shape[1]
                    returned[..., :values].addcmul_(transfer, spectrum.forward(seen, values))
                # the tile went in at the first row and column, so what lies before it came out at the far end
                around = spectrum.inverse(returned, slice(0, spectrum.height), slice(0, spectrum.width))
                around = around.roll((near.inner[0].start, near.inner[1].start), (1, 2))
                grad_aif[(..., *near.wide)] += around[(..., *near.whole)]
            del grad_levels, by_level, seen, returned, around  # before the next tile's are made
        return None, grad_aif, grad_depth, grad_focus, grad_kappa


@dataclass(frozen=True)
class Taps:
    """Which four levels each pixel of a frame mixes, with what weights, and their derivatives by the variance.

    All are (h * w, 4); `rows` numbers the pixels of all levels, (L, h, w) in order.
    """

    rows: Tensor
    weights: Tensor
    slopes: Tensor

    def mixed(self, table: Tensor, weights: Tensor) -> Tensor:
        """Sum of `weights` times the levels' colours, a `table` of (L * h * w, 3); (3, h * w)."""
        return functional.embedding_bag(self.rows, table, mode="sum", per_sample_weights=weights).T

    def spread(self, grad: Tensor, levels: Tensor) -> None:
        """Adjoint of `mixed`: adds `grad` (3, h, w), given back to the levels, to `levels` (3, L, h, w)."""
        rows = self.rows.flatten()
        for target, part in zip(levels, grad, strict=True):
            target.view(-1).scatter_add_(0, rows, (self.weights * part.reshape(-1, 1)).flatten())


@dataclass(frozen=True)
class Scales:
    """Variances at which an image is blurred, even in log(SCALE_KNEE + variance), from `least` on."""

    least: float
    count: int

    @classmethod
    def covering(cls, variances: Iterable[Tensor]) -> Scales:
        """Enough levels for every value of `variances`; the first lies at the smallest or below."""
        limits = [(float(variance.min()), float(variance.max())) for variance in variances]
        least, most = min(low for low, _ in limits), max(high for _, high in limits)
        least = min(least, 0.09) if least > 0.01 else 0.0
        span = math.log((SCALE_KNEE + most) / (SCALE_KNEE + least)) / math.log(SCALE_RATIO)
        return cls(least, math.floor(span) + 3)

    @property
    def variances(self) -> list[float]:
        """Variance of every level, px^2."""
        return [(SCALE_KNEE + self.least) * SCALE_RATIO**level - SCALE_KNEE for level in range(self.count)]

    @property
    def reach(self) -> int:
        """Distance in px beyond which no level moves light."""
        return self._reach(self.variances[-1])

    @staticmethod
    def _reach(variance: float) -> int:
        return math.ceil(TAIL_SIGMAS * math.sqrt(variance) + 2)

    @property
    def by_reach(self) -> list[tuple[int, list[tuple[int, float]]]]:
        """Levels whose reach is alike within a factor of 2, number and variance, and the widest reach among them."""

        def halvings(level: tuple[int, float]) -> int:
            return int(math.log2(max(self.reach / max(self._reach(level[1]), NARROW_PX), 1)))

        groups = [list(levels) for _, levels in groupby(enumerate(self.variances), halvings)]
        return [(self._reach(levels[-1][1]), levels) for levels in groups]

    def taps(self, variance: Tensor) -> Taps:
        """What each pixel of `variance` (h, w) mixes. Level 0 of the mix is an extra one before the first."""
        flat = variance.flatten()
        place = torch.log((SCALE_KNEE + flat) / (SCALE_KNEE + self.least)).div_(math.log(SCALE_RATIO))
        cell = place.floor().clamp_(0, self.count - 3)
        t = place - cell
        rate = 1 / ((SCALE_KNEE + flat) * math.log(SCALE_RATIO))
        weights = torch.stack(
            [
                ((2 - t) * t - 1) * t / 2,
                ((3 * t - 5) * t * t + 2) / 2,
                ((4 - 3 * t) * t + 1) * t / 2,
                (t - 1) * t * t / 2,
            ],
            -1,
        )
        slopes = torch.stack(
            [
                ((4 - 3 * t) * t - 1) / 2,
                (9 * t - 10) * t / 2,
                ((8 - 9 * t) * t + 1) / 2,
                (3 * t - 2) * t / 2,
            ],
            -1,
        ).mul_(rate[:, None])
        pixels = flat.numel()
        first = cell.long().mul_(pixels) + torch.arange(pixels, device=flat.device)
        return Taps(first[:, None] + torch.arange(0, 4 * pixels, pixels, device=flat.device), weights, slopes)

    @staticmethod
    def pull_back(grad: Tensor) -> Tensor:
        """`grad` (L + 1, 3, h, w) without the extra level, whose part goes to the three it was made of; in place."""
        levels = grad[1:]
        for level, share in zip(levels, EXTRA_LEVEL, strict=False):
            level.add_(grad[0], alpha=share)
        return levels


def _halos(tile: Tile, scales: Scales, like: Tensor) -> Iterator[tuple[list[tuple[int, float]], Tile, Spectrum]]:
    """Levels, number and variance, with the tile in the halo they need and its frequencies."""
    for reach, levels in scales.by_reach:
        near = tile.narrowed(reach)
        yield levels, near, _tile_spectrum(near, reach, like)


def _levels(aif: Tensor, tile: Tile, scales: Scales) -> Tensor:
    """The tile's colours at every level, the extra one first, ((L + 1) * h * w, 3)."""
    table = aif.new_empty(scales.count + 1, *aif[(0, *tile.proper)].shape, 3)
    for levels, near, spectrum in _halos(tile, scales, aif):
        source = spectrum.forward(aif[(..., *near.wide)])
        for level, variance in levels:
            transfer = spectrum.gaussian(variance)
            spread = spectrum.inverse(source[..., : transfer.shape[1]] * transfer, *near.inner)
            spread /= spectrum.gaussian_of_ones(variance, near.wide_size, near.inner)
            table[level + 1] = spread.permute(1, 2, 0)
    table[0] = sum(share * level for share, level in zip(EXTRA_LEVEL, table[1:], strict=False))
    return table.view(-1, 3)


# --- the published operator -----------------------------------------------------------------------------------------


def published_blur(image: Tensor, radius_px: Tensor, window: int = 7) -> Tensor:
    """DEReD's operator: `image` (B, 3, H, W) blurred by `radius_px` (B, S, H, W); returns (B, S, 3, H, W).

    With c the published "sigma", which is a CoC *radius* in pixels, and r the distance between p and q,

        out(p) = sum_q g(c(q), r) v(q) / sum_q g(c(q), r),    g(c, r) = exp(-2 r^2 / c^2) / c^2

    over q in a `window` x `window` square, inside the image, with c(q) > 1; where c(p) <= 1, out(p) = v(p). The
    gradient is exact with the gate held fixed, as in the published code (`notes/method.md` section 3).
    """
    return _Published.apply(image, radius_px, window)


def _shifts(window: int, height: int, width: int) -> Iterator[tuple[int, tuple[slice, slice], tuple[slice, slice]]]:
    """Squared distance of every tap, with the slices of receivers p and of their sources q = p + shift."""
    half = window // 2
    for dy in range(max(-half, 1 - height), min(half, height - 1) + 1):
        for dx in range(max(-half, 1 - width), min(half, width - 1) + 1):
            yield (
                dy * dy + dx * dx,
                (slice(max(0, -dy), height - max(0, dy)), slice(max(0, -dx), width - max(0, dx))),
                (slice(max(0, dy), height - max(0, -dy)), slice(max(0, dx), width - max(0, -dx))),
            )


class _Published(torch.autograd.Function):
    """Loops over the taps in both directions instead of keeping window^2 maps; tile by tile, in warm caches."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, radius_px: Tensor, window: int) -> Tensor:
        height, width = image.shape[-2:]
        out = image.new_empty(*radius_px.shape[:2], 3, height, width)
        norm = torch.empty_like(radius_px)
        for tile in _tiles(height, width, window // 2, least_px=PUBLISHED_TILE_PX):
            light, radius = image[(..., *tile.wide)][:, None], radius_px[(..., *tile.wide)]
            gate, _, mass, decay = _published_kernel(radius)
            source_light = light * mass[:, :, None]
            total, weight = torch.zeros_like(source_light), torch.zeros_like(mass)
            for distance2, receiver, source in _shifts(window, *radius.shape[-2:]):
                falloff = torch.exp(decay[(..., *source)] * distance2)
                total[(..., *receiver)] += falloff[:, :, None] * source_light[(..., *source)]
                weight[(..., *receiver)] += falloff * mass[(..., *source)]
            weight = torch.where(gate, weight, 1.0)
            mixed = torch.where(gate[:, :, None], total / weight[:, :, None], light)
            out[(..., *tile.proper)] = mixed[(..., *tile.inner)]
            norm[(..., *tile.proper)] = weight[(..., *tile.inner)]
        ctx.save_for_backward(image, radius_px, out, norm)
        ctx.window = window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        image, radius_px, out, norm = ctx.saved_tensors
        grad_image, grad_radius = torch.zeros_like(image), torch.zeros_like(radius_px)
        for tile in _tiles(image.shape[-2], image.shape[-1], ctx.window // 2, least_px=PUBLISHED_TILE_PX):
            wide = (..., *tile.wide)
            light, gradient = image[wide][:, None], torch.zeros_like(grad_out[wide])
            gradient[(..., *tile.inner)] = grad_out[(..., *tile.proper)]  # of receivers; sources lie in the halo too
            gate, safe, mass, decay = _published_kernel(radius_px[wide])
            passed = torch.where(gate[:, :, None], 0.0, gradient)
            grad_total = (gradient - passed) / norm[wide][:, :, None]
            grad_weight = -(grad_total * out[wide]).sum(2)
            to_image, to_radius = passed.sum(1), torch.zeros_like(safe)
            for distance2, receiver, source in _shifts(ctx.window, *safe.shape[-2:]):
                kernel = torch.exp(decay[(..., *source)] * distance2) * mass[(..., *source)]
                from_total = grad_total[(..., *receiver)]
                to_image[(..., *source)] += (kernel[:, :, None] * from_total).sum(1)
                grad_kernel = (from_total * light[(..., *source)]).sum(2) + grad_weight[(..., *receiver)]
                c = safe[(..., *source)]
                to_radius[(..., *source)] += grad_kernel * kernel * (4 * distance2 / c**3 - 2 / c)
            grad_image[wide] += to_image
            grad_radius[wide] += to_radius
        return grad_image, grad_radius, None


def _published_kernel(radius_px: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which pixels blur, their radius (1 elsewhere), a source's weight at distance 0, and how it falls off."""
    gate = radius_px > 1
    safe = torch.where(gate, radius_px, 1.0)
    return gate, safe, gate / (safe * safe), -2 / (safe * safe)
