from __future__ import annotations

import json

import cv2
import numpy as np
import pytest

from capture.errors import DataError
from capture.scenes import Scene, load_scene, motorcycle, procedural_scene, rgbd_scenes, sensor_blurred


def write_scene(folder, rgb=None, depth_mm=None, focal_px=None):
    folder.mkdir(parents=True, exist_ok=True)
    if rgb is None:
        rgb = np.full((6, 8, 3), (200, 100, 50), np.uint8)
    if depth_mm is None:
        depth_mm = np.full((6, 8), 1500, np.uint16)
    cv2.imwrite(str(folder / "rgb.png"), rgb[..., ::-1])
    cv2.imwrite(str(folder / "depth.png"), depth_mm)
    if focal_px is not None:
        (folder / "scene.json").write_text(json.dumps({"focal_px": focal_px}))
    return folder


def test_folder_gives_linear_light_and_metres(tmp_path):
    depth_mm = np.full((6, 8), 1500, np.uint16)
    depth_mm[0, 0] = 0
    scene = load_scene(write_scene(tmp_path / "a", depth_mm=depth_mm, focal_px=500.0))
    assert scene.name == "a" and scene.focal_px == 500.0
    assert scene.aif.dtype == scene.depth_m.dtype == np.float32
    np.testing.assert_allclose(scene.aif[2, 3], [0.5776, 0.1274, 0.0319], atol=1e-4)  # IEC 61966-2-1 of 200, 100, 50
    assert np.isnan(scene.depth_m[0, 0]) and scene.depth_m[3, 3] == np.float32(1.5)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "depth.png").unlink(), "missing"),
        (lambda folder: (folder / "rgb.png").write_bytes(b"not an image"), "not a readable image"),
        (lambda folder: cv2.imwrite(str(folder / "depth.png"), np.zeros((6, 8), np.uint8)), "16-bit"),
        (lambda folder: cv2.imwrite(str(folder / "depth.png"), np.ones((5, 8), np.uint16)), "must match"),
        (lambda folder: (folder / "scene.json").write_text("[1"), "scene.json"),
        (lambda folder: (folder / "scene.json").write_text('{"focal_px": "long"}'), "focal_px"),
    ],
)
def test_damaged_folder_is_refused_by_name(tmp_path, damage, words):
    folder = write_scene(tmp_path / "broken")
    damage(folder)
    with pytest.raises(DataError, match=words) as error:
        load_scene(folder)
    assert "broken" in str(error.value)


def test_scenes_of_a_root_are_sorted_and_an_empty_root_is_refused(tmp_path):
    write_scene(tmp_path / "b")
    write_scene(tmp_path / "a")
    assert [scene.name for scene in rgbd_scenes(tmp_path)] == ["a", "b"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no scene folder"):
        rgbd_scenes(tmp_path / "empty")


def test_unknown_depth_is_filled_with_the_farther_neighbour():
    depth_m = np.full((20, 30), 1.0, np.float32)
    depth_m[:, 15:] = 4.0
    depth_m[5:15, 12:18] = np.nan
    scene = Scene(np.zeros((20, 30, 3), np.float32), depth_m, "edge")
    filled = scene.filled_inverse_depth_dpt()
    np.testing.assert_allclose(filled[7:13, 13:17], 0.25)
    assert (filled[np.isfinite(depth_m)] == 1 / depth_m[np.isfinite(depth_m)]).all()


def test_scene_without_any_depth_is_refused():
    with pytest.raises(DataError, match="no pixel"):
        Scene(np.zeros((4, 4, 3), np.float32), np.full((4, 4), np.nan, np.float32), "void").filled_inverse_depth_dpt()


def test_motorcycle_depth_follows_the_published_calibration():
    from skimage import data

    scene = motorcycle()
    disparity_px = data.stereo_motorcycle()[2]
    assert scene.aif.shape == (500, 741, 3) and 0.92 < np.isfinite(scene.depth_m).mean() < 0.93
    assert scene.depth_m[250, 300] == pytest.approx(994.978 * 0.193001 / (disparity_px[250, 300] + 31.086), rel=1e-6)
    assert 2.0 < np.nanmin(scene.depth_m) < np.nanmax(scene.depth_m) < 5.1


def test_resizing_averages_light_and_never_invents_a_depth():
    scene = motorcycle()
    small = scene.resized(250, 370)
    assert small.aif.shape == (250, 370, 3) and small.focal_px == pytest.approx(994.978 * 370 / 741)
    assert small.aif.mean() == pytest.approx(scene.aif.mean(), rel=2e-3)
    known = small.depth_m[np.isfinite(small.depth_m)]
    assert np.isin(known, scene.depth_m).all()


def test_procedural_scene_repeats_bit_for_bit_and_differs_between_seeds():
    first, again, other = (procedural_scene(seed, 96, 128) for seed in (5, 5, 6))
    assert (first.aif == again.aif).all() and (first.depth_m == again.depth_m).all()
    assert not np.array_equal(first.aif, other.aif)


def test_procedural_scenes_fill_their_range_and_vary():
    scenes = [procedural_scene(seed, 96, 128, near_m=0.5, far_m=4.0) for seed in range(12)]
    for scene in scenes:
        assert scene.aif.dtype == np.float32 and scene.aif.min() >= 0 and scene.aif.max() <= 1
        assert np.isfinite(scene.depth_m).all()
        assert scene.depth_m.min() >= 0.5 - 1e-4 and scene.depth_m.max() <= 4.0 + 1e-4
        assert scene.unmixed_aif is not None
        np.testing.assert_array_equal(sensor_blurred(scene.unmixed_aif), scene.aif)
    assert np.mean([scene.depth_m.max() / scene.depth_m.min() for scene in scenes]) > 3
    assert np.std([scene.aif.mean() for scene in scenes]) > 0.03


def test_hidden_surfaces_lie_behind_what_hides_them():
    for seed in range(8):
        scene = procedural_scene(seed, 96, 128)
        assert scene.hidden_depth_m is not None
        hidden = np.isfinite(scene.hidden_depth_m)
        assert hidden.mean() > 0.02
        assert (scene.hidden_depth_m[hidden] >= scene.depth_m[hidden] * (1 - 1e-5)).all()


def test_low_texture_share_controls_how_much_is_plain():
    def detail(share):
        edges = [cv2.Laplacian(procedural_scene(seed, 96, 128, low_texture=share).aif, cv2.CV_32F) for seed in range(6)]
        return np.mean([np.median(np.abs(edge)) for edge in edges])

    assert detail(1.0) < 0.3 * detail(0.0)
