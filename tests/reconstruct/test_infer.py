"""One stack in, depth out: right, tiled as untiled, at any working scale, honest when uncalibrated."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
import skimage.data
import torch

from capture.errors import DataError, UsageError
from capture.lens import Lens
from capture.optics import Condition, simulate_sweep
from capture.scenes import procedural_scene
from capture.stack import FocalStack, write_stack
from reconstruct import infer
from reconstruct.dataset import load_captured
from reconstruct.device import pick_device
from reconstruct.first_look import first_look
from reconstruct.infer import Settings, reconstruct
from reconstruct.job import Job, process_stack
from reconstruct.methods import METHODS, PlaneSweep
from reconstruct.result import load
from tests.reconstruct.small_stack import FOCUS_DPT, LENS, small_scene, write_small_stack

CPU = Settings(method="plane-sweep", device="cpu")


def blur_error_px(answer, scene):
    return np.abs(answer.inverse_depth_dpt - 1 / scene.depth_m) * answer.kappa_px_per_dpt.mean()


@pytest.fixture(scope="module")
def stack_file(tmp_path_factory):
    return write_small_stack(tmp_path_factory.mktemp("stacks") / "small.h5")


def test_depth_in_metres_and_a_sharp_picture(stack_file):
    with FocalStack.open(stack_file) as stack:
        answer = reconstruct(stack, CPU)
        sharpest = max(np.mean((stack.linear(i) - stack.truth_aif) ** 2) ** -1 for i in range(stack.n_frames))
    assert answer.metric
    assert np.median(blur_error_px(answer, small_scene())) < 0.3
    assert 1 / np.mean((answer.aif - small_scene().aif) ** 2) > 2 * sharpest
    assert answer.record["optics"]["source"] == "thin lens"


def test_exposure_that_drifts_is_evened_out(tmp_path):
    """In reconstruction and fine-tuning; the all-in-focus image would show patches of it (a drift of 14 %: 3.6 %)."""
    condition = Condition(noise_std=0.003, bits=None)
    drift = 1.0, 1.08, 0.94, 1.05
    answers = []
    for name, factors in (("even", None), ("drifting", drift)):
        path = write_small_stack(tmp_path / f"{name}.h5", condition=condition, drift=factors)
        with FocalStack.open(path) as stack:
            answers.append(reconstruct(stack, Settings(device="cpu", refine_steps=4)))
    even, drifting = answers
    assert np.ptp(even.record["exposure_factors"]) < 0.01
    assert np.ptp(np.array(drifting.record["exposure_factors"]) * drift) < 0.01
    assert not even.record["warnings"]
    assert "brightness differs between frames by 1" in drifting.record["warnings"][0]
    ratio = drifting.aif / even.aif
    assert np.abs(ratio / ratio.mean() - 1).mean() < 0.01
    errors = [blur_error_px(answer, small_scene()).mean() for answer in answers]
    assert errors[1] < 1.1 * errors[0]
    loaded = load_captured(tmp_path / "drifting.h5").frames.mean((1, 2, 3))
    assert loaded.max() / loaded.min() < 1.01


def test_wrong_focus_distances_are_corrected(tmp_path, stack_file):
    """In reconstruction and fine-tuning, unless they are said to be exact; the user is told, and may object."""
    wrong = 1 / np.array([1.0, 0.92, 0.6, 0.4])  # the second was taken at 0.8
    path = write_small_stack(tmp_path / "wrong.h5", focus_distance_m=wrong)
    exact = write_small_stack(tmp_path / "exact.h5", focus_distance_m=wrong, focus_distance_std_m=0.0)
    with FocalStack.open(stack_file) as right, FocalStack.open(path) as stack, FocalStack.open(exact) as believed:
        best, corrected, left, trusted = (
            reconstruct(*settled)
            for settled in ((right, CPU), (stack, CPU), (stack, replace(CPU, fit_focus=False)), (believed, CPU))
        )
    assert corrected.record["optics"]["told_focus_dpt"] == pytest.approx(1 / wrong)
    assert corrected.focus_dpt[1] == pytest.approx(0.8, abs=0.06)
    assert "frame 1 at 1.1" in corrected.record["warnings"][0]
    assert "instead of 1.09 m" in corrected.record["warnings"][0]
    np.testing.assert_allclose(best.focus_dpt, FOCUS_DPT, atol=0.01)
    assert not best.record["warnings"] + left.record["warnings"] + trusted.record["warnings"]
    np.testing.assert_allclose([left.focus_dpt, trusted.focus_dpt], [1 / wrong] * 2)
    errors = [blur_error_px(answer, small_scene()).mean() for answer in (best, corrected, left)]
    assert errors[1] - errors[0] < 0.5 * (errors[2] - errors[0])
    np.testing.assert_allclose(load_captured(path).focus_dpt, corrected.focus_dpt, atol=0.01)
    np.testing.assert_allclose(load_captured(exact).focus_dpt, 1 / wrong, rtol=1e-6)


@pytest.mark.parametrize(("method", "max_coc_px"), [("plane-sweep", 40.0), ("plane-sweep", 6.0), ("network", 40.0)])
def test_tiles_leave_no_trace(tmp_path, monkeypatch, method, max_coc_px):
    """Plain surfaces, breathing, a size that no tile divides, full size and half: the same at every pixel."""
    scene = procedural_scene(3, 350, 340)
    condition = Condition(noise_std=0.005, breathing=-0.01)
    settings = Settings(method=method, device="cpu", max_coc_px=max_coc_px)
    with FocalStack.open(write_small_stack(tmp_path / "plain.h5", scene=scene, condition=condition)) as stack:
        whole = reconstruct(stack, settings)
        monkeypatch.setattr(infer, "TILE_PX", 32 if max_coc_px == 6 else 80)
        if method == "plane-sweep":
            monkeypatch.setattr(METHODS[method], "halo_px", 48)
        tiled = reconstruct(stack, settings)
    assert tiled.record["working_scale"] == (0.5 if max_coc_px == 6 else 1.0)
    for name in ("inverse_depth_dpt", "std_dpt", "confidence", "aif"):
        difference = np.abs(getattr(tiled, name) - getattr(whole, name))
        assert difference.max() < 1e-4, name


def write_six_megapixels(path):
    """Breathing, noise, a blank wall; simulated at half the size, because that takes 15 s instead of a minute."""
    pitch_m = 1.25e-5
    scene, lens = procedural_scene(5, 1024, 1536), Lens(focal_length_m=0.05, f_number=2.8, pixel_pitch_m=2 * pitch_m)
    sweep = simulate_sweep(scene, lens, np.linspace(1.0, 0.4, 5), Condition(breathing=-0.01), seed=1, quality="fast")
    full_scale, noise = np.iinfo(sweep.frames.dtype).max, np.random.default_rng(0)
    frames = []
    for frame in sweep.frames:
        large = cv2.resize(frame, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC) / full_scale
        large += noise.normal(0, 0.006, large.shape)
        frames.append(np.clip(np.rint(255 * large), 0, 255).astype(np.uint8))
    optics = {"lens": lens.model_copy(update={"pixel_pitch_m": pitch_m}), "transfer": sweep.transfer}
    write_stack(path, np.stack(frames), focus_distance_m=1 / sweep.focus_dpt, **optics)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("method", ["plane-sweep", "network"])
def test_six_megapixels_in_tiles(tmp_path, monkeypatch, method):
    with FocalStack.open(write_six_megapixels(tmp_path / "six.h5")) as stack:
        tiled = reconstruct(stack, Settings(method=method, device="cpu"))
        monkeypatch.setattr(infer, "TILE_PX", stack.width)
        whole = reconstruct(stack, Settings(method=method, device="cpu"))
    difference_dpt = np.abs(tiled.inverse_depth_dpt - whole.inverse_depth_dpt)
    print(f"largest difference {difference_dpt.max():.1e} dpt")
    assert difference_dpt.max() < 1e-3


def test_the_sweep_beside_the_network_shares_its_evidence(stack_file, monkeypatch):
    """In tiles too, the picture is compared and smoothed once, and the baseline is what the sweep alone would say."""
    monkeypatch.setattr(infer, "TILE_PX", 32)
    for method in METHODS.values():
        monkeypatch.setattr(method, "halo_px", 16)
    smoothings, smooth = [], PlaneSweep.smooth
    monkeypatch.setattr(PlaneSweep, "smooth", lambda *given: smoothings.append(1) or smooth(*given))
    with FocalStack.open(stack_file) as stack:
        both = reconstruct(stack, Settings(device="cpu", compare=True))
        assert len(smoothings) == 1
        alone = reconstruct(stack, CPU)
    assert both.record["method"]["name"] == "network"
    assert np.array_equal(both.baseline.inverse_depth_dpt, alone.inverse_depth_dpt)


def test_the_networks_depth_is_evened_unless_refined(stack_file, monkeypatch):
    finished = []
    monkeypatch.setattr("reconstruct.methods.evened", lambda estimate, kappa: finished.append(kappa) or estimate)
    with FocalStack.open(stack_file) as stack:
        plain = reconstruct(stack, Settings(device="cpu"))
        reconstruct(stack, Settings(device="cpu", refine_steps=2))
        reconstruct(stack, CPU)
        monkeypatch.undo()
        shown = reconstruct(stack, Settings(device="cpu"))
    assert len(finished) == 1
    np.testing.assert_allclose(finished[0], plain.kappa_px_per_dpt, rtol=1e-6)
    assert not np.array_equal(plain.inverse_depth_dpt, shown.inverse_depth_dpt)


def test_wide_blur_is_worked_on_at_a_smaller_scale(stack_file):
    with FocalStack.open(stack_file) as stack:
        answer = reconstruct(stack, Settings(device="cpu", max_coc_px=6.0))
    assert answer.record["working_scale"] == 1.0  # too small a picture to reduce further
    scene = small_scene(160, 192)
    with FocalStack.open(write_small_stack(stack_file.with_name("larger.h5"), scene=scene)) as stack:
        answer = reconstruct(stack, Settings(device="cpu", max_coc_px=6.0))
    assert answer.record["working_scale"] == 0.5
    assert answer.aif.shape == (160, 192, 3)
    assert np.median(blur_error_px(answer, scene)) < 0.5


def test_uncalibrated_depth_is_relative_and_ordered(tmp_path):
    path = write_small_stack(tmp_path / "relative.h5", lens=None, calibrated=False)
    with FocalStack.open(path) as stack:
        answer = reconstruct(stack, CPU)
    assert not answer.metric
    assert "no unit" in answer.record["warnings"][0]
    depth, truth = answer.depth, small_scene().depth_m
    square = truth < 1.2
    assert np.median(depth[square]) < np.median(depth[~square])
    assert np.corrcoef(answer.inverse_depth_dpt.ravel(), 1 / truth.ravel())[0, 1] > 0.9


@pytest.mark.parametrize("method", ["network", "plane-sweep"])
def test_relative_depth_goes_on_beyond_the_last_frame(tmp_path, method):
    near = small_scene()
    inverse = np.minimum(1 / near.depth_m, 0.95) - 0.12  # up to 1.8 px of blur beyond
    path = write_small_stack(tmp_path / "far.h5", scene=replace(near, depth_m=1 / inverse), lens=None, calibrated=False)
    with FocalStack.open(path) as stack:
        answer = reconstruct(stack, Settings(method=method, device="cpu", fit_focus=False))
    beyond = inverse < 0.36
    assert np.median(answer.depth[beyond]) > 1.0
    assert np.mean(answer.depth[beyond] == 1.0) < 0.1


def test_distances_without_a_lens_give_metres_and_say_how(tmp_path):
    path = write_small_stack(tmp_path / "distances.h5", lens=None)
    with FocalStack.open(path) as stack:
        answer = reconstruct(stack, CPU)
    assert answer.metric
    assert answer.record["optics"]["source"] == "focus distances only"
    assert np.median(np.abs(answer.inverse_depth_dpt - 1 / small_scene().depth_m)) < 0.05


def test_a_focus_beyond_infinity_is_not_reported(tmp_path, monkeypatch):
    focus_dpt = np.array([1.0, 0.7, 0.3, 0.0])
    path = write_small_stack(tmp_path / "far.h5", focus_distance_m=[1.0, 1 / 0.7, 1 / 0.3, np.inf])
    found = torch.tensor([1.0, 0.6, 0.3, -0.1])
    monkeypatch.setattr(infer, "picture_focus", lambda *given: found)
    with FocalStack.open(path) as stack:
        answer = reconstruct(stack, CPU)
    np.testing.assert_allclose(answer.record["optics"]["told_focus_dpt"], focus_dpt)
    np.testing.assert_allclose(answer.focus_dpt, found)
    assert "corrected: frame 1 at 1.67 m instead of 1.43 m; " in answer.record["warnings"][0]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("lens", [LENS, None])
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (40, 1), (3, 40), (1, 3000), (2000, 6)])
def test_pictures_of_any_size_are_answered(tmp_path, size, lens):
    picture = np.random.default_rng(0).random((*size, 3)).astype(np.float32)
    frames = np.stack([cv2.GaussianBlur(picture, (0, 0), 0.5 + i).reshape(*size, 3) for i in range(4)])
    path = write_stack(tmp_path / "odd.h5", frames, focus_distance_m=1 / np.array(FOCUS_DPT), lens=lens)
    process_stack(str(path), Job(str(tmp_path / "out"), CPU))
    assert load(tmp_path / "out" / "odd").depth.shape == size
    with FocalStack.open(path) as stack:
        assert first_look(stack, None, pick_device("cpu")).n_frames == 4


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("refine_steps", [0, 2])
@pytest.mark.parametrize("method", ["network", "plane-sweep"])
def test_black_frames_are_answered_in_numbers(tmp_path, method, refine_steps):
    frames = np.zeros((4, 48, 64, 3), np.uint8)
    path = write_stack(tmp_path / "black.h5", frames, focus_distance_m=1 / np.array(FOCUS_DPT), lens=LENS)
    with FocalStack.open(path) as stack:
        answer = reconstruct(stack, Settings(method=method, device="cpu", refine_steps=refine_steps))
    for name in ("inverse_depth_dpt", "std_dpt", "confidence", "aif"):
        assert np.isfinite(getattr(answer, name)).all(), name


def test_breathing_is_removed(tmp_path):
    path = write_small_stack(
        tmp_path / "breathing.h5",
        scene=small_scene(144, 192),
        condition=Condition(noise_std=0.003, breathing=-0.03),
    )
    with FocalStack.open(path) as stack:
        answer = reconstruct(stack, CPU)
    scales = np.array(answer.record["alignment"]["scales"])
    np.testing.assert_allclose(scales[0] / scales[-1], 0.97, atol=0.004)


def test_frames_that_do_not_belong_together_are_refused(tmp_path):
    pictures = skimage.data.coffee()[:400, :500], skimage.data.astronaut()[:400, :500]
    frames = np.stack([pictures[i] for i in (0, 0, 1, 0)])
    path = tmp_path / "strangers.h5"
    write_stack(path, frames, focus_distance_m=1 / np.array(FOCUS_DPT), lens=LENS, transfer="srgb")
    with FocalStack.open(path) as stack, pytest.raises(DataError, match=r"strangers\.h5.*--allow-misaligned"):
        reconstruct(stack, CPU)


def test_an_absent_gpu_is_one_sentence(stack_file):
    with FocalStack.open(stack_file) as stack, pytest.raises(UsageError, match="CUDA"):
        reconstruct(stack, Settings(device="cuda:7"))


def test_guided_filter_follows_the_guide():
    guide = np.zeros((40, 40), np.float32)
    guide[:, 20:] = 1
    rough = np.tile(np.clip((np.arange(40) - 15) / 10, 0, 1).astype(np.float32), (40, 1))
    sharp = infer.guided_filter(guide, rough, radius=6, epsilon=1e-4)
    assert sharp[20, 20] - sharp[20, 19] > 0.4
