"""Speed, memory and accuracy of the renderer, forward + backward, against the same thing written plainly.

    python -m tests.benchmarks renderer                                  (half an hour of one core)
    python -m tests.benchmarks.bench_renderer --sigmas 3                 (one blur only)

Process CPU time of one thread, medians, both sides in the same process and interleaved. Blur is given as the largest
standard deviation of the Gaussian in px. Goes to bench-results/renderer.json.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from reconstruct.render import LEAST_WEIGHT, Model, render_stack
from reconstruct.spectrum import PsfShape
from tests.reconstruct import render_reference

FRAMES = 5
GAIN = 0.25


def picture(height: int, width: int) -> Tensor:
    """A smooth picture with edges and fine texture, (1, 3, H, W)."""
    rng = torch.Generator().manual_seed(0)
    image = torch.zeros(1, 3, height, width)
    for cells in (4, 16, 64):
        size = (max(2, height // cells), max(2, width // cells))
        noise = torch.rand(1, 3, *size, generator=rng)
        image += functional.interpolate(noise, (height, width), mode="bilinear", align_corners=False).div_(3)
    return image


def scene(height: int, width: int, sigma_px: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """aif, inverse depth (a slanted wall and two boxes), focus and kappa; blur std up to `sigma_px`."""
    x = torch.linspace(0, 1, width).expand(height, width)
    depth = 0.4 + 0.4 * x.clone()
    depth[height // 4 : height // 2, width // 4 : width // 2] = 1.0
    depth[height // 2 : 3 * height // 4, width // 2 : 5 * width // 6] = 1.2
    focus = torch.linspace(0.4, 1.2, FRAMES)
    kappa = torch.full((FRAMES,), sigma_px / GAIN / 0.8)
    return picture(height, width), depth[None, None], focus[None], kappa[None]


def both_ways(render: Callable[[Tensor, Tensor], Tensor], aif: Tensor, depth: Tensor) -> float:
    """CPU seconds of one forward and backward pass to image and depth."""
    aif, depth = aif.clone().requires_grad_(), depth.clone().requires_grad_()
    start = time.process_time()
    out = render(aif, depth)
    out.backward(torch.ones_like(out))
    return time.process_time() - start


def medians(repeats: int, *jobs: Callable[[], float]) -> list[float]:
    """Median of each job's times, the jobs taking turns."""
    times: list[list[float]] = [[] for _ in jobs]
    for turn in range(repeats + 1):
        for job, record in zip(jobs, times, strict=True):
            seconds = job()
            if turn:
                record.append(seconds)
    return [statistics.median(record) for record in times]


# --- the same, written plainly ---------------------------------------------------------------------------------------


def _blur(image: Tensor, sigma: float) -> Tensor:
    """Sampled Gaussian cut at 3 sigma, two grouped convolutions; image (C, H, W)."""
    radius = max(1, math.ceil(3 * sigma))
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / max(sigma, 1e-3)) ** 2)
    taps = (taps / taps.sum())[None, None]
    down = functional.conv2d(image[:, None], taps[..., None], padding=(radius, 0))
    return functional.conv2d(down, taps[:, :, None], padding=(0, radius))[:, 0]


def plain_layers(aif: Tensor, depth: Tensor, focus: Tensor, kappa: Tensor, layers: int, occlusion: bool) -> Tensor:
    """Scatter or occlusion by autograd, layer by layer, (S, 3, H, W); `layers` span the depths."""
    planes = torch.linspace(float(depth.detach().max()), float(depth.detach().min()), layers)
    step = float(planes[0] - planes[1])
    weights = (1 - (depth - planes[:, None, None]).abs() / step).clamp_min(0)
    behind = weights.flip(0).cumsum(0).flip(0)
    frames = []
    for q, gain in zip(focus, kappa, strict=True):
        light, norm, opening = torch.zeros_like(aif), torch.zeros_like(depth), torch.ones_like(depth)
        for plane, weight, rest in zip(planes, weights, behind, strict=True):
            sigma = math.hypot(GAIN * float(gain * (q - plane)), 0.3)
            if not occlusion:
                spread = _blur(torch.cat([aif * weight, weight[None]]), sigma)
                light, norm = light + spread[:3], norm + spread[3]
                continue
            spread = _blur(torch.cat([aif * weight, weight[None], rest[None]]), sigma)
            share = opening / spread[4].clamp_min(LEAST_WEIGHT)
            light, norm = light + share * spread[:3], norm + share * spread[3]
            opening = opening - share * spread[3]
        frames.append(light / norm)
    return torch.stack(frames)


