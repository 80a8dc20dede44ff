"""Alignment: error and CPU time beside OpenCV's ECC and SIFT on simulated sweeps, and what real stacks give."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from skimage import data

from capture.alignment import align_stack
from capture.scenes import srgb_to_linear

STACKS = Path(__file__).parents[3] / "shared" / "data" / "stacks"
RESULTS = Path("bench-results") / "alignment.json"
N_FRAMES, HEIGHT, WIDTH = 9, 480, 720
UNIT = np.linspace(0, 1, N_FRAMES)


class Sweep(NamedTuple):
    """Frames of a far and a near textured plane, focused far to near, and their true motion from the image centre."""

    name: str
    frames: np.ndarray  # (S, H, W, 3) linear float32, after 8-bit sRGB
    scale: np.ndarray
    shift: np.ndarray  # complex


def sweeps() -> Iterator[Sweep]:
    """Two kinds of texture, both signs of breathing, none, a macro lens' 15 %, 1 to 3 % noise."""
    rng = np.random.default_rng(5)
    photographs = [srgb_to_linear(image.astype(np.float32) / 255) for image in (data.astronaut(), data.coffee())]
    textures = {"1/f noise": [_fractal(rng), _fractal(rng)], "photograph": photographs}
    conditions = [
        ("+6.6 %", 1 + 0.066 * UNIT, 16, 0.01),
        ("-3.6 %", 1 - 0.036 * UNIT, 10, 0.02),
        ("still", np.ones(N_FRAMES), 16, 0.01),
        ("noisy", 1 + 0.03 * UNIT, 12, 0.03),
        ("macro", 1 + 0.15 * UNIT, 30, 0.01),
    ]
    for texture, (far, near) in textures.items():
        for name, scale, blur_px, noise_std in conditions:
            shift = np.cumsum(rng.normal(scale=0.5, size=N_FRAMES) + 1j * rng.normal(scale=0.5, size=N_FRAMES))
            yield Sweep(f"{texture}, {name}", _render(far, near, scale, shift, blur_px, noise_std, rng), scale, shift)


def _fractal(rng: np.random.Generator) -> np.ndarray:
    shape = (2 * HEIGHT, 2 * WIDTH)
    frequency = np.hypot(np.fft.fftfreq(shape[0])[:, None], np.fft.fftfreq(shape[1]))
    frequency[0, 0] = 1
    texture = np.moveaxis(np.fft.ifft2(np.fft.fft2(rng.normal(size=(3, *shape))) / frequency).real, 0, -1)
    return np.clip(0.35 + 0.15 * (texture - texture.mean()) / texture.std(), 0.01, 1).astype(np.float32)


def _disc_blur(image: np.ndarray, diameter_px: float) -> np.ndarray:
    half = int(np.ceil(diameter_px / 2)) + 1
    y, x = np.mgrid[-half : half + 1, -half : half + 1]
    kernel = np.clip(diameter_px / 2 + 0.5 - np.hypot(x, y), 0, 1)
    return cv2.filter2D(image, -1, kernel / kernel.sum(), borderType=cv2.BORDER_REFLECT_101)


