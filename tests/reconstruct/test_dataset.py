"""Training stacks: drawn from the seed alone, physically plausible; captured ones aligned and without truth."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import threading
import time
from dataclasses import fields

import fsspec
import numpy as np
import pytest
import torch

from capture.errors import DataError, NoSpaceError
from capture.lens import Lens
from capture.stack import write_stack
from reconstruct import dataset
from reconstruct.dataset import (
    FAR_DPT,
    NEAR_DPT,
    SWEEP,
    ScenePool,
    SimulatedBatches,
    choose_frames,
    load_captured,
    procedural_training_scene,
    render_scene,
    training_stack,
)


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return ScenePool(tmp_path_factory.mktemp("pool"), 5, 64)


def test_scene_is_a_function_of_its_seed():
    one, two, other = (procedural_training_scene(seed, 48) for seed in ((1, 2), (1, 2), (1, 3)))
    assert np.array_equal(one.aif, two.aif)
    assert np.array_equal(one.depth_m, two.depth_m)
    assert not np.array_equal(one.aif, other.aif)


@pytest.mark.parametrize("seed", range(6))
def test_scene_is_plausible(seed):
    scene = procedural_training_scene((7, seed), 64)
    inverse = 1 / scene.depth_m
    assert np.isfinite(scene.aif).all()
    assert scene.aif.min() > 0
    assert scene.aif.max() <= 1
    assert inverse.min() > FAR_DPT - 0.13
    assert inverse.max() < NEAR_DPT + 0.13


def test_rendered_scene_is_sharp_where_it_is_in_focus():
    rendered = render_scene((11, 0), 64)
    assert rendered.frames.shape == (SWEEP, 64, 64, 3)
    assert np.isfinite(rendered.inverse_depth_dpt).all()
    repeated = render_scene((11, 0), 64)
    assert np.array_equal(rendered.frames, repeated.frames)


def test_a_crowded_scene_has_more_depth_edges():
    shares = np.zeros(2)
    for seed in range(8):
        for crowded in (False, True):
            scene = render_scene((12, seed), 48, crowded=crowded)
            blur_px = scene.inverse_depth_dpt * scene.kappa.mean() / 4
            shares[int(crowded)] += np.mean(np.abs(np.diff(blur_px, axis=1)) > 0.3)
            assert not crowded or scene.kappa.mean() > 10
    assert shares[1] > 1.8 * shares[0]


def test_pool_returns_the_same_from_disk(pool):
    fresh, stored = pool[0], pool[0]
    for field in fields(fresh):
        assert np.array_equal(getattr(fresh, field.name), getattr(stored, field.name))
    assert not list(pool.folder.glob("*.partial"))


@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_chosen_frames_are_distinct(count):
    for seed in range(40):
        chosen = choose_frames(np.random.default_rng(seed), count)
        assert len(set(chosen.tolist())) == count
        assert chosen.min() >= 0
        assert chosen.max() < SWEEP


def test_training_stack_keeps_truth_and_frames_together(pool):
    """The sharpest of the frames at a pixel is the one focused nearest to the pixel's true depth, mostly."""
    scene = pool[1]
    rng = np.random.default_rng(0)
    frames, focus, kappa, inverse, aif = training_stack(scene, rng, 5, 48)
    assert frames.shape == (5, 3, 48, 48)
    assert inverse.shape == (1, 48, 48)
    nearest = np.abs(kappa[:, None, None] * (focus[:, None, None] - inverse)).argmin(0)
    sharp = np.take_along_axis(frames, nearest[None, None], 0)[0]
    blurred = np.take_along_axis(frames, ((nearest + 2) % 5)[None, None], 0)[0]
    assert np.abs(sharp - aif).mean() < np.abs(blurred - aif).mean()


def test_batch_is_a_function_of_seed_and_step(pool):
    data = SimulatedBatches(pool, scenes=2, first=2, batch=2, crop=32)
    one, two, next_step = data.batch(3), data.batch(3), data.batch(4)
    assert torch.equal(one.frames, two.frames)
    assert one.frames.shape != next_step.frames.shape or not torch.equal(one.frames, next_step.frames)


