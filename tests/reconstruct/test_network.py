"""The two networks: shapes, invariances, and what the default one knows of optics before any training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from reconstruct.network import DefaultNet, PaperNet, build, place_hypotheses
from reconstruct.plane_sweep import hypotheses, plane_sweep, quietened
from reconstruct.predict import predict, wrap


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def stack_of(size_s, height=48, width=64):
    focus = torch.linspace(0.4, 1.6, size_s)[None]
    return torch.rand(1, size_s, 3, height, width), focus, torch.linspace(11.0, 12.0, size_s)[None]


def awake(net):
    """`net` with every weight away from its special initial value."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return net.eval()


def test_paper_preset_has_the_published_size():
    assert sum(p.numel() for p in build("paper").parameters()) == 1_963_332


@pytest.mark.parametrize("preset", ["default", "paper"])
@pytest.mark.parametrize("size_s", [2, 3, 5, 15])
def test_any_number_of_frames(preset, size_s):
    frames, focus, kappa = stack_of(size_s)
    output = build(preset)(frames, focus, kappa)
    assert output.inverse_depth_dpt.shape == output.std_dpt.shape == (1, 1, 48, 64)
    assert output.aif.shape == (1, 3, 48, 64)
    assert torch.isfinite(output.inverse_depth_dpt).all()


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_order_of_frames_does_not_matter(preset):
    net = awake(build(preset))
    frames, focus, kappa = stack_of(5)
    order = torch.tensor([3, 0, 4, 1, 2])
    with torch.inference_mode():
        one = net(frames, focus, kappa)
        two = net(frames[:, order], focus[:, order], kappa[:, order])
    assert (one.inverse_depth_dpt - two.inverse_depth_dpt).abs().max() < 1e-4
    assert (one.aif - two.aif).abs().max() < 1e-3


def test_paper_depth_post_operations():
    frames, focus, kappa = stack_of(3)
    clip, norm = PaperNet(post="clip"), PaperNet(post="norm")
    raw = torch.rand(1, 4, 8, 8) * 20
    assert torch.equal(clip.depth_m(raw), raw[:, 3:].clamp(0, 10))
    assert norm.depth_m(raw).amax() == pytest.approx(10.0, abs=1e-5)
    assert (clip(frames, focus, kappa).inverse_depth_dpt <= 10.0 + 1e-6).all()


@pytest.mark.parametrize(("scale", "shift"), [(0.01, 0.0), (1.0, 3.0), (50.0, -2.0)])
def test_default_sees_blur_only(scale, shift):
    """q -> a q + b with kappa -> kappa / a is the same blur: depth follows, spread scales, the image stays."""
    net = awake(DefaultNet())
    frames, focus, kappa = stack_of(4)
    with torch.inference_mode():
        one = net(frames, focus, kappa)
        two = net(frames, scale * focus + shift, kappa / scale)
    step = place_hypotheses(focus, kappa).step_px.item() / kappa.mean().item()
    moved = (two.inverse_depth_dpt - shift) / scale
    assert (moved - one.inverse_depth_dpt).abs().max() < 0.02 * step
    assert (two.std_dpt / scale - one.std_dpt).abs().max() < 0.02 * step


def test_hypotheses_are_the_plane_sweeps():
    _, focus, kappa = stack_of(4)
    placed = place_hypotheses(focus, kappa)
    assert torch.allclose(placed.dpt[0], hypotheses(focus[0], kappa[0], len(placed.dpt[0])), atol=1e-6)


def test_brightness_does_not_matter():
    net = awake(DefaultNet())
    frames, focus, kappa = stack_of(4)
    with torch.inference_mode():
        one, two = net(frames, focus, kappa), net(0.2 * frames, focus, kappa)
    assert torch.allclose(one.inverse_depth_dpt, two.inverse_depth_dpt, atol=1e-3)
    assert torch.allclose(0.2 * one.aif, two.aif, atol=1e-3)


def test_training_sees_the_noise_that_inference_sees():
    """Frames are quietened for both; how noisy they were captured is told, for it can no longer be measured."""
    frames, focus, kappa = stack_of(4)
    captured = (0.3 + 0.05 * torch.randn_like(frames[0])).clamp(0, 1)
    net = awake(DefaultNet())
    quiet, context = quietened(captured)
    with torch.inference_mode():
        told, untold = (
            net(quiet[None], focus, kappa, noise=noise).inverse_depth_dpt[0, 0] for noise in (context.noise[None], None)
        )
        wanted = predict(wrap(net, {}, "net"), captured, focus[0], kappa[0]).inverse_depth_dpt
    assert (told - wanted).abs().max() < 1e-5
    assert (untold - wanted).abs().max() > 1e-4