def _render(
    far: np.ndarray,
    near: np.ndarray,
    scale: np.ndarray,
    shift: np.ndarray,
    blur_px: float,
    noise_std: float,
    rng: np.random.Generator,
) -> np.ndarray:
    size = (2 * WIDTH, 2 * HEIGHT)
    far, near = (cv2.resize(layer, size, interpolation=cv2.INTER_CUBIC).clip(0, 1) for layer in (far, near))
    mask = np.zeros(size[::-1], np.float32)
    mask[HEIGHT // 2 : 3 * HEIGHT // 2, 2 * WIDTH // 3 : 3 * WIDTH // 2] = 1
    centre = np.array([WIDTH - 0.5, HEIGHT - 0.5])
    frames = []
    for u, s, t in zip(UNIT, scale, shift, strict=True):
        offset = centre * (1 - s) + 2 * np.array([t.real, t.imag])
        matrix = np.array([[s, 0, offset[0]], [0, s, offset[1]]])
        layers = [
            cv2.warpAffine(layer, matrix, size, flags=cv2.INTER_LANCZOS4, borderMode=cv2.BORDER_REFLECT_101)
            for layer in (far, near * mask[..., None], mask)
        ]
        back = _disc_blur(layers[0], 2 * blur_px * u)
        front, cover = (_disc_blur(layer, 2 * blur_px * (1 - u)) for layer in layers[1:])
        image = cv2.resize(back * (1 - cover[..., None]) + front, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA)
        image = image * (1 + 0.05 * rng.uniform(-1, 1)) + noise_std * rng.normal(size=image.shape)
        image = image.clip(0, 1)
        encoded = np.where(image <= 0.0031308, 12.92 * image, 1.055 * image ** (1 / 2.4) - 0.055)
        frames.append(srgb_to_linear((np.round(encoded * 255) / 255).astype(np.float32)))
    return np.stack(frames)


def ours(frames: np.ndarray) -> np.ndarray:
    """(S, 2, 3) matrices from the middle frame to every frame."""
    return align_stack(frames).matrices


def _chained(
    frames: np.ndarray, pair: Callable[[np.ndarray, np.ndarray], np.ndarray], gamma: float = 2.2
) -> np.ndarray:
    """Neighbour-to-neighbour (2, 3) matrices of `pair`, multiplied up from the middle frame."""
    middle = len(frames) // 2
    matrices = np.tile(np.eye(3), (len(frames), 1, 1))
    grey = [cv2.cvtColor(np.float32(frame) ** np.float32(1 / gamma), cv2.COLOR_RGB2GRAY) for frame in frames]
    for direction in (1, -1):
        i = middle
        while 0 <= i + direction < len(frames):
            matrices[i + direction] = np.vstack([pair(grey[i], grey[i + direction]), [0, 0, 1]]) @ matrices[i]
            i += direction
    return matrices[:, :2]


def ecc(frames: np.ndarray, gamma: float = 2.2) -> np.ndarray:
    """cv2.findTransformECC, affine, 13 px smoothing window, on stored values as focus-stacking programs use it."""

    def pair(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        criteria = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 100, 1e-6)
        start = np.eye(2, 3, dtype=np.float32)
        return cv2.findTransformECC(a, b, start, cv2.MOTION_AFFINE, criteria, None, 13)[1]

    return _chained(frames, pair, gamma)


def sift(frames: np.ndarray) -> np.ndarray:
    """SIFT matches, ratio test, RANSAC similarity."""
    detector = cv2.SIFT_create(3000)

    def pair(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        (points_a, words_a), (points_b, words_b) = (
            detector.detectAndCompute(np.uint8(image.clip(0, 1) * 255), None) for image in (a, b)
        )
        matches = [m for m, n in cv2.BFMatcher().knnMatch(words_a, words_b, k=2) if m.distance < 0.8 * n.distance]
        at_a = np.float32([points_a[m.queryIdx].pt for m in matches])
        at_b = np.float32([points_b[m.trainIdx].pt for m in matches])
        return cv2.estimateAffinePartial2D(at_a, at_b, ransacReprojThreshold=1.0)[0]

    return _chained(frames, pair)


def error_px(sweep: Sweep, matrices: np.ndarray) -> tuple[float, float]:
    """(median over frames of the rms over the image, worst corner) against the true motion."""
    middle = N_FRAMES // 2
    scale = sweep.scale / sweep.scale[middle]
    shift = sweep.shift - scale * sweep.shift[middle]
    y, x = np.mgrid[0 : HEIGHT - 1 : 21j, 0 : WIDTH - 1 : 21j]
    point = x - (WIDTH - 1) / 2 + 1j * (y - (HEIGHT - 1) / 2)
    rms, corner = [], []
    for i in np.flatnonzero(np.arange(N_FRAMES) != middle):
        moved = matrices[i] @ np.stack([x.ravel(), y.ravel(), np.ones(x.size)])
        found = (moved[0] - (WIDTH - 1) / 2 + 1j * (moved[1] - (HEIGHT - 1) / 2)).reshape(x.shape)
        off = np.abs(found - (scale[i] * point + shift[i]))
        rms.append(np.sqrt((off**2).mean()))
        corner.append(off.max())
    return float(np.median(rms)), float(np.max(corner))


def real_stacks() -> Iterator[dict]:
    """Scales, residuals and time of every stack in ../shared/data/stacks."""
    for listing in sorted(STACKS.glob("*/stack.json")):
        stack = json.loads(listing.read_text())
        images = [cv2.imread(str(listing.parent / frame["file"])) for frame in stack["frames"]]
        frames = np.stack([srgb_to_linear(image[..., ::-1].astype(np.float32) / 255) for image in images])
        start = time.process_time()
        alignment = align_stack(frames)
        seconds = time.process_time() - start
        listed = stack["magnification_vs_middle_frame"]
        yield {
            "stack": stack["name"],
            "near_over_far": alignment.scales[0] / alignment.scales[-1],
            "listed": listed["first"]["scale"] / listed["last"]["scale"],
            "residual_median_px": float(np.nanmedian(alignment.residual_px)),
            "residual_max_px": float(np.nanmax(alignment.residual_px)),
            "cpu_s": seconds,
        }


def main(argv: list[str]) -> None:
    """Print both tables and write them to bench-results/alignment.json."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # CPU seconds compare only on one thread
    methods = {"daif": ours, "ECC affine": ecc, "ECC, linear light": partial(ecc, gamma=1.0), "SIFT similarity": sift}
    simulated = []
    print(f"{N_FRAMES} frames {WIDTH}x{HEIGHT}, chained: median rms px / worst corner px / CPU s")
    print(f"{'':22s}" + "".join(f"{name:>24s}" for name in methods))
    for sweep in sweeps():
        cells = []
        for name, method in methods.items():
            start = time.process_time()
            try:
                rms, corner = error_px(sweep, method(sweep.frames))
            except (cv2.error, TypeError, ValueError):  # ECC diverged; SIFT found too few matches
                rms = corner = float("inf")
            seconds = time.process_time() - start
            simulated.append(
                {"sweep": sweep.name, "method": name, "rms_px": rms, "corner_px": corner, "cpu_s": seconds}
            )
            cells.append(f"{rms:9.3f} /{corner:6.2f} /{seconds:5.1f}")
        print(f"{sweep.name:22s}" + "".join(f"{cell:>24s}" for cell in cells), flush=True)
    print("\nreal stacks: near/far scale, the same by affine ECC (stack.json), residual px median / max, CPU s")
    real = []
    for row in real_stacks():
        real.append(row)
        print(
            f"{row['stack']:18s}{row['near_over_far']:8.4f}{row['listed']:8.4f}"
            f"{row['residual_median_px']:8.2f} /{row['residual_max_px']:5.2f}{row['cpu_s']:7.1f}",
            flush=True,
        )
    if not real:
        print("(../shared/data/stacks is not here)")
    cv2.setNumThreads(threads)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"simulated": simulated, "real": real}, indent=1))


if __name__ == "__main__":
    main([])
