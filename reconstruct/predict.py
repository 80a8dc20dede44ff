"""A trained network applied to one stack: any size, tiled when large, with calibrated spread.

model = load_network("default", pick_device("auto"))
estimate = predict(model, frames, focus_dpt, kappa)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capture.errors import DataError
from reconstruct.checkpoint import DEFAULT_WEIGHTS, load_weights
from reconstruct.estimate import Estimate
from reconstruct.fusion import fuse
from reconstruct.network import DefaultNet, NetworkOutput, PaperNet, build
from reconstruct.plane_sweep import expected_error_px

MULTIPLE = 16  # both networks halve the image four times at most
TILE_PX = 1024  # side of a tile's core
HALO_PX = 128  # what the network sees around a pixel: its own reach and the widest blur


@dataclass(frozen=True)
class TrainedNetwork:
    """A network with what its weights file says about it.

    Attributes:
        identity: "default" or the file's name, and the first digits of the weights' SHA-256.
        std_gain, std_floor_px: calibration, std = hypot(gain * combined spread, floor) in px of CoC.
        about: the whole JSON beside the weights.
    """

    net: DefaultNet | PaperNet
    preset: str
    identity: str
    std_gain: float
    std_floor_px: float
    about: dict[str, Any]


def load_network(weights: str | Path, device: torch.device, preset: str | None = None) -> TrainedNetwork:
    """The network stored in `weights` (a file, or "default" for the shipped one), ready to predict on `device`.

    Raises DataError if the file is missing, damaged, of another preset, or does not fit the network.
    """
    path = DEFAULT_WEIGHTS if str(weights) == "default" else Path(weights)
    tensors, about = load_weights(path, preset)
    if about.get("preset") not in ("default", "paper"):
        raise DataError(f"{path}: weights of an unknown preset, {about.get('preset')!r}; update daif or train anew")
    network = wrap(build(about["preset"]), about, f"{weights if str(weights) == 'default' else path.name}")
    try:
        network.net.load_state_dict(tensors)
    except RuntimeError as error:
        detail = str(error).splitlines()[-1].strip()
        raise DataError(
            f"{path}: these weights do not fit this version's {about['preset']} network ({detail})"
        ) from None
    network.net.to(device).eval()
    return network


def wrap(net: DefaultNet | PaperNet, about: dict[str, Any], name: str) -> TrainedNetwork:
    """`net` with the calibration in `about`; without one its spread is taken as it is."""
    calibration = about.get("calibration", {})
    return TrainedNetwork(
        net=net,
        preset="paper" if isinstance(net, PaperNet) else "default",
        identity=f"{name} {str(about.get('sha256', 'unsaved'))[:12]}",
        std_gain=float(calibration.get("std_gain", 1.0)),
        std_floor_px=float(calibration.get("std_floor_px", 0.0)),
        about=about,
    )


@torch.inference_mode()
def predict(
    model: TrainedNetwork,
    frames: Tensor,
    focus_dpt: Tensor,
    kappa: Tensor,
    valid: Tensor | None = None,
    *,
    metric: bool = True,
    tile_px: int = TILE_PX,
) -> Estimate:
    """What the network makes of one stack.

    The all-in-focus image of the `default` preset is fused from the frames at the network's depth; its own image head
    serves training (1.7 dB behind on 8 scenes).

    Args:
        model: from `load_network`.
        frames: linear RGB, (S, 3, H, W), S >= 2, on the network's device.
        focus_dpt: focus settings, (S,).
        kappa: CoC pixels per dioptre, (S,).
        valid: (S, H, W), False where a frame has no data; None means everywhere.
        metric: whether `focus_dpt` are dioptres.
        tile_px: cores of larger images are predicted one by one, each with a halo.
    """
    height, width = frames.shape[-2:]
    frames = torch.nan_to_num(frames)
    if valid is not None and bool(valid.all()):
        valid = None
    brightness = frames.mean()
    out = frames.new_empty(5, height, width)
    for core, outer, inside in _tiles(height, width, tile_px):
        part = frames[:, :, outer[0], outer[1]]
        seen = None if valid is None else valid[:, outer[0], outer[1]]
        output = _padded(model.net, part, focus_dpt, kappa, seen, brightness)
        depth, std, aif = output.inverse_depth_dpt[0, 0], output.std_dpt[0, 0], output.aif[0]
        if model.preset == "default":
            spread_px = combined_spread_px(depth, std, focus_dpt, kappa)
            std = torch.hypot(model.std_gain * spread_px, spread_px.new_tensor(model.std_floor_px)) / kappa.mean()
            aif = fuse(part, focus_dpt, kappa, depth, std, valid=seen)
        out[:, core[0], core[1]] = torch.cat([depth[None], std[None], aif])[:, inside[0], inside[1]]
    confidence = torch.nan_to_num(1.0 / (1.0 + out[1] * kappa.mean()))  # no spread, no confidence
    inverse_depth = out[0].clamp_min(0.0) if metric else out[0]
    return Estimate(inverse_depth, out[1], confidence, out[2:].clamp_min(0.0), metric)


def combined_spread_px(depth_dpt: Tensor, std_dpt: Tensor, focus_dpt: Tensor, kappa: Tensor) -> Tensor:
    """Spread of one map in px of CoC, (H, W): geometric mean of the network's own and of what the map's shape says.

    Each knows what the other does not: on 8 scenes AUSE is 0.33 with the network's spread, 0.28 with the plane
    sweep's signs of trouble, 0.23 with both.
    """
    px_per_dpt = kappa.mean()
    found = depth_dpt * px_per_dpt
    signs = expected_error_px(found, found, focus_dpt.min() * px_per_dpt, focus_dpt.max() * px_per_dpt)
    return (signs * std_dpt * px_per_dpt).sqrt()


def _padded(
    net: DefaultNet | PaperNet,
    frames: Tensor,
    focus_dpt: Tensor,
    kappa: Tensor,
    valid: Tensor | None,
    brightness: Tensor,
) -> NetworkOutput:
    """The network's output for (S, 3, H, W) of any size: padded to a multiple of 16 by mirroring, cropped back."""
    height, width = frames.shape[-2:]
    rows = _mirrored(height, -(-height // MULTIPLE) * MULTIPLE, frames.device)
    cols = _mirrored(width, -(-width // MULTIPLE) * MULTIPLE, frames.device)
    frames = frames.index_select(-2, rows).index_select(-1, cols)
    if valid is not None:
        valid = valid.index_select(-2, rows).index_select(-1, cols)[None]
    output = net(frames[None], focus_dpt[None], kappa[None], valid, brightness)
    cropped = (x[..., :height, :width] for x in (output.inverse_depth_dpt, output.std_dpt, output.aif))
    return NetworkOutput(*cropped)


def _mirrored(length: int, padded: int, device: torch.device) -> Tensor:
    """Indices 0, 1, ... length - 1, length - 2, ... of a mirrored axis, (padded,)."""
    index = torch.arange(padded, device=device)
    if length == 1:
        return index * 0
    period = 2 * (length - 1)
    return (index % period).minimum(period - index % period)


Window = tuple[slice, slice]


def _tiles(height: int, width: int, tile_px: int) -> Iterator[tuple[Window, Window, Window]]:
    """(core, core with halo, core within the latter) of every tile; one tile if the image is small."""
    for rows in _spans(height, tile_px):
        for cols in _spans(width, tile_px):
            yield (rows[0], cols[0]), (rows[1], cols[1]), (rows[2], cols[2])


def _spans(length: int, tile_px: int) -> list[tuple[slice, slice, slice]]:
    if length <= tile_px + 2 * HALO_PX:
        return [(slice(0, length),) * 3]
    spans = []
    for start in range(0, length, tile_px):
        stop = min(start + tile_px, length)
        low = max(0, start - HALO_PX) // MULTIPLE * MULTIPLE  # the same grid of halved pixels as untiled
        spans.append((slice(start, stop), slice(low, min(length, stop + HALO_PX)), slice(start - low, stop - low)))
    return spans
