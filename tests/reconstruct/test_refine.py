"""Refinement on an aperture-sampled stack, which shares nothing with the renderer."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import skimage.data
import torch

from capture.lens import Lens
from capture.optics import Condition, Psf, simulate_sweep, sweep_for_scene
from capture.scenes import Scene, procedural_scene, srgb_to_linear
from reconstruct.denoise import root_of
from reconstruct.estimate import Estimate
from reconstruct.losses import charbonnier
from reconstruct.misfit import Misfit
from reconstruct.plane_sweep import plane_sweep
from reconstruct.predict import load_network, predict
from reconstruct.refine import Adam, RefineConfig, _Refinement, refine
from reconstruct.render import LAYER_STEP_PX, render_stack

STILL = RefineConfig(moves_px=(), recede_px=())  # saves time where moves do not matter


class Stack:
    """A noisy disc-blurred sweep of a small procedural scene, with its truth."""

    def __init__(self, psf: Psf = "disc") -> None:
        scene = procedural_scene(3, 72, 96)
        sweep = simulate_sweep(scene, *sweep_for_scene(scene, 4, 12.0), Condition(psf=psf, noise_std=0.01, bits=8))
        self.frames = torch.from_numpy(np.ascontiguousarray(sweep.linear().transpose(0, 3, 1, 2)))
        self.focus = torch.tensor(sweep.focus_dpt, dtype=torch.float32)
        self.kappa = torch.tensor(sweep.kappa_px_per_dpt, dtype=torch.float32)
        self.truth = torch.from_numpy((1 / scene.depth_m).astype(np.float32))
        self.start = plane_sweep(self.frames, self.focus, self.kappa)

    def error(self, estimate: Estimate) -> float:
        return float((estimate.inverse_depth_dpt - self.truth).abs().mean())


@pytest.fixture(scope="module")
def stack():
    return Stack()


def test_adam_steps_as_pytorchs():
    torch.manual_seed(0)
    ours, theirs = torch.zeros(5, 7), torch.zeros(5, 7, requires_grad=True)
    adam, other = Adam(ours), torch.optim.Adam([theirs])
    for step in range(20):
        gradient, length = torch.randn(5, 7) * 10.0 ** torch.randint(-6, 2, (7,)), 0.09 / (1 + step)
        adam.step(gradient, length)
        theirs.grad, other.param_groups[0]["lr"] = gradient, length
        other.step()
    torch.testing.assert_close(ours, theirs.detach(), atol=1e-6, rtol=1e-4)
    assert ours.abs().min() > 0


def best_loss(stack, depth, model, steps=15):
    """Loss at this depth with the image that suits it best."""
    aif = stack.start.aif.clone().requires_grad_()
    optimizer = torch.optim.Adam([aif], lr=0.006)
    for _ in range(steps):
        out = render_stack(aif[None], depth[None, None], stack.focus[None], stack.kappa[None], model=model)[0]
        loss = charbonnier(out, stack.frames)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


@pytest.mark.parametrize("model", ["scatter", "occlusion"])
def test_truth_beats_a_smoothed_truth(stack, model):
    """The crux (`notes/forward-model.md`): self-supervision must not pull a good depth map away from the truth."""
    kernel = torch.ones(1, 1, 7, 7) / 49
    padded = torch.nn.functional.pad(stack.truth[None, None], (3, 3, 3, 3), mode="replicate")
    smoothed = torch.nn.functional.conv2d(padded, kernel)[0, 0]
    assert best_loss(stack, stack.truth, model) < best_loss(stack, smoothed, model)


@pytest.mark.parametrize("estimate", ["plane sweep", "network"])
def test_truth_beats_our_estimates_with_occlusion(stack, estimate):
    """Scatter fails this: it mixes light across the edges of near objects that occlusion keeps apart."""
    answer = stack.start
    if estimate == "network":
        answer = predict(load_network("default", torch.device("cpu")), stack.frames, stack.focus, stack.kappa)
    assert best_loss(stack, stack.truth, "occlusion") < best_loss(stack, answer.inverse_depth_dpt, "occlusion")


@pytest.mark.parametrize("psf", ["disc", "gaussian"])
def test_the_lens_s_own_point_spread_function_is_chosen(psf):
    """Believing in the other one makes a good depth worse."""
    stack = Stack(psf)
    chosen = refine(stack.frames, stack.focus, stack.kappa, stack.start, steps=1)
    told = refine(stack.frames, stack.focus, stack.kappa, stack.start, steps=1, psf=psf)
    assert torch.equal(chosen.inverse_depth_dpt, told.inverse_depth_dpt)


def test_refine_improves_the_plane_sweep(stack):
    seen = []
    refined = refine(
        stack.frames, stack.focus, stack.kappa, stack.start, steps=15, progress=lambda *at: seen.append(at)
    )
    assert stack.error(refined) < 0.95 * stack.error(stack.start)
    assert [step for step, _ in seen] == list(range(15))
    assert seen[-1][1] < seen[0][1]
    assert torch.isfinite(refined.aif).all()


@pytest.mark.parametrize("between", [0.4, 0.6])
def test_fine_texture_between_two_focus_settings_seems_no_nearer_the_closer_one(between):
    """Layers as far apart as those that moves are judged by blur it like two discs mixed: it seems 0.03 px off."""
    grass = srgb_to_linear(skimage.data.grass()[:144, :192] / 255.0).astype(np.float32)
    grass = np.repeat(cv2.resize(grass, (96, 72), interpolation=cv2.INTER_AREA)[..., None], 3, 2)
    true_dpt = 2 + between
    lens = Lens(focal_length_m=0.05, f_number=2.8, pixel_pitch_m=1.7e-4)
    plane = Scene(grass, np.full(grass.shape[:2], 1 / true_dpt, np.float32), "plane")
    sweep = simulate_sweep(plane, lens, [1.0, 2.0, 3.0, 4.0], Condition(bits=None))
    frames, root = (torch.from_numpy(np.moveaxis(x, -1, -3).copy()) for x in (sweep.linear(), grass))
    focus, kappa = (torch.tensor(x, dtype=torch.float32) for x in (sweep.focus_dpt, sweep.kappa_px_per_dpt))

    def seems_px(step_px):
        """Where a parabola through three misfits has its least, px of blur."""
        apart_px = 0.08
        misfit = Misfit(frames, focus, kappa, model="scatter").layered(step_px)
        left = []
        for by_px in (-apart_px, 0.0, apart_px):
            depth = torch.full((72, 96), true_dpt + by_px * 4 / float(kappa.mean()))
            left.append(float(misfit.fitted(root_of(root), depth, 8)[1][..., 12:-12, 12:-12].mean()))
        return apart_px * (left[0] - left[2]) / (2 * (left[0] + left[2] - 2 * left[1]))

    assert abs(seems_px(RefineConfig().layer_step_px)) < 0.5 * abs(seems_px(LAYER_STEP_PX))


def test_plain_background_is_offered_to_recede_beside_an_object_of_another_colour(stack):
    """To the depth beyond the halo, but no farther than the start's std, and no pixel of the object's colour."""
    height, width = stack.truth.shape
    column = torch.arange(width)
    aif = torch.where(column < 40, 0.6, 0.2).expand(3, height, width)
    drawn_px = torch.where(column < 40, 5.0, torch.where(column < 44, 3.0, 2.0)).expand(height, width)
    std_px = torch.where(column < 42, 2.0, 0.4).expand(height, width)
    dpt_per_px = 4 / float(stack.kappa.mean())
    start = stack.start._replace(inverse_depth_dpt=drawn_px * dpt_per_px, std_dpt=std_px * dpt_per_px, aif=aif)
    config = RefineConfig(moves_px=(), recede_px=(4,))
    state = _Refinement(Misfit(stack.frames, stack.focus, stack.kappa), start, config)
    (offer,) = state._offers(drawn_px)
    expected_px = torch.where(column < 40, 5.0, torch.where(column < 42, 2.0, torch.where(column < 44, 2.6, 2.0)))
    assert torch.allclose(offer, expected_px.expand(height, width), atol=1e-4)


def test_scatter_refines_without_hidden_background(stack):
    refined = refine(
        stack.frames, stack.focus, stack.kappa, stack.start, steps=3, model="scatter", config=RefineConfig(rounds=1)
    )
    assert stack.error(refined) < stack.error(stack.start)


def test_a_surface_that_lies_wrong_as_a_whole_is_shifted(stack):
    """Pixel by pixel the slope drowns in noise: descent alone takes away a fifth of such an error."""
    dpt_per_px = 4 / float(stack.kappa.mean())
    wrong = stack.truth + 0.4 * dpt_per_px * torch.sin(torch.arange(96) / 96 * torch.pi)
    started = stack.start._replace(inverse_depth_dpt=wrong, std_dpt=torch.full_like(wrong, 0.3 * dpt_per_px))
    refined = refine(stack.frames, stack.focus, stack.kappa, started, steps=10, config=STILL)
    assert stack.error(refined) < 0.6 * stack.error(started)


def test_changes_that_noise_makes_are_smoothed_away_and_edges_kept(stack):
    """A step of 1.5 px that descent added to a flat start, under noise that it added too."""
    dpt_per_px = 4 / float(stack.kappa.mean())
    flat = torch.full_like(stack.truth, 3.0)
    aif = torch.full((3, *flat.shape), 0.4)
    start = stack.start._replace(inverse_depth_dpt=flat * dpt_per_px, aif=aif)
    state = _Refinement(Misfit(stack.frames, stack.focus, stack.kappa), start, RefineConfig())
    stepped = flat + 1.5 * (torch.arange(96) >= 48)
    noise = 0.08 * torch.randn(flat.shape, generator=torch.Generator().manual_seed(0))
    settled, _ = state._settled(stepped + noise)
    assert (settled - stepped).abs().mean() < 0.25 * noise.abs().mean()
    assert (settled[:, 46:50] - stepped[:, 46:50]).abs().max() < 0.15


@pytest.mark.parametrize("size_px", [0.1, 0.2])
def test_frames_that_are_focused_elsewhere_than_they_say_are_found(stack, size_px, caplog):
    """By what no shift or stretch of all of them explains; the rest is the calibration's."""
    off = size_px * 4 / float(stack.kappa.mean()) * torch.tensor([-1.0, 1.0, 1.0, -1.0])
    with caplog.at_level("INFO", logger="reconstruct.refine"):
        refine(stack.frames, stack.focus + off, stack.kappa, stack.start, steps=5, config=STILL)
    found, gain_percent = (torch.tensor(values) for values in caplog.records[-1].args)
    assert float(-(found * off).sum() / off.square().sum()) > 0.25
    assert torch.nn.functional.cosine_similarity(-found, off, 0) > 0.9
    assert abs(float(found.sum())) < 1e-3
    assert abs(float(gain_percent.sum())) < 0.1 and gain_percent.abs().max() < 2


