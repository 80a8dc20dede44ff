"""Scenes taken again: as they are, at other depths, and mixed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from capture.optics import BLACK, Condition, simulate_sweep, sweep_for_scene
from capture.scenes import procedural_scene
from reconstruct.dataset import CapturedStack
from reconstruct.estimate import Estimate
from reconstruct.plane_sweep import plane_sweep
from reconstruct.retake import altered, mixed, part_of, taken_again, within_sweep


@pytest.fixture(scope="module")
def taken():
    """Noisy and noiseless sweep of one scene, and the truth."""
    scene = procedural_scene(3, 72, 96)
    stacks = []
    for noise_std in (0.02, 0.0):
        camera = Condition(psf="gaussian", noise_std=noise_std, bits=16)
        sweep = simulate_sweep(scene, *sweep_for_scene(scene, 5, 12.0), camera)
        frames = torch.from_numpy(np.ascontiguousarray(sweep.linear().transpose(0, 3, 1, 2)))
        focus, kappa = (torch.tensor(x, dtype=torch.float32) for x in (sweep.focus_dpt, sweep.kappa_px_per_dpt))
        stacks.append(CapturedStack("scene", frames, torch.ones(5, 72, 96, dtype=torch.bool), focus, kappa, True))
    depth, image = torch.from_numpy(1 / scene.depth_m), torch.from_numpy(scene.aif.transpose(2, 0, 1).copy())
    return *stacks, Estimate(depth, torch.zeros(72, 96), torch.ones(72, 96), image)


def again(stack, seen):
    return taken_again(stack, within_sweep(seen, stack), "gaussian", np.random.default_rng(1))


def test_a_scene_taken_again_looks_the_same(taken):
    """From the truth: the same light, and as much noise."""
    noisy, quiet, truth = taken
    assert torch.allclose(within_sweep(truth, quiet).inverse_depth_dpt, truth.inverse_depth_dpt, atol=1e-4)
    assert (again(quiet, truth).frames - quiet.frames).abs().mean() < 0.1 * quiet.frames.std()
    difference = (again(noisy, truth).frames - noisy.frames) / (noisy.frames.clamp_min(0) + BLACK).sqrt()
    usual = float(difference.abs().median()) / 0.6745 / 2**0.5  # each of the two has its own noise
    assert usual == pytest.approx(0.02, rel=0.25)


def test_a_scene_may_be_altered_and_its_frames_follow(taken):
    _, quiet, truth = taken
    seen = altered(truth, quiet, np.random.default_rng(1))
    assert ((seen.inverse_depth_dpt - truth.inverse_depth_dpt).abs() * quiet.kappa.mean()).max() > 0.5
    retake = again(quiet, seen)
    found = plane_sweep(retake.frames, retake.focus_dpt, retake.kappa)
    off_seen, off_truth = ((found.inverse_depth_dpt - x.inverse_depth_dpt).abs().mean() for x in (seen, truth))
    assert off_seen < 0.75 * off_truth, (off_seen, off_truth)
    steps = seen.inverse_depth_dpt.diff() / truth.inverse_depth_dpt.diff()
    steps = steps[truth.inverse_depth_dpt.diff().abs() > 1e-3]
    assert steps.std() < 1e-2  # all differences change alike
    assert 0.8 <= steps.mean() <= 1.2


def test_no_depth_is_left_that_no_frame_comes_near(taken):
    _, quiet, truth = taken
    far = truth._replace(inverse_depth_dpt=truth.inverse_depth_dpt * 9 - 4)
    out_px = (within_sweep(far, quiet).inverse_depth_dpt - quiet.focus_dpt[:, None, None]).abs().amin(0) * 12
    assert float(out_px.max()) < 1.5 * 12 / float(quiet.kappa.mean()) + 12 * float(quiet.focus_dpt.diff().abs().max())


def test_an_uncalibrated_scene_is_taken_again(taken):
    """Its foci are anywhere, below zero too; only differences blur."""
    _, quiet, truth = taken
    relative = replace(quiet, focus_dpt=quiet.focus_dpt - 9.0, metric=False)
    shifted = truth._replace(inverse_depth_dpt=truth.inverse_depth_dpt - 9.0)
    assert torch.allclose(again(relative, shifted).frames, again(quiet, truth).frames, atol=1e-3)


@pytest.fixture(scope="module")
def other():
    """Another scene as it would be seen, of another size."""
    scene = procedural_scene(8, 60, 112)
    depth, image = torch.from_numpy(1 / scene.depth_m), torch.from_numpy(scene.aif.transpose(2, 0, 1).copy())
    return Estimate(depth, torch.zeros(60, 112), torch.ones(60, 112), image)


def test_parts_of_another_scene_come_before(taken, other):
    """Nearer than what they cover and with their own texture; all else stays; now and then hardly anything fits."""
    _, stack, seen = taken
    shares = []
    for seed in range(12):
        mixture = mixed(seen, stack, other, 1.0, np.random.default_rng(seed))
        nearer = mixture.inverse_depth_dpt > seen.inverse_depth_dpt
        covered = (mixture.aif != seen.aif).any(0)
        assert torch.equal(mixture.inverse_depth_dpt[~nearer], seen.inverse_depth_dpt[~nearer])
        assert not (covered & ~nearer).any()
        shown = mixture.aif[:, nearer]
        assert (shown >= other.aif.amin((1, 2))[:, None] - 1e-5).all()
        assert (shown <= other.aif.amax((1, 2))[:, None] + 1e-5).all()
        shares.append(float(nearer.float().mean()))
    assert np.mean(shares) > 0.1
    assert max(shares) < 0.9
    assert len(set(shares)) == len(shares)


def test_parts_keep_their_blur(taken, other):
    """Where the other stack's dioptre blurs twice as much, their relief is twice as many dioptres here."""
    _, stack, seen = taken
    far = seen._replace(inverse_depth_dpt=torch.full_like(seen.inverse_depth_dpt, -99.0))  # any part is nearer
    reliefs = []
    for ratio in (1.0, 2.0):
        depth = mixed(far, stack, other, ratio, np.random.default_rng(3)).inverse_depth_dpt
        reliefs.append(float(depth.max() - depth[depth > -99].min()))
    assert reliefs[1] == pytest.approx(2 * reliefs[0], rel=1e-4)


def test_a_part_is_of_one_place_in_all_maps(taken):
    _, stack, seen = taken
    part = part_of(seen, 40, np.random.default_rng(2))
    (top,), (left,) = np.nonzero(np.array((seen.inverse_depth_dpt == part.inverse_depth_dpt[0, 0]).numpy()))
    assert torch.equal(part.inverse_depth_dpt, seen.inverse_depth_dpt[top : top + 40, left : left + 40])
    assert torch.equal(part.aif, seen.aif[:, top : top + 40, left : left + 40])
    assert part_of(seen, 80, np.random.default_rng(2)).aif.shape == (3, 72, 80)
    retake = again(stack, part)
    assert retake.frames.shape == (5, 3, 40, 40)
    assert retake.valid.shape == (5, 40, 40)
