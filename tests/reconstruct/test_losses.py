"""Loss terms against trusted implementations and the published numbers; their repairs against the known defects."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage.metrics import structural_similarity

from reconstruct import losses


def picture(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def blurred(image, sigma):
    pad = [0] * (image.ndim - 2) + [sigma, sigma]
    return torch.from_numpy(ndimage.gaussian_filter(image.numpy(), pad))


def test_ssim_is_scikit_images():
    a = picture(1, 3, 40, 50).double()
    b = (0.7 * a + 0.3 * picture(1, 3, 40, 50, seed=1)).double()
    _, expected = structural_similarity(
        a[0].numpy(), b[0].numpy(), channel_axis=0, gaussian_weights=True, use_sample_covariance=False, data_range=1.0,
        full=True,
    )  # fmt: skip
    found = losses.ssim_map(a, b)[0].numpy()
    inside = (slice(None), slice(5, -5), slice(5, -5))  # borders are padded differently
    assert np.abs(found[inside] - expected[inside]).max() < 1e-12
    assert losses.ssim(a, a) == pytest.approx(1.0)


def test_photometric_terms_of_known_differences():
    a = torch.full((1, 2, 3, 8, 8), 0.5)
    assert losses.l1(a, a + 0.1) == pytest.approx(0.1)
    assert losses.charbonnier(a, a + 0.1, 0.02) == pytest.approx((0.1**2 + 0.02**2) ** 0.5 - 0.02, rel=1e-4)
    assert losses.charbonnier(a, a) == pytest.approx(0.0, abs=1e-8)
    assert losses.ssim_l1(a, a) == pytest.approx(0.0, abs=1e-6)


def test_published_smoothness_reproduces_the_published_defect():
    """`notes/method.md` bug 7: 0.0118 at 1 m and 0.118 at 10 m for constant depth (256 x 256, grey 0.5)."""
    aif = torch.full((1, 3, 256, 256), 0.5)
    flat = torch.ones(1, 1, 256, 256)
    assert losses.published_smoothness(flat, aif) == pytest.approx(0.0118, abs=1e-4)
    assert losses.published_smoothness(10 * flat, aif) == pytest.approx(0.118, abs=1e-3)
    assert losses.inverse_depth_smoothness(10 * flat, aif) == 0.0


def test_smoothness_ignores_scale_and_spares_image_edges():
    depth = torch.ones(1, 1, 16, 16)
    depth[..., 8:] = 2.0
    grey = torch.full((1, 3, 16, 16), 0.5)
    edge = grey.clone()
    edge[..., 8:] = 1.0
    on_flat = losses.inverse_depth_smoothness(depth, grey)
    assert on_flat > 0
    assert losses.inverse_depth_smoothness(5 * depth, grey) == pytest.approx(float(on_flat), rel=1e-5)
    assert losses.inverse_depth_smoothness(depth, edge) == pytest.approx(float(on_flat) * np.exp(-5), rel=1e-4)


@pytest.mark.parametrize("size", [(1, 16), (16, 1), (1, 1)])
def test_smoothness_of_a_line_counts_along_it_only(size):
    line = torch.linspace(1, 2, max(size)).reshape(1, 1, *size)
    expected = 1 / 15 if max(size) > 1 else 0.0
    assert losses.edge_aware_smoothness(line, torch.zeros(1, 3, *size)) == pytest.approx(expected)


def test_blur_measure_grows_with_blur():
    sharp = picture(2, 3, 32, 32)
    assert losses.blur_measure(blurred(sharp, 1.0)) > losses.blur_measure(sharp)
    # LoG of sigma 1 as scipy has it, up to the sum over the cut at 3 sigma
    gray = sharp[0].mean(0).double().numpy()
    trusted = ndimage.gaussian_laplace(gray, 1.0, mode="constant", truncate=6)
    energy = np.square(trusted).sum() / (gray.size - gray.mean() ** 2)
    assert losses.blur_measure(sharp[:1]) == pytest.approx(-0.25 * np.log(energy), abs=0.03)


def test_coarse_images_pick_the_sharp_frame():
    sharp = picture(1, 3, 40, 40)
    soft = blurred(sharp, 2.0)
    left = torch.arange(40) < 20
    stack = torch.stack([torch.where(left, sharp, soft), torch.where(left, soft, sharp)], 1)
    coc = torch.stack([torch.where(left, 0.0, -4.0), torch.where(left, 4.0, 0.0)])[None, :, None].expand(1, 2, 40, 40)
    assert torch.equal(losses.published_coarse_aif(stack, coc), sharp)
    fused = losses.fuse_sharpest(stack.requires_grad_())
    assert not fused.requires_grad
    away = (left.int() - left.flip(0).int()).abs() > 0
    away[10:30] = False  # the contrast window mixes the halves there
    assert (fused - sharp)[..., away].abs().mean() < 0.05 * (soft - sharp)[..., away].abs().mean()


def test_exposure_drift_costs_nothing_after_matching():
    stack = picture(1, 3, 3, 16, 16) * 0.5 + 0.2
    gain = torch.tensor([0.95, 1.0, 1.1])[None, :, None, None, None]
    rendered = ((stack - 0.01) / gain).requires_grad_()
    matched = losses.match_exposure(rendered, stack)
    assert torch.allclose(matched, stack, atol=1e-5)
    assert losses.match_exposure(stack * 0.1, stack).max() < 0.5 * stack.max()  # a wrong picture stays wrong
    matched.sum().backward()
    assert torch.allclose(rendered.grad, gain.expand_as(rendered), rtol=1e-3)


def test_terms_and_weights_have_the_same_fields_and_total_adds_them():
    assert losses.LossTerms._fields == tuple(field.name for field in fields(losses.LossWeights))
    terms = losses.LossTerms(*torch.arange(1.0, 6.0))
    weights = losses.LossWeights(1, 10, 100, 1000, 0)
    assert losses.total(terms, weights) == pytest.approx(1 + 20 + 300 + 4000)
    nan = terms._replace(coarse_sharpness=torch.tensor(torch.nan))
    assert losses.total(nan, weights) == pytest.approx(4321)


def test_published_and_repaired_terms_are_finite_and_differentiable():
    aif = picture(2, 3, 24, 24).requires_grad_()
    stack = picture(2, 4, 3, 24, 24, seed=3)
    inverse_depth = (picture(2, 1, 24, 24, seed=4) + 0.2).requires_grad_()
    rendered = aif[:, None] * torch.ones(1, 4, 1, 1, 1) * inverse_depth[:, None]
    coc = (inverse_depth - torch.linspace(0.2, 1.2, 4)[None, :, None, None]).detach()
    for terms, weights in [
        (losses.published_terms(rendered, stack, aif, 1 / inverse_depth, coc), losses.PUBLISHED),
        (losses.repaired_terms(rendered, stack, aif, inverse_depth), losses.LossWeights()),
    ]:
        assert all(torch.isfinite(term) for term in terms)
        gradients = torch.autograd.grad(losses.total(terms, weights), [aif, inverse_depth], retain_graph=True)
        assert all(torch.isfinite(g).all() and g.abs().max() > 0 for g in gradients)
    assert not terms.coarse_sharpness.requires_grad


@pytest.mark.parametrize("term", [lambda x: losses.ssim_l1(x, x.detach().flip(-1)), losses.blur_measure])
def test_a_term_first_asked_for_without_gradients_still_trains(term):
    losses._gaussian_taps.cache_clear()
    losses._laplacian_of_gaussian.cache_clear()
    image = picture(1, 3, 16, 16)
    with torch.inference_mode():
        term(image)
    image.requires_grad_()
    term(image).backward()
    assert image.grad.abs().sum() > 0