def test_two_frames_keep_the_focus_they_tell(stack, caplog):
    with caplog.at_level("INFO", logger="reconstruct.refine"):
        refine(stack.frames[:2], stack.focus[:2] * 1.02, stack.kappa[:2], stack.start, steps=5, config=STILL)
    assert caplog.records[-1].args[0] == [0.0, 0.0]


def test_image_is_fitted_in_a_few_steps_beside_bright_lights_too(stack):
    """Light a hundred times brighter than its surroundings bends the misfit more than a step of full length allows."""
    lit = stack.frames.clone()
    lit[:, :, 20:23, 30:33] = 100.0
    for frames, left in ((stack.frames, 0.6), (lit, 1.0)):
        misfit, root = Misfit(frames, stack.focus, stack.kappa), root_of(stack.start.aif)
        before = float(misfit(root, stack.truth).mean())
        after = float(misfit.fitted(root, stack.truth, 6)[1].mean())
        assert after < left * before


def test_no_steps_change_nothing(stack):
    same = refine(stack.frames, stack.focus, stack.kappa, stack.start, steps=0)
    assert torch.allclose(same.inverse_depth_dpt, stack.start.inverse_depth_dpt, rtol=1e-5)
    assert torch.equal(same.aif, stack.start.aif)


def test_missing_pixels_do_not_count(stack):
    frames, valid = stack.frames.clone(), torch.ones(stack.frames.shape[0], 72, 96, dtype=torch.bool)
    frames[0, :, :10] = torch.nan
    frames[1, :, -10:] = 1e3
    valid[1, -10:] = False
    refined = refine(frames, stack.focus, stack.kappa, stack.start, steps=4, valid=valid, config=RefineConfig(rounds=1))
    moved = (refined.inverse_depth_dpt - stack.start.inverse_depth_dpt).abs() * stack.kappa.mean() / 4
    assert torch.isfinite(refined.inverse_depth_dpt).all()
    assert moved[-5:].mean() < 1  # light of 1000 would have thrown it far