def test_the_shares_of_a_batch_are_the_batch(pool):
    data = SimulatedBatches(pool, scenes=2, first=2, batch=3, crop=32)
    whole, shares = data.batch(3), [data.batch(3, part, 2) for part in range(2)]
    assert [len(share.frames) for share in shares] == [2, 1]
    for name in ("frames", "focus_dpt", "kappa", "inverse_depth_dpt", "aif"):
        joined = [getattr(shares[place % 2], name)[place // 2] for place in range(3)]
        assert torch.equal(torch.stack(joined), getattr(whole, name)), name


@pytest.fixture
def stack_file(tmp_path, pool):
    scene = pool[0]
    frames = np.square(scene.frames[::4].astype(np.float32) / 65535)
    lens = Lens(focal_length_m=0.05, f_number=2.0, pixel_pitch_m=1e-4)
    path = tmp_path / "s.h5"
    write_stack(path, frames, focus_distance_m=1 / scene.focus_dpt[::4], lens=lens, transfer="linear")
    return path


def test_prepared_stacks_are_shared_and_not_prepared_twice(stack_file, tmp_path, monkeypatch):
    """Two processes, one after the other: each prepares its share and finds the other's."""
    other = stack_file.with_name("t.h5")
    other.write_bytes(stack_file.read_bytes())
    prepared = []

    def load(path, profile):
        prepared.append(path.stem)
        return load_captured(path, profile)

    monkeypatch.setattr(dataset, "load_captured", load)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    second = threading.Thread(target=dataset.prepare_captured, args=([stack_file, other], None, tmp_path / "kept"))
    second.start()
    while prepared != ["t"]:
        time.sleep(0.01)
    monkeypatch.setenv("RANK", "0")
    found = dataset.prepare_captured([stack_file, other], None, tmp_path / "kept")
    second.join()
    assert prepared == ["t", "s"]
    for stack, path in zip(found, (stack_file, other), strict=True):
        loaded = load_captured(path)
        assert stack.name == loaded.name
        assert all(
            torch.equal(getattr(stack, n), getattr(loaded, n)) for n in ("frames", "valid", "focus_dpt", "kappa")
        )
    killed = tmp_path / "kept" / f".t-0.partial-{platform.node()}-{2**22 + 1}"  # no process has such a number
    killed.mkdir()
    os.utime(other, (1, 1))  # changed since
    monkeypatch.setenv("WORLD_SIZE", "1")
    dataset.prepare_captured([stack_file, other], None, tmp_path / "kept")
    assert prepared == ["t", "s", "t"]
    assert not killed.exists()


def test_stacks_by_url_are_prepared_like_files(stack_file, tmp_path):
    fsspec.filesystem("memory").pipe("/training/s.h5", stack_file.read_bytes())
    (here,), (there,) = (
        dataset.prepare_captured([location], None, tmp_path / "kept")
        for location in (stack_file, "memory://training/s.h5")
    )
    assert here.name == there.name
    assert torch.equal(here.frames, there.frames)


def test_captured_stack_without_a_frame(stack_file):
    stack = load_captured(stack_file)
    less = stack.without(1)
    assert len(less.frames) == len(stack.frames) - 1 == len(less.kappa) == len(less.valid)
    assert torch.equal(less.frames[1], stack.frames[2])
    assert less.metric


def test_what_is_damaged_in_a_run_is_named_and_made_anew_once_deleted(tmp_path, stack_file, pool):
    dataset.prepare_captured([stack_file], None, tmp_path / "kept")
    (prepared,) = (tmp_path / "kept").iterdir()
    frames = prepared / "frames.npy"
    frames.write_bytes(frames.read_bytes()[:-100])
    with pytest.raises(DataError, match=f"{prepared.name}: damaged .*delete it"):
        dataset.prepare_captured([stack_file], None, tmp_path / "kept")
    shutil.rmtree(prepared)
    dataset.prepare_captured([stack_file], None, tmp_path / "kept")
    scene = pool[0]
    pool.path(0).write_bytes(pool.path(0).read_bytes()[:-100])
    with pytest.raises(DataError, match=r"000000\.npz: damaged .*delete it"):
        pool[0]
    pool.path(0).unlink()
    assert np.array_equal(pool[0].frames, scene.frames)


def test_too_little_room_to_keep_a_stack_is_one_sentence(tmp_path, stack_file):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(NoSpaceError, match=r"has no room for .*, prepared"):
            dataset.prepare_captured([stack_file], None, tmp_path / "kept")
        with pytest.raises(NoSpaceError, match="has no room for"):
            dataset.kept(torch.zeros(100_000), tmp_path / "kept")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "kept").iterdir())


def test_stack_that_is_too_small_to_train_on_is_named(tmp_path):
    lens = Lens(focal_length_m=0.05, f_number=2.0, pixel_pitch_m=3e-6)  # a slip: the blur spans hundreds of pixels
    frames = np.random.default_rng(0).random((3, 64, 80, 3)).astype(np.float32)
    write_stack(tmp_path / "s.h5", frames, focus_distance_m=[1.0, 1.5, 2.0], lens=lens, transfer="linear")
    with pytest.raises(DataError, match=r"s\.h5: 80 x 64 px, trained on at .*check pixel_pitch_m"):
        load_captured(tmp_path / "s.h5")
