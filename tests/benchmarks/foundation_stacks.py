"""Focal stacks of the 15 RGB-D scenes under every optics and condition of the foundation table, rendered once.

Rendering samples the aperture (`capture/optics.py`), which the plane sweep knows nothing of. Noiseless frames are
kept in the temporary directory under a name made of what they depend on; noise is added when a stack is asked for.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import capture.optics
import capture.scenes
from capture.alignment import align_stack
from capture.lens import Lens
from capture.optics import (
    CONDITIONS,
    NOTES_FOCUS_M,
    NOTES_LENS,
    ApertureRenderer,
    Condition,
    breathing_magnification,
    expose,
    sweep_for_scene,
)
from capture.scenes import Scene, load_scene, srgb_to_linear

ROOT = Path(__file__).parents[2]
RGBD = Path(os.environ.get("DAIF_DATA", ROOT.parent / "shared" / "data")) / "rgbd"
OPTICS = ("dslr", "notes")
DSLR_MAX_COC_PX = 24.0  # blur standard deviation up to 6 px, as in notes/performance.md 3.2
STACK_CONDITIONS = {**CONDITIONS, "disc_noisy": Condition(noise_std=0.01, bits=8)}


@dataclass(frozen=True)
class FoundationStack:
    """A focal stack with its truth.

    Attributes:
        frames: (S, H, W, 3) linear float32, aligned.
        valid: (S, H, W) bool, False where alignment has no data.
        focus_dpt, kappa: (S,) as the camera reports them.
        scene: the truth.
    """

    frames: NDArray[np.float32]
    valid: NDArray[np.bool_]
    focus_dpt: NDArray[np.float64]
    kappa: NDArray[np.float64]
    scene: Scene

    def window(self, top: int, left: int, height: int, width: int) -> FoundationStack:
        """The same window of every frame and of the truth."""
        rows, cols = slice(top, top + height), slice(left, left + width)
        scene = Scene(self.scene.aif[rows, cols], self.scene.depth_m[rows, cols], self.scene.name)
        return replace(self, frames=self.frames[:, rows, cols], valid=self.valid[:, rows, cols], scene=scene)

    def middle(self, height: int, width: int) -> FoundationStack:
        """The window of this size in the middle of every frame."""
        return self.window((self.scene.height - height) // 2, (self.scene.width - width) // 2, height, width)


def scene_names() -> list[str]:
    return sorted(folder.name for folder in RGBD.iterdir() if (folder / "depth.png").is_file())


def half_size_scene(name: str) -> Scene:
    scene = load_scene(RGBD / name)
    return scene.resized(scene.height // 2, scene.width // 2)


def optics_for(scene: Scene, optics: str) -> tuple[Lens, NDArray[np.float64]]:
    """Lens and focus settings (1/m) called `optics`: the notes' fixed sweep, or a DSLR's fitted to the scene."""
    if optics == "notes":
        return NOTES_LENS, 1.0 / np.array(NOTES_FOCUS_M)
    return sweep_for_scene(scene, 5, DSLR_MAX_COC_PX)


def rendered(scene: Scene, lens: Lens, focus_dpt: NDArray[np.float64], condition: Condition) -> NDArray[np.float32]:
    """Noiseless frames (S, H, W, 3), from the cache if they were rendered before by the same code."""
    code = b"".join(Path(module.__file__ or "").read_bytes() for module in (capture.optics, capture.scenes))
    optical = replace(condition, noise_std=0.0, bits=None)
    key = hashlib.sha256(repr((scene.name, scene.aif.shape, lens, focus_dpt.tolist(), optical)).encode() + code)
    path = Path(tempfile.gettempdir()) / "daif-foundation" / f"{scene.name}-{key.hexdigest()[:16]}.npy"
    if not path.exists():
        rng = np.random.default_rng(0)
        true = focus_dpt / (1 + condition.focus_error * rng.standard_normal(focus_dpt.shape))
        magnification = breathing_magnification(true, condition.breathing)
        gain = np.asarray(lens.kappa_px_per_dpt(true))
        renderer = ApertureRenderer(scene, float(gain.max()))
        frames = [
            renderer.frame(float(q), float(k), psf=condition.psf, magnification=float(m))
            for q, k, m in zip(true, gain, magnification, strict=True)
        ]
        path.parent.mkdir(exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.npy")
        np.save(partial, np.stack(frames))
        partial.replace(path)
    return np.load(path)


def foundation_stack(scene: Scene, optics: str, condition_name: str) -> FoundationStack:
    """The stack of `scene` through the optics called `optics`; see `stack_through`."""
    return stack_through(scene, *optics_for(scene, optics), condition_name)


def stack_through(scene: Scene, lens: Lens, focus_dpt: NDArray[np.float64], condition_name: str) -> FoundationStack:
    """The stack of `scene` through `lens` under a condition of `STACK_CONDITIONS`; aligned where it breathes."""
    condition = STACK_CONDITIONS[condition_name]
    clean = rendered(scene, lens, focus_dpt, condition)
    rng = np.random.default_rng(1)
    coded = np.stack([expose(frame, rng, condition.noise_std, condition.bits) for frame in clean])
    frames = srgb_to_linear(coded / np.float32(np.iinfo(coded.dtype).max))
    valid = np.ones(frames.shape[:3], bool)
    if condition.breathing:
        alignment = align_stack(frames, focus_dpt)
        frames = np.stack([alignment.apply(frame, i) for i, frame in enumerate(frames)])
        valid = np.broadcast_to(alignment.valid_mask(), valid.shape)
    kappa = np.asarray(lens.kappa_px_per_dpt(focus_dpt))
    return FoundationStack(frames, valid, focus_dpt, kappa, scene)


def main(optics: tuple[str, ...] = OPTICS) -> None:
    """Renders every stack, so that the table's own time is the methods' time."""
    for name in scene_names():
        scene = half_size_scene(name)
        for kind in optics:
            for condition in ("noisy", "disc", "mismatched"):
                rendered(scene, *optics_for(scene, kind), STACK_CONDITIONS[condition])
        print(name, flush=True)


if __name__ == "__main__":
    main()