def test_where_few_frames_hold_data_the_start_stays(stack):
    """As at the border of photographs whose lens breathes; where three of four do, it does not."""
    valid = torch.ones(4, 72, 96, dtype=torch.bool)
    valid[:2, :, :8] = False
    valid[0, :, 8:16] = False
    given = stack.frames, stack.focus, stack.kappa
    refined = refine(*given, stack.start, steps=4, valid=valid, config=RefineConfig(rounds=1))
    moved = (refined.inverse_depth_dpt - stack.start.inverse_depth_dpt).abs() * stack.kappa.mean() / 4
    assert moved[:, :8].max() < 1e-4
    assert moved[:, 8:16].mean() > 0.01
    assert moved[:, 8:].mean() > 0.01
    assert (refined.std_dpt[:, :8] >= stack.start.std_dpt[:, :8] * 0.999).all()
    assert (refined.std_dpt[:, 16:] < stack.start.std_dpt[:, 16:]).any()


def test_where_few_frames_hold_data_a_start_without_spread_stays_without(stack):
    valid = torch.ones(4, 72, 96, dtype=torch.bool)
    valid[:2, :, :8] = False
    start = stack.start._replace(std_dpt=torch.full_like(stack.start.std_dpt, torch.nan))
    refined = refine(stack.frames, stack.focus, stack.kappa, start, steps=2, valid=valid, config=RefineConfig(rounds=1))
    assert refined.std_dpt[:, :8].isnan().all()
    assert (refined.confidence[:, :8] == 0).all()
    assert refined.std_dpt[:, 8:].isfinite().all()
    assert (refined.confidence[:, 8:] > 0).all()


def test_hidden_background_speaks_for_the_truth(stack):
    """Light from behind near edges has a place then, so the truth fits better; a wrong depth gains less from it."""
    misfit = Misfit(stack.frames, stack.focus, stack.kappa)

    def left(depth, hidden):
        root = root_of(stack.start.aif)
        return float(misfit.fitted(misfit.with_hidden(root, depth) if hidden else root, depth, 6)[1].sum())

    gains = [left(depth, False) / left(depth, True) for depth in (stack.truth, stack.start.inverse_depth_dpt)]
    assert gains[0] > 1.1
    assert gains[0] > gains[1]