class PlainGather(torch.autograd.Function):
    """Exact per-pixel Gaussian gather by shifted adds, recomputed on the way back; `share` of the taps only."""

    @staticmethod
    def forward(ctx: Any, aif: Tensor, sigma: Tensor, share: float) -> Tensor:
        radius = math.ceil(3 * float(sigma.max()))
        shifts = [(y, x) for y in range(-radius, radius + 1) for x in range(-radius, radius + 1)]
        ctx.shifts, ctx.radius = shifts[: max(1, int(share * len(shifts)))], radius
        padded = functional.pad(aif, (radius,) * 4)
        inside = functional.pad(torch.ones_like(aif[:1]), (radius,) * 4)
        total, norm = torch.zeros(sigma.shape[0], *aif.shape), torch.zeros_like(sigma)
        rate = -0.5 / sigma.square()
        for y, x in ctx.shifts:
            weight = torch.exp(rate * (y * y + x * x))
            window = (..., slice(radius + y, radius + y + aif.shape[1]), slice(radius + x, radius + x + aif.shape[2]))
            total.addcmul_(weight[:, None], padded[window])
            norm.addcmul_(weight, inside[window])
        ctx.save_for_backward(aif, sigma, total / norm[:, None], norm)
        return total / norm[:, None]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        aif, sigma, out, norm = ctx.saved_tensors
        radius = ctx.radius
        padded, back = functional.pad(aif, (radius,) * 4), functional.pad(torch.zeros_like(aif), (radius,) * 4)
        grad = grad / norm[:, None]
        mean = (grad * out).sum(1)
        grad_sigma, rate = torch.zeros_like(sigma), -0.5 / sigma.square()
        for y, x in ctx.shifts:
            weight = torch.exp(rate * (y * y + x * x))
            window = (..., slice(radius + y, radius + y + aif.shape[1]), slice(radius + x, radius + x + aif.shape[2]))
            back[window] += (weight[:, None] * grad).sum(0)
            grad_sigma.add_(((grad * padded[window]).sum(1) - mean) * weight, alpha=float(y * y + x * x))
        inner = slice(radius, -radius)
        return back[:, inner, inner], grad_sigma / sigma**3, None


# --- the table ------------------------------------------------------------------------------------------------------


def against_plain(model: Model, repeats: int) -> tuple[float, float]:
    """CPU seconds (ours, plain) at 240 x 320 x 5 with 12 layers and blur up to 6 px."""
    aif, depth, focus, kappa = scene(240, 320, 6.0)
    span = float(depth.max() - depth.min())
    # our layers lie at multiples of a step: 12 of them from the step that puts 12 on this range
    step_px = span / 10.5 * float(kappa[0, 0])

    def ours(a: Tensor, d: Tensor) -> Tensor:
        return render_stack(a, d, focus, kappa, model=model, psf="gaussian", gaussian_gain=GAIN, layer_step_px=step_px)

    def plain(a: Tensor, d: Tensor) -> Tensor:
        return plain_layers(a[0], d[0, 0], focus[0], kappa[0], 12, model == "occlusion")

    fast, slow = medians(repeats, lambda: both_ways(ours, aif, depth), lambda: both_ways(plain, aif, depth))
    return fast, slow


def gather_against_plain(sigma_px: float, share: float, repeats: int) -> tuple[float, float]:
    """CPU seconds (ours, exact) at 256 x 256 x 5; the peer runs `share` of its taps and is scaled up."""
    aif, depth, focus, kappa = scene(256, 256, sigma_px)

    def ours(a: Tensor, d: Tensor) -> Tensor:
        return render_stack(a, d, focus, kappa, model="gather", gaussian_gain=GAIN)

    def plain(a: Tensor, d: Tensor) -> Tensor:
        coc = kappa[0, :, None, None] * (focus[0, :, None, None] - d[0])
        return PlainGather.apply(a[0], ((GAIN * coc).square() + 0.09).sqrt(), share)

    fast, slow = medians(repeats, lambda: both_ways(ours, aif, depth), lambda: both_ways(plain, aif, depth))
    return fast, slow / share


