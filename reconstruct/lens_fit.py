"""Where the lens was focused in every frame, found from the frames themselves.

The distance that a camera reports is rounded and often wrong by some percent, and an uncalibrated sweep reports none:
its settings are taken for evenly spaced. Depth then suffers, for frames contradict each other. But depth is one number
a pixel and every frame has a say in it, so the frames tell how far each of them is off: `fitted_focus` sweeps planes,
fits the all-in-focus image to their depth, corrects each frame's focus by what its own misfit says, and sweeps again.

A shift and stretch of all settings together moves depth along and explains the frames as well (shared/design.md
section 2). No stack tells it, so it stays as it was reported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from reconstruct.denoise import root_of
from reconstruct.misfit import Misfit
from reconstruct.plane_sweep import plane_sweep, quietened

HOLD = 0.06  # weight of what was reported, in usual misfits
FOCUS_STD_PX = 0.5  # expected error of a reported focus, px of blur std
PROBE_PX = 0.05  # change of blur at which a frame's misfit is compared
LONGEST_PX = 0.5  # of one correction; the misfit's slope knows no more
ROUNDS = 6  # of depth and correction, at most
WORTH = 0.01  # share of the misfit that a round must take away, geometric mean of the frames
LEAST_MISFIT = 1e-8  # of a frame; empty ones are explained by everything
UNEXPLAINED = 6.0  # times the median frame's misfit; 1.3 to 2.8 times in photographs
SETTLED_PX = 0.05  # a shorter correction changes no depth worth a round
IMAGE_STEPS = 2  # before a frame's misfit is looked at
TELLING_SPAN_PX = 4.0  # of blur std over the sweep: enough to compare focus settings by
WINDOW_STRIDE_PX = 8  # between those compared
WINDOW_PX, WHOLE_PX = 96, 36864  # side of a part of the picture; up to so many pixels it is taken whole


class Explained(NamedTuple):
    """Frames with the root image (3, H, W) and the inverse depth (H, W) that explain them so far."""

    misfit: Misfit
    root: Tensor
    inverse_depth_dpt: Tensor


def fitted_focus(windows: Sequence[tuple[Tensor, Tensor]], focus_dpt: Tensor, kappa: Tensor) -> Tensor:
    """The focus settings (S,) that explain parts of a picture best; the reported ones if none explain them better.

    The reported ones, too, if a frame remains that no focus explains: the others would be bent to it.

    Args:
        windows: of each part the linear frames (S, 3, h, w) and where they hold data (S, h, w), of one exposure.
        focus_dpt: reported focus, (S,).
        kappa: CoC pixels per dioptre, (S,).
    """
    quiet = [quietened(frames, valid)[0] for frames, valid in windows]
    tried = best = focus_dpt
    lowest, odd = float("inf"), False
    dpt_to_px = float(kappa.abs().mean()) / 4
    for _ in range(ROUNDS if len(focus_dpt) > 2 else 0):
        explained = []
        for still, (frames, valid) in zip(quiet, windows, strict=True):
            found = plane_sweep(frames, tried, kappa, valid=valid)
            misfit = Misfit(still, tried, kappa, valid=valid, model="scatter")
            misfit.choose_psf(found)
            root, _ = misfit.fitted(root_of(found.aif), found.inverse_depth_dpt, IMAGE_STEPS)
            explained.append(Explained(misfit, root, found.inverse_depth_dpt))
        misfits = frame_misfits(explained, tried, kappa)
        left = float(misfits.log().mean().exp())
        if not left < (1 - WORTH) * lowest:
            break
        lowest, best, odd = left, tried, bool(misfits.max() > UNEXPLAINED * misfits.median())
        tried = corrected_focus(explained, misfits, focus_dpt, FOCUS_STD_PX, HOLD)
        if float((tried - best).abs().max()) * dpt_to_px < SETTLED_PX:
            break
    return focus_dpt if odd else best


def picture_focus(
    cut: Callable[[int, slice, slice], tuple[Tensor, Tensor]],
    luma: Tensor,
    size: tuple[int, int],
    focus_dpt: Tensor,
    kappa: Tensor,
) -> Tensor:
    """`fitted_focus` of a picture by its most telling parts, (S,).

    Wide blur is compared in a size at which the sweep still spans `TELLING_SPAN_PX`.

    Args:
        cut: linear frames (S, 3, h, w) and where they hold data (S, h, w): rows and columns of the picture reduced by a
            whole factor.
        luma: of the frames, (S, h, w) in any size.
        size: height and width of the picture.
        focus_dpt: reported focus, (S,).
        kappa: CoC pixels of the picture per dioptre, (S,).
    """
    height, width = size
    span_px = float(kappa.max() * (focus_dpt.max() - focus_dpt.min())) / 4
    factor = max(1, int(span_px / TELLING_SPAN_PX)) if height * width > WHOLE_PX else 1
    windows = [cut(factor, rows, cols) for rows, cols in telling_windows(luma, height // factor, width // factor)]
    return fitted_focus(windows, focus_dpt, kappa / factor)


def telling_windows(luma: Tensor, height: int, width: int) -> list[tuple[slice, slice]]:
    """Rows and columns of what tells most of a picture of this size: all of it, or a part of each quarter.

    Args:
        luma: of the frames, (S, h, w) in any size.
    """
    if height * width <= WHOLE_PX or min(height, width) < 2 * WINDOW_PX:
        return [(slice(0, height), slice(0, width))]
    steps = luma[:, :-1, :-1] - luma[:, 1:, :-1], luma[:, :-1, :-1] - luma[:, :-1, 1:]
    detail = torch.hypot(*steps).amax(0).sqrt()[None, None]  # so that a few strong edges are not worth a whole texture
    detail = functional.interpolate(detail, (height, width), mode="area")[0]
    found = []
    for top in (0, height // 2):
        for left in (0, width // 2):
            quarter = detail[:, top : top + height // 2, left : left + width // 2]
            held = functional.avg_pool2d(quarter, WINDOW_PX, WINDOW_STRIDE_PX)[0]
            y, x = (WINDOW_STRIDE_PX * at for at in divmod(int(held.argmax()), held.shape[1]))
            found.append((slice(top + y, top + y + WINDOW_PX), slice(left + x, left + x + WINDOW_PX)))
    return found


def corrected_focus(
    explained: Sequence[Explained], here: Tensor, told_dpt: Tensor, std_px: float, hold: float
) -> Tensor:
    """Every frame's focus, (S,), after a Gauss-Newton step of its own misfit.

    What a shift and stretch of all foci would explain as well is left alone: it belongs to the calibration.

    Args:
        explained: parts of one picture, all with the same lens.
        here: their `frame_misfits`.
        told_dpt: what was reported, (S,).
        std_px: its expected error, px of blur std.
        hold: weight of what was reported, in usual misfits.
    """
    focus, kappa = explained[0].misfit.focus_dpt, explained[0].misfit.kappa
    dpt_per_px = 4.0 / float(kappa.abs().mean())
    more, less = (frame_misfits(explained, focus + sign * PROBE_PX * dpt_per_px, kappa) for sign in (1, -1))
    so_far_px = (focus - told_dpt) / dpt_per_px
    by_px = _wanted(so_far_px, here, more, less, PROBE_PX, hold / std_px**2)
    by_px = so_far_px + (by_px - so_far_px).clamp(-LONGEST_PX, LONGEST_PX)
    line = torch.stack([torch.ones_like(focus), told_dpt], 1)
    return told_dpt + _beside(by_px, line) * dpt_per_px


def corrected_gain(explained: Sequence[Explained], here: Tensor, told: Tensor, std: float, hold: float) -> Tensor:
    """Every frame's blur gain, (S,) px/dioptre, as `corrected_focus`; a change of all gains is left alone.

    `std` is the expected relative error of a frame's gain.
    """
    focus, kappa = explained[0].misfit.focus_dpt, explained[0].misfit.kappa
    more, less = (frame_misfits(explained, focus, kappa * (1 + sign * std)) for sign in (1, -1))
    ratio = _wanted(kappa / told - 1, here, more, less, std, hold / std**2)
    return told * (1 + _beside(ratio, torch.ones_like(told)[:, None]))


@torch.no_grad()
def frame_misfits(explained: Sequence[Explained], focus_dpt: Tensor, kappa: Tensor) -> Tensor:
    """Mean misfit of every frame with these optics, (S,)."""
    left = [misfit.through(focus_dpt, kappa)(*rest).sum((1, 2, 3)) for misfit, *rest in explained]
    values = torch.stack([x.misfit.values for x in explained]).sum() / len(focus_dpt)
    return (torch.stack(left).sum(0) / values).clamp_min(LEAST_MISFIT)


def _wanted(so_far: Tensor, here: Tensor, more: Tensor, less: Tensor, probe: float, held: float) -> Tensor:
    """The change from what was reported that the misfits want; `held` times the misfit is its price per square."""
    curvature = ((more + less - 2 * here) / probe**2).clamp_min(0)
    wanted = curvature * so_far - (more - less) / (2 * probe)
    return wanted / (curvature + held * here)


def _beside(values: Tensor, known: Tensor) -> Tensor:
    """What of `values` (S,) no mixture of the columns of `known` (S, n) explains."""
    basis = torch.linalg.qr(known)[0]
    return values - basis @ (basis.T @ values)