def test_untrained_default_is_the_plane_sweep():
    """Training starts from the plane sweep's answer, whatever the random weights: within a twentieth of a pixel."""
    rng = np.random.default_rng(1)
    scene = gaussian_filter(rng.random((64, 64)), 0.7)
    focus, kappa = np.linspace(0.4, 1.6, 5), 12.0
    near = np.stack([gaussian_filter(scene, abs(kappa * (q - 1.4)) / 4) for q in focus])
    far = np.stack([gaussian_filter(scene, abs(kappa * (q - 0.6)) / 4) for q in focus])
    frames = torch.tensor(np.concatenate([near, far], 2), dtype=torch.float32)[:, None].expand(-1, 3, -1, -1)
    focus_dpt, gain = torch.tensor(focus).float(), torch.full((5,), kappa)
    swept = plane_sweep(frames, focus_dpt, gain).inverse_depth_dpt
    with torch.inference_mode():
        output = DefaultNet()(frames[None], focus_dpt[None], gain[None])
    difference_px = (output.inverse_depth_dpt[0, 0] - swept).abs() * kappa
    assert difference_px.mean() < 0.05 * (swept * kappa).std()
    assert swept[:, 8:56].mean() > swept[:, 72:120].mean() + 0.3


def test_no_parameter_is_dead_at_the_start():
    net = DefaultNet()
    frames, focus, kappa = stack_of(4)
    output = net(frames, focus, kappa)
    (output.inverse_depth_dpt.square().mean() + output.std_dpt.mean() + output.aif.square().mean()).backward()
    zero = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not zero


@pytest.mark.parametrize("size", [(33, 47), (64, 50), (17, 130)])
def test_predict_any_size(size):
    network = wrap(awake(DefaultNet()), {}, "test")
    frames, focus, kappa = stack_of(3, *size)
    estimate = predict(network, frames[0], focus[0], kappa[0])
    assert estimate.inverse_depth_dpt.shape == size
    assert estimate.aif.shape == (3, *size)
    assert ((estimate.confidence >= 0) & (estimate.confidence <= 1)).all()


def test_predict_uses_the_calibration():
    frames, focus, kappa = stack_of(3)
    net = awake(DefaultNet())
    plain = predict(wrap(net, {}, "a"), frames[0], focus[0], kappa[0])
    scaled = predict(wrap(net, {"calibration": {"std_gain": 3.0}}, "b"), frames[0], focus[0], kappa[0])
    assert torch.allclose(scaled.std_dpt, 3 * plain.std_dpt, rtol=1e-4)


@pytest.mark.parametrize("holes", [False, True])
def test_trains_in_bfloat16(holes):
    """As on CUDA: the U-Net only, so that the answer hardly moves."""
    net = awake(DefaultNet())
    frames, focus, kappa = stack_of(3)
    valid = torch.ones(1, 3, 48, 64, dtype=torch.bool)
    valid[:, 1, :, 40:] = not holes
    net.bf16 = True
    output = net(frames, focus, kappa, valid if holes else None)
    net.bf16 = False
    exact = net(frames, focus, kappa, valid if holes else None)
    moved_px = (output.inverse_depth_dpt - exact.inverse_depth_dpt).abs() * kappa.mean()
    assert 0 < moved_px.mean() < 0.02
    assert output.inverse_depth_dpt.dtype == output.logits.dtype == torch.float32
    output.inverse_depth_dpt.sum().backward()
    assert net.mix.weight.grad.abs().sum() > 0


def test_pixels_without_data_are_left_out():
    net = awake(DefaultNet())
    frames, focus, kappa = stack_of(5)
    spoilt, valid = frames.clone(), torch.ones(1, 5, 48, 64, dtype=torch.bool)
    spoilt[:, 2, :, :, 40:], valid[:, 2, :, 40:] = 0.0, False
    with torch.inference_mode():
        aif = net(spoilt, focus, kappa, valid).aif
    assert aif[..., 48:].mean() > 0.9 * frames[..., 48:].mean()


def test_paper_has_no_confidence_to_offer():
    frames, focus, kappa = stack_of(3)
    estimate = predict(wrap(PaperNet(), {}, "paper"), frames[0], focus[0], kappa[0])
    assert (estimate.confidence == 0).all()
