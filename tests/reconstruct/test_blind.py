"""Stacks that say nothing of depth are told from those that say little."""

import cv2
import numpy as np
import pytest
import torch

from capture.stack import FocalStack, write_stack
from reconstruct import blind, infer
from reconstruct.infer import Settings, reconstruct
from tests.reconstruct.small_stack import FOCUS_DPT, LENS, small_scene, write_small_stack

HEIGHT, WIDTH = 72, 96


def noisy(picture, std=3.0):
    """Four takes of one picture, uint8."""
    rng = np.random.default_rng(1)
    return np.clip(picture + std * rng.standard_normal((4, HEIGHT, WIDTH, 3)), 0, 255).astype(np.uint8)


def jpegs(frames):
    return np.stack([cv2.imdecode(cv2.imencode(".jpg", frame)[1], cv2.IMREAD_COLOR) for frame in frames])


TEXTURE = np.random.default_rng(0).uniform(20, 220, (HEIGHT, WIDTH, 3))
EMPTY = {
    "black": noisy(0, std=0),
    "saturated": noisy(255, std=0),
    "a wall": noisy(120),
    "a wall in JPEG": jpegs(noisy(120)),
    "a lens that never moved": noisy(TEXTURE),
    "one file copied": noisy(TEXTURE, std=0),
}


@pytest.mark.parametrize("method", ["network", "plane-sweep"])
@pytest.mark.parametrize("name", EMPTY)
def test_where_frames_say_nothing_depth_is_a_guess_and_said_to_be(tmp_path, name, method):
    distances = 1 / np.array(FOCUS_DPT)
    path = write_stack(tmp_path / "empty.h5", EMPTY[name], focus_distance_m=distances, lens=LENS, transfer="srgb")
    with FocalStack.open(path) as stack:
        answer = reconstruct(stack, Settings(method=method, device="cpu", compare=True))
    assert answer.record["warnings"] == [blind.WARNING]
    for one in filter(None, (answer, answer.baseline)):
        assert not one.confidence.any()
        assert one.std_dpt.min() >= 0.999 * np.ptp(FOCUS_DPT) / np.sqrt(12)


def test_one_small_textured_thing_before_a_noisy_wall_says_enough():
    frames = torch.from_numpy(noisy(120)).float().mean(-1) / 255
    assert not blind.says_depth(frames)
    thing = TEXTURE[:16, :16].mean(-1) / 255
    for frame, sigma in zip(frames, (0.3, 1.5, 3.0, 4.0), strict=True):
        frame[30:46, 50:66] = torch.from_numpy(cv2.GaussianBlur(thing, (0, 0), sigma))
    assert blind.says_depth(frames)


@pytest.mark.parametrize("max_coc_px", [40.0, 4.0])
def test_what_the_overview_is_too_small_for_is_looked_for_in_the_picture(tmp_path, monkeypatch, max_coc_px):
    path = write_small_stack(tmp_path / "fine.h5", scene=small_scene(144, 192))
    monkeypatch.setattr(infer, "OVERVIEW_PX", 8)
    monkeypatch.setattr(infer, "TILE_PX", 64)
    with FocalStack.open(path) as stack:
        overview = infer.read_overview(stack)
        assert not overview.says_depth(overview.exposure())
        answer = reconstruct(stack, Settings(method="plane-sweep", device="cpu", align=False, max_coc_px=max_coc_px))
    assert answer.record["warnings"] == []
    assert answer.confidence.mean() > 0.3
