"""Where the lens was focused in every frame, found from the frames themselves.

The distance that a camera reports is rounded and often wrong by some percent, and an uncalibrated sweep reports none:
its settings are taken for evenly spaced. Depth then suffers, for frames contradict each other. But depth is one number
a pixel and every frame has a say in it, so the frames tell how far each of them is off: `fitted_focus` sweeps planes,
fits the all-in-focus image to their depth, corrects each frame's focus by what its own misfit says, and sweeps again.

A shift and stretch of all settings together moves depth along and explains the frames as well (shared/design.md
section 2). No stack tells it, so it stays as it was reported.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        misfits = _misfits(explained, tried, kappa)
        left = float(misfits.log().mean().exp())
        if not left < (1 - WORTH) * lowest:
            break
        lowest, best, odd = left, tried, bool(misfits.max() > UNEXPLAINED * misfits.median())
        tried, _ = corrected_lens(explained, focus_dpt, kappa, focus_std_px=FOCUS_STD_PX, gain_std=0.0)
        if float((tried - best).abs().max()) * dpt_to_px < SETTLED_PX:
            break
    return focus_dpt if odd else best


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


@torch.no_grad()
def corrected_lens(
    explained: Sequence[Explained],
    told_focus_dpt: Tensor,
    told_kappa: Tensor,
    *,
    focus_std_px: float,
    gain_std: float,
    hold: float = HOLD,
) -> tuple[Tensor, Tensor]:
    """Every frame's focus and blur gain after a Gauss-Newton step of its own misfit.

    What a shift and stretch of all foci, or a change of all gains, would explain as well is left alone: it belongs to
    the calibration.

    Args:
        explained: parts of one picture, all with the same lens.
        told_focus_dpt, told_kappa: what was reported, (S,).
        focus_std_px: expected error of a reported focus, px of blur std.
        gain_std: expected relative error of a frame's blur gain; 0 leaves the gains alone.
        hold: weight of what was reported, in usual misfits.
    """
    focus, gain = explained[0].misfit.focus_dpt, explained[0].misfit.kappa
    dpt_per_px = 4.0 / float(gain.abs().mean())
    here = _misfits(explained, focus, gain)

    def corrected(so_far: Tensor, more: Tensor, less: Tensor, probe: float, std: float) -> Tensor:
        curvature = ((more + less - 2 * here) / probe**2).clamp_min(0)
        wanted = curvature * so_far - (more - less) / (2 * probe)
        return wanted / (curvature + hold * here / std**2)

    more, less = (_misfits(explained, focus + sign * PROBE_PX * dpt_per_px, gain) for sign in (1, -1))
    so_far = (focus - told_focus_dpt) / dpt_per_px
    by_px = corrected(so_far, more, less, PROBE_PX, focus_std_px)
    by_px = so_far + (by_px - so_far).clamp(-LONGEST_PX, LONGEST_PX)
    alike = torch.ones_like(focus)
    line = torch.stack([alike, told_focus_dpt], 1)
    fitted = told_focus_dpt + _beside(by_px, line) * dpt_per_px
    if gain_std == 0:
        return fitted, gain
    more, less = (_misfits(explained, focus, gain * (1 + sign * gain_std)) for sign in (1, -1))
    ratio = corrected(gain / told_kappa - 1, more, less, gain_std, gain_std)
    return fitted, told_kappa * (1 + _beside(ratio, alike[:, None]))


@torch.no_grad()
def _misfits(explained: Sequence[Explained], focus_dpt: Tensor, kappa: Tensor) -> Tensor:
    """Mean misfit of every frame with these optics, (S,)."""
    left = [misfit.through(focus_dpt, kappa)(*rest).sum((1, 2, 3)) for misfit, *rest in explained]
    values = torch.stack([x.misfit.values for x in explained]).sum() / len(focus_dpt)
    return (torch.stack(left).sum(0) / values).clamp_min(LEAST_MISFIT)


def _beside(values: Tensor, known: Tensor) -> Tensor:
    """What of `values` (S,) no mixture of the columns of `known` (S, n) explains."""
    basis = torch.linalg.qr(known)[0]
    return values - basis @ (basis.T @ values)
