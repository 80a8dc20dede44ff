"""Depth of a stack seconds after its last frame: the plane sweep (or the network) on frames reduced to LOOK_PX.

It is for the operator's eyes, who decides whether to sweep again; the full reconstruction follows and replaces it.
"""

from __future__ import annotations

import time
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from capture.alignment import align_stack
from capture.decode import to_srgb8
from capture.lens import LensProfile
from capture.stack import FocalStack
from reconstruct import export
from reconstruct.estimate import Estimate
from reconstruct.even import evened
from reconstruct.optics import optics_of
from reconstruct.plane_sweep import estimate_gain, plane_sweep
from reconstruct.session_work import Look

LOOK_PX = 512  # longer side


def first_look(stack: FocalStack, profile: LensProfile | None, device: torch.device, model: Any = None) -> Look:
    """Quick depth and all-in-focus image of `stack`, by `model` (from `predict.load_network`) or by plane sweep.

    Raises DataError when the lens profile does not fit the stack.
    """
    began, cpu = time.monotonic(), time.process_time()
    optics = optics_of(stack, profile)
    factor = max(1, min(round(max(stack.height, stack.width) / LOOK_PX), stack.height, stack.width))
    size = stack.width // factor, stack.height // factor
    frames = np.stack([_reduced(stack, i, factor, size) for i in range(stack.n_frames)])
    alignment = align_stack(frames, optics.focus_dpt, scales=optics.scales)
    if not alignment.is_identity:
        frames = np.stack([alignment.apply(frame, i) for i, frame in enumerate(frames)])
    tensor = torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous().to(device)
    focus = torch.as_tensor(optics.focus_dpt, dtype=torch.float32, device=device)
    if optics.kappa_px_per_dpt is None:
        kappa = torch.full_like(focus, estimate_gain(tensor, focus))
    else:
        gain = optics.kappa_px_per_dpt * alignment.kappa_factor / factor
        kappa = torch.as_tensor(gain, dtype=torch.float32, device=device)
    with torch.inference_mode():
        estimate = _estimate(tensor, focus, kappa, model, optics.metric)
    return _look(estimate, optics.metric, stack.n_frames, time.monotonic() - began, time.process_time() - cpu)


def _reduced(stack: FocalStack, i: int, factor: int, size: tuple[int, int]) -> NDArray[np.float32]:
    return cv2.resize(stack.linear(i)[: size[1] * factor, : size[0] * factor], size, interpolation=cv2.INTER_AREA)


def _estimate(frames: torch.Tensor, focus: torch.Tensor, kappa: torch.Tensor, model: Any, metric: bool) -> Estimate:
    if model is None:
        return plane_sweep(frames, focus, kappa)
    from reconstruct.predict import predict

    return evened(predict(model, frames, focus, kappa, metric=metric), kappa)


def _look(estimate: Estimate, metric: bool, n_frames: int, seconds: float, cpu_seconds: float) -> Look:
    inverse = estimate.inverse_depth_dpt.cpu().numpy()
    near_m = far_m = std_m = None
    if metric:
        low, high = (float(q) for q in np.percentile(inverse, [1, 99]))
        near_m, far_m = (1 / max(q, 1e-3) for q in (high, low))
        std = estimate.std_dpt.cpu().numpy() / np.maximum(inverse, 1e-3) ** 2
        std_m = float(np.median(std))
    return Look(
        depth_jpeg=_jpeg(export.colorize_inverse_depth(inverse)[0]),
        aif_jpeg=_jpeg(to_srgb8(estimate.aif.permute(1, 2, 0).cpu().numpy())),
        near_m=near_m,
        far_m=far_m,
        std_m=std_m,
        confident=float((estimate.confidence > 0.5).float().mean()),
        n_frames=n_frames,
        seconds=seconds,
        cpu_seconds=cpu_seconds,
    )


def _jpeg(rgb: NDArray[np.uint8]) -> bytes:
    return cv2.imencode(".jpg", rgb[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 88])[1].tobytes()