def gather_accuracy() -> tuple[float, float, float]:
    """Mean error, 99.9 % error and cosine of the sigma gradient against the exact gather in float64; sigma to 8 px."""
    aif, depth, focus, kappa = (t.double() for t in scene(96, 128, 8.0))
    coc = (kappa[0, :, None, None] * (focus[0, :, None, None] - depth[0]))[::2]
    sigma = ((GAIN * coc).square() + 0.09).sqrt()
    free = depth.clone().requires_grad_()
    found = render_stack(aif, free, focus[:, ::2], kappa[:, ::2], model="gather", gaussian_gain=GAIN)[0]
    (slope,) = torch.autograd.grad(found[-1].sum(), free)
    error = torch.cat(
        [(f - render_reference.gather(aif[0], s**2)).abs().flatten() for f, s in zip(found, sigma, strict=True)]
    )
    small = 1e-4

    def last(shift: float) -> Tensor:
        moved = kappa[0, -1] * (focus[0, -1] - depth[0, 0] - shift)
        return render_reference.gather(aif[0], (GAIN * moved).square() + 0.09).sum(0)

    wanted = (last(small) - last(-small)) / (2 * small)
    cosine = torch.cosine_similarity(slope.flatten(), wanted.flatten(), dim=0)
    error = error.detach()
    return float(error.mean()), float(error.quantile(0.999)), float(cosine)


def alone(model: str, psf: str, height: int, width: int, sigma_px: float) -> dict[str, float]:
    """CPU seconds and peak memory (bytes) of one size, in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_renderer", "--alone", model, psf]
    command += [str(height), str(width), str(sigma_px)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def run_alone(model: Model, psf: PsfShape, height: int, width: int, sigma_px: float) -> dict[str, float]:
    aif, depth, focus, kappa = scene(height, width, sigma_px)
    bare = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def ours(a: Tensor, d: Tensor) -> Tensor:
        return render_stack(a, d, focus, kappa, model=model, psf=psf, gaussian_gain=GAIN)

    (seconds,) = medians(1 if height > 1000 else 3, lambda: both_ways(ours, aif, depth))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "peak_bytes": peak * 1024, "bare_bytes": bare * 1024}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--alone", nargs=5, metavar=("MODEL", "PSF", "H", "W", "SIGMA"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sigmas", type=float, nargs="*", default=[3.0, 8.0, 20.0])
    parser.add_argument("--output", type=Path, default=Path("bench-results/renderer.json"))
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if options.alone:
        model, psf, height, width, sigma = options.alone
        print(json.dumps(run_alone(model, psf, int(height), int(width), float(sigma))))
        return
    goals: list[tuple[str, float, float, bool]] = []  # name, goal, figure, more is better

    def goal(name: str, limit: float, figure: float, more: bool) -> None:
        goals.append((name, limit, figure, more))
        met = figure >= limit if more else figure <= limit
        print(
            f"{name:62s} {'>=' if more else '<='} {limit:<8g} {figure:<10.4g} {'met' if met else 'MISSED'}", flush=True
        )

    for model in ("scatter", "occlusion"):
        fast, slow = against_plain(model, options.repeats)
        goal(f"{model}, 240x320x5, 12 layers: {slow:.2f} s plain / {fast:.3f} s", 4, slow / fast, True)
    mean, most, cosine = gather_accuracy()
    goal("gather: mean error", 1e-4, mean, False)
    goal("gather: 99.9 % error", 2e-3, most, False)
    goal("gather: cosine of the sigma gradient", 0.999, cosine, True)
    for sigma, limit, share in ((3.0, 25, 1.0), (8.0, 120, 0.15)):
        fast, slow = gather_against_plain(sigma, share, options.repeats)
        goal(f"gather, 256x256x5, sigma {sigma:g}: {slow:.2f} s exact / {fast:.3f} s", limit, slow / fast, True)
    table: list[dict[str, Any]] = []
    models = [("scatter", "gaussian"), ("scatter", "disc"), ("occlusion", "disc"), ("gather", "gaussian")]
    for model, psf in [*models, ("published", "gaussian")]:
        for sigma in options.sigmas if model != "published" else options.sigmas[:1]:  # its window is fixed
            sizes = {}
            for height, width in ((256, 256), (512, 512), (1080, 1920)):
                sizes[height] = alone(model, psf, height, width, sigma)
                table.append({"model": model, "psf": psf, "size": [height, width], "sigma_px": sigma} | sizes[height])
            ratio = sizes[1080]["seconds"] / sizes[512]["seconds"]
            seconds = " / ".join(f"{sizes[height]['seconds']:.2f}" for height in (256, 512, 1080))
            goal(f"{model} {psf} sigma {sigma:g}: {seconds} s; time(1080p)/time(512)", 8.5, ratio, False)
            goal(f"{model} {psf} sigma {sigma:g}: peak at 1080p, GB", 1.0, sizes[1080]["peak_bytes"] / 1e9, False)
    options.output.parent.mkdir(exist_ok=True)
    names = ("name", "goal", "figure", "more_is_better")
    options.output.write_text(
        json.dumps({"goals": [dict(zip(names, g, strict=True)) for g in goals], "sizes": table}, indent=1)
    )


if __name__ == "__main__":
    main(sys.argv[1:])
