"""Small simulated stacks on disk: a textured slope behind a nearer square, seen through a known lens."""

from pathlib import Path

import cv2
import numpy as np

from capture.lens import Lens
from capture.optics import Condition, simulate_sweep
from capture.scenes import Scene
from capture.stack import write_stack

LENS = Lens(focal_length_m=0.05, f_number=2.8, pixel_pitch_m=6e-5)  # about 15 px of CoC per dioptre
FOCUS_DPT = (1.0, 0.8, 0.6, 0.4)


def small_scene(height=72, width=96, seed=0):
    rng = np.random.default_rng(seed)
    texture = rng.random((height, width, 3)).astype(np.float32)
    texture = 0.2 + 0.6 * cv2.GaussianBlur(texture, (0, 0), 0.7)
    inverse = np.tile(np.linspace(0.4, 0.7, width, dtype=np.float32), (height, 1))
    inverse[height // 3 : 2 * height // 3, width // 3 : 2 * width // 3] = 0.95
    return Scene(texture, 1 / inverse, "small")


def write_small_stack(
    path, *, scene=None, condition=None, lens=LENS, calibrated=True, seed=0, drift=None, **told
) -> Path:
    """`drift` is a factor of exposure per frame; `told` what `write_stack` shall store otherwise."""
    scene = scene or small_scene(seed=seed)
    sweep = simulate_sweep(scene, LENS, FOCUS_DPT, condition or Condition(noise_std=0.003), seed=seed, quality="fast")
    frames = sweep.frames
    if drift is not None:
        assert sweep.transfer == "linear"
        frames = frames * np.reshape(drift, (-1, 1, 1, 1)).astype(frames.dtype)
    distances = 1 / sweep.focus_dpt if calibrated else np.full(len(FOCUS_DPT), np.nan)
    told = {"focus_distance_m": distances} | told
    write_stack(
        path,
        frames,
        **told,
        lens=lens,
        transfer=sweep.transfer,
        truth_depth_m=scene.depth_m,
        truth_aif=scene.aif,
    )
    return Path(path)
