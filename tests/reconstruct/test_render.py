"""The renderer against its written-out definitions: values and gradients, physics, and what must never be cut."""

from __future__ import annotations

import pytest
import torch

import reconstruct.render as render_module
from reconstruct.render import (
    FixedDepth,
    Hidden,
    Layers,
    continued_behind,
    hidden_inverse_depth,
    published_blur,
    render_stack,
)
from reconstruct.spectrum import Psf, Spectrum
from tests.reconstruct import render_reference

F64 = torch.float64
PSFS = [Psf("gaussian", 0.25, 0.3), Psf("disc", 0.25, 0.5)]


def scene(height=20, width=26, frames=3, seed=0):
    """A textured step with a slant: aif (1, 3, H, W), inverse depth (1, 1, H, W), focus (1, S), kappa (1, S)."""
    rng = torch.Generator().manual_seed(seed)
    aif = torch.rand(1, 3, height, width, generator=rng, dtype=F64)
    slant = torch.linspace(0.3, 0.8, width, dtype=F64).expand(height, width).clone()
    slant[height // 4 : height // 2, width // 3 : width // 2] = 1.8  # an empty layer lies behind it
    slant += 0.01 * torch.rand(height, width, generator=rng, dtype=F64)
    focus = torch.linspace(1.5, 0.25, frames, dtype=F64)[None]
    kappa = torch.full((1, frames), 6.0, dtype=F64) + torch.arange(frames, dtype=F64)
    return aif, slant[None, None], focus, kappa


def something_hidden(aif, depth):
    """Background behind the step of `scene`, and something nearer yet far behind it, in other colours."""
    rng = torch.Generator().manual_seed(4)
    behind = depth.detach().clone()
    behind[depth > 1.2] = 0.47
    behind[..., -1:][depth[..., -1:] > 0.7] = 0.31
    return Hidden(torch.rand(aif.shape, generator=rng, dtype=F64), behind)


def relative(a, b):
    return float(((a - b).abs().max() / b.abs().max()).detach())


@pytest.mark.parametrize("window", [3, 7])
def test_published_is_its_formula(window):
    rng = torch.Generator().manual_seed(1)
    image = torch.rand(3, 6, 7, generator=rng, dtype=F64, requires_grad=True)
    radius = (3 * torch.rand(6, 7, generator=rng, dtype=F64)).requires_grad_()
    expected = render_reference.published_loops(image, radius, window)
    found = published_blur(image[None], radius[None, None], window)[0, 0]
    assert torch.allclose(found, expected, atol=1e-12, rtol=0)
    teacher = torch.rand(3, 6, 7, generator=rng, dtype=F64)
    wanted = torch.autograd.grad((expected * teacher).sum(), [image, radius])
    got = torch.autograd.grad((found * teacher).sum(), [image, radius])
    for a, b in zip(got, wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-12, rtol=0)


def test_published_gradcheck_and_gate():
    rng = torch.Generator().manual_seed(2)
    image = torch.rand(2, 3, 5, 6, generator=rng, dtype=F64, requires_grad=True)
    radius = (1.2 + 2 * torch.rand(2, 2, 5, 6, generator=rng, dtype=F64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda i, r: published_blur(i, r, 5), (image, radius), fast_mode=True)
    assert torch.equal(published_blur(image, radius * 0 + 1.0), image[:, None].expand(2, 2, 3, 5, 6))


def test_published_through_render_stack_has_std_of_a_quarter_coc():
    aif = torch.zeros(1, 3, 31, 31, dtype=F64)
    aif[..., 15, 15] = 1
    depth = torch.full((1, 1, 31, 31), 0.5, dtype=F64)
    out = render_stack(
        aif, depth, torch.tensor([[1.0]], dtype=F64), torch.tensor([[16.0]], dtype=F64), model="published", window=31
    )
    line = out[0, 0, 0].sum(0)
    variance = (line * (torch.arange(31) - 15) ** 2).sum() / line.sum()
    assert variance.sqrt() == pytest.approx(8 / 4, rel=1e-3)


@pytest.mark.parametrize("psf", PSFS, ids=lambda psf: psf.shape)
@pytest.mark.parametrize("model", ["scatter", "occlusion"])
def test_layers_are_their_definition_in_values_and_gradients(model, psf):
    inputs = [t.requires_grad_() for t in (scene() if psf.shape == "gaussian" else scene(14, 15, 2))]
    aif, depth, focus, kappa = inputs
    layers = Layers.spanning(depth.detach(), kappa, 2.5)
    assert layers.count > 3
    expected = getattr(render_reference, model)(aif[0], depth[0, 0], focus[0], kappa[0], psf, layers)
    found = render_stack(
        aif, depth, focus, kappa, model=model, psf=psf.shape, gaussian_gain=psf.gain, floor_px=psf.floor_px
    )[0]
    tolerance = 1e-6 if psf.shape == "gaussian" else 1e-2  # the reference counts points in the disc
    assert relative(found, expected) < tolerance
    teacher = torch.rand(expected.shape, generator=torch.Generator().manual_seed(3), dtype=F64)
    wanted = torch.autograd.grad((expected * teacher).sum(), inputs)
    got = torch.autograd.grad((found * teacher).sum(), inputs)
    for a, b in zip(got, wanted, strict=True):
        # the reference's disc has no derivative, only differences; `gradcheck` below is the exact test
        assert relative(a, b) < (5e-6 if psf.shape == "gaussian" else 0.1)


@pytest.mark.parametrize("psf", PSFS, ids=lambda psf: psf.shape)
def test_hidden_background_is_its_definition_in_values_and_gradients(psf):
    aif, depth, focus, kappa = (t.requires_grad_() for t in (scene() if psf.shape == "gaussian" else scene(14, 15, 2)))
    hidden = something_hidden(aif, depth)
    hidden.aif.requires_grad_()
    layers = Layers.spanning(torch.stack([depth.detach(), hidden.inverse_depth_dpt]), kappa, 2.5)
    behind = hidden.aif[0], hidden.inverse_depth_dpt[0, 0]
    expected = render_reference.occlusion(aif[0], depth[0, 0], focus[0], kappa[0], psf, layers, behind)
    options = {"psf": psf.shape, "gaussian_gain": psf.gain, "floor_px": psf.floor_px}
    found = render_stack(aif, depth, focus, kappa, hidden=hidden, **options)[0]
    assert relative(found, expected) < (1e-6 if psf.shape == "gaussian" else 1e-2)
    assert relative(render_stack(aif, depth, focus, kappa, **options)[0], expected) > 0.05
    inputs = [aif, depth, focus, kappa, hidden.aif]
    teacher = torch.rand(expected.shape, generator=torch.Generator().manual_seed(3), dtype=F64)
    wanted = torch.autograd.grad((expected * teacher).sum(), inputs)
    got = torch.autograd.grad((found * teacher).sum(), inputs)
    for a, b in zip(got, wanted, strict=True):
        assert relative(a, b) < (5e-6 if psf.shape == "gaussian" else 0.1)


@pytest.mark.parametrize("psf", ["gaussian", "disc"])
def test_hidden_background_gradcheck(psf):
    aif, depth, focus, kappa = scene(8, 9, 2)
    hidden = something_hidden(aif, depth)

    def rendered(aif, depth, focus, behind):
        return render_stack(aif, depth, focus, kappa, psf=psf, hidden=hidden._replace(aif=behind))

    inputs = tuple(t.requires_grad_() for t in (aif, depth, focus, hidden.aif.clone()))
    assert torch.autograd.gradcheck(rendered, inputs, fast_mode=True)


@pytest.mark.parametrize("tiled", [False, True], ids=["whole", "tiled"])
@pytest.mark.parametrize("psf", ["gaussian", "disc"])
@pytest.mark.parametrize("with_hidden", [False, True], ids=["in sight", "hidden"])
def test_a_fixed_depth_renders_what_any_depth_does(monkeypatch, with_hidden, psf, tiled):
    """Values and gradients by the images, of two images in turn."""
    if tiled:
        monkeypatch.setattr(render_module, "_tiles", tiles_of_35)
    aif, depth, focus, kappa = scene(50, 60, 2)
    hidden = something_hidden(aif, depth)
    behind = hidden.inverse_depth_dpt[0, 0] if with_hidden else None
    at = FixedDepth(depth[0, 0], focus[0], kappa[0], Psf(psf), behind)
    for image in (aif, aif.flip(1)):
        images = [image.requires_grad_(), *([hidden.aif.requires_grad_()] if with_hidden else [])]
        expected = render_stack(image, depth, focus, kappa, psf=psf, hidden=hidden if with_hidden else None)[0]
        found = at(*(x[0] for x in images))
        assert relative(found, expected) < 1e-9
        teacher = torch.rand(expected.shape, generator=torch.Generator().manual_seed(3), dtype=F64)
        wanted, got = (torch.autograd.grad((out * teacher).sum(), images) for out in (expected, found))
        for a, b in zip(got, wanted, strict=True):
            assert relative(a, b) < 1e-9


def test_what_is_hidden_at_a_pixel_s_own_depth_is_not_seen():
    aif, depth, focus, kappa = scene()
    rendered = render_stack(aif, depth, focus, kappa, hidden=Hidden(1 - aif, depth))
    assert torch.equal(rendered, render_stack(aif, depth, focus, kappa))


def test_hidden_background_belongs_to_occlusion():
    aif, depth, focus, kappa = scene()
    with pytest.raises(ValueError, match="hidden background"):
        render_stack(aif, depth, focus, kappa, model="scatter", hidden=Hidden(aif, depth))


def test_a_farther_surface_goes_on_behind_a_near_edge_as_far_as_the_lens_sees():
    kappa = torch.tensor([[4.0, 5.0]])
    depth = torch.full((1, 1, 9, 30), 1.0)
    depth[..., 10:] = 3.0  # 10 px of CoC nearer: seen 5 px behind
    depth[..., 28:] = 3.3  # 1.5 px nearer: less than a pixel
    hidden = hidden_inverse_depth(depth, kappa)
    expected = depth.clone()
    expected[..., 10:15] = 1.0
    assert torch.equal(hidden, expected)
    image = torch.rand(3, 9, 30, generator=torch.Generator().manual_seed(5))
    image[:, :, 10:] = 1.0
    image[:, :, :10] *= 0.2
    filled = continued_behind(image, depth[0, 0], hidden[0, 0], kappa[0])
    assert filled[:, :, 10:15].max() < 0.2


@pytest.mark.parametrize("psf", ["gaussian", "disc"])
@pytest.mark.parametrize("model", ["scatter", "occlusion"])
def test_layers_gradcheck(model, psf):
    inputs = [t.requires_grad_() for t in scene(8, 9, 2)]
    aif, depth, focus, kappa = inputs

    def rendered(aif, depth, focus, blur):
        return render_stack(aif, depth, focus, torch.cat([blur, kappa.detach()[:, 1:]], 1), model=model, psf=psf)

    # the largest kappa places the layers and is held; gradients by the other run through the blur alone
    assert torch.autograd.gradcheck(
        rendered, (aif, depth, focus, kappa.detach()[:, :1].requires_grad_()), fast_mode=True
    )


def test_gather_is_its_definition():
    aif, depth, focus, _ = scene(26, 30, 2)
    kappa = torch.full((1, 2), 24.0, dtype=F64)
    found = render_stack(aif, depth, focus, kappa, model="gather", gaussian_gain=0.25)[0]
    variance = (6 * (focus[0, :, None, None] - depth[0])) ** 2 + 0.09
    assert variance.max() > 36
    expected = torch.stack([render_reference.gather(aif[0], v) for v in variance])
    error = (found - expected).abs()
    assert error.mean() < 1e-4
    assert error.max() < 1e-2
    # white noise is the hardest picture; the derivative by the width must point the same way
    probed = depth.clone().requires_grad_()
    (slope,) = torch.autograd.grad(
        render_stack(aif, probed, focus, kappa, model="gather", gaussian_gain=0.25).sum(), probed
    )
    small = 1e-4
    wanted = torch.stack(
        [
            (render_reference.gather(aif[0], v + small) - render_reference.gather(aif[0], v - small)).sum(0)
            for v in variance
        ]
    ) / (2 * small)
    wanted = (wanted * -72 * (focus[0, :, None, None] - depth[0])).sum(0)  # the variance's slope by the inverse depth
    assert torch.cosine_similarity(slope.flatten(), wanted.flatten(), dim=0) > 0.999


def test_gather_gradcheck():
    aif, depth, focus, kappa = (t.requires_grad_() for t in scene(8, 9, 2))

    def rendered(*inputs):
        return render_stack(*inputs, model="gather", psf="gaussian")

    assert torch.autograd.gradcheck(rendered, (aif, depth, focus, kappa), fast_mode=True)


def tiles_of_35(height, width, reach, reaches=0, least_px=0):
    """`_tiles` without its preference for tiles much larger than their halo."""
    for top in range(0, height, 35):
        for left in range(0, width, 35):
            bottom, right = min(top + 35, height), min(left + 35, width)
            yield render_module.Tile(
                slice(top, bottom),
                slice(left, right),
                slice(max(top - reach, 0), min(bottom + reach, height)),
                slice(max(left - reach, 0), min(right + reach, width)),
            )


@pytest.mark.parametrize("model", ["scatter", "occlusion", "gather", "published", "occlusion, hidden"])
@pytest.mark.parametrize("psf", ["gaussian", "disc"])
def test_tiles_leave_no_seam(monkeypatch, model, psf):
    model, *with_hidden = model.split(", ")

    def values():
        inputs = [t.requires_grad_() for t in scene(70, 90, 2)]
        hidden = something_hidden(*inputs[:2]) if with_hidden else None
        out = render_stack(*inputs, model=model, psf=psf, hidden=hidden)
        teacher = torch.rand(out.shape, generator=torch.Generator().manual_seed(4), dtype=F64)
        return [out, *torch.autograd.grad((out * teacher).sum(), inputs)]

    whole = values()
    monkeypatch.setattr(render_module, "_tiles", tiles_of_35)
    for a, b in zip(values(), whole, strict=True):
        assert relative(a, b) < (1e-3 if model == "occlusion" else 1e-5)  # it divides by weights down to 1e-3


def test_gather_s_levels_with_halos_of_their_own_leave_no_seam(monkeypatch):
    """Wide enough blur for several halos; gradients by all four inputs."""
    aif, depth, focus, _ = scene(90, 110, 2)

    def values():
        inputs = [t.clone().requires_grad_() for t in (aif, depth, focus, torch.full((1, 2), 40.0, dtype=F64))]
        out = render_stack(*inputs, model="gather", gaussian_gain=0.25)
        teacher = torch.rand(out.shape, generator=torch.Generator().manual_seed(4), dtype=F64)
        return [out, *torch.autograd.grad((out * teacher).sum(), inputs)]

    variances = [(10 * (q - depth)) ** 2 + 0.09 for q in focus[0]]
    assert len(render_module.Scales.covering(variances).by_reach) > 1
    whole = values()
    monkeypatch.setattr(render_module, "_tiles", tiles_of_35)
    for a, b in zip(values(), whole, strict=True):
        assert relative(a, b) < 1e-5


@pytest.mark.parametrize("psf", [Psf("disc", floor_px=0.0), Psf("disc"), Psf("gaussian", 0.25, 0.0), Psf("gaussian")])
@pytest.mark.parametrize("coc", [0.0, 0.3, 1.0, 2.0, 5.0, 12.0, 25.0, 80.0])
def test_kernels_keep_energy_positivity_and_second_moment(psf, coc):
    reach = psf.reach_px(coc)
    spectrum = Spectrum(4 * reach, 4 * reach, F64, torch.device("cpu"))
    transfer = spectrum.transfer(torch.tensor([coc], dtype=F64), psf)
    point = torch.zeros(2 * reach + 1, 2 * reach + 1, dtype=F64)
    point[reach, reach] = 1
    everywhere = slice(0, 2 * reach + 1)
    kernel = spectrum.inverse(transfer[0] * spectrum.forward(point), everywhere, everywhere)
    assert kernel.sum() == pytest.approx(1, abs=1e-4)  # what lies beyond the reach
    assert kernel.min() > -1e-9
    offsets = torch.arange(-reach, reach + 1) ** 2
    gain = 0.25 if psf.shape == "disc" else psf.gain
    for axis in (0, 1):
        variance = (kernel.sum(axis) * offsets).sum()
        assert variance == pytest.approx((gain * coc) ** 2 + psf.floor_px**2, rel=5e-3, abs=1e-6)
    if psf.shape == "disc" and psf.floor_px == 0 and 0 < coc < 80:
        taps = render_reference.disc_taps(coc)
        inner = reach - taps.shape[0] // 2
        assert (kernel[inner : inner + taps.shape[0], inner : inner + taps.shape[0]] - taps).abs().sum() < 5e-3
