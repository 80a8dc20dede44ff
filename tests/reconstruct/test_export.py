"""Files that other programs read, checked with those programs' readers."""

import json

import cv2
import numpy as np
import pytest
import trimesh

from reconstruct import export


@pytest.fixture
def scene():
    depth_m = np.full((12, 16), 2.0, np.float32)
    depth_m[:, 8:] = 3.0
    depth_m[0, 0] = np.nan
    rgb = np.zeros((12, 16, 3), np.uint8)
    rgb[..., 0] = 200
    return depth_m, rgb, export.Intrinsics(20.0, 7.5, 5.5)


def test_depth_png_is_millimetres_with_zero_unknown(tmp_path, scene):
    depth_m = scene[0].copy()
    depth_m[1, 1] = 70.0
    assert export.write_depth_png(tmp_path / "depth.png", depth_m) == 1
    stored = cv2.imread(str(tmp_path / "depth.png"), cv2.IMREAD_UNCHANGED)
    assert stored.dtype == np.uint16
    assert stored[0, 0] == 0 and stored[1, 1] == 0 and stored[5, 2] == 2000 and stored[5, 12] == 3000


def test_depth_png_in_micrometres(tmp_path):
    export.write_depth_png(tmp_path / "d.png", np.full((2, 2), 0.0301, np.float32), "um")
    assert (cv2.imread(str(tmp_path / "d.png"), cv2.IMREAD_UNCHANGED) == 30100).all()


def test_png_keeps_colour_and_exif(tmp_path, scene):
    from PIL import Image

    exif = Image.Exif()
    exif[0x010F] = "Maker"
    block = exif.tobytes().removeprefix(b"Exif\0\0")
    export.write_png(tmp_path / "aif.png", scene[1], exif=block)
    with Image.open(tmp_path / "aif.png") as image:
        assert image.getexif()[0x010F] == "Maker"
        assert np.array_equal(np.asarray(image), scene[1])


def test_ply_reads_back_in_camera_coordinates(tmp_path, scene):
    depth_m, rgb, intrinsics = scene
    count = export.write_ply(tmp_path / "p.ply", depth_m, rgb, np.ones_like(depth_m), intrinsics)
    cloud = trimesh.load(tmp_path / "p.ply")
    assert count == depth_m.size - 1 == len(cloud.vertices)
    expected = export.back_project(depth_m, intrinsics).reshape(-1, 3)[1:]
    np.testing.assert_allclose(cloud.vertices, expected, atol=1e-6)
    assert (np.asarray(cloud.colors)[:, 0] == 200).all()


def test_ply_is_thinned_to_the_limit(tmp_path):
    depth_m = np.ones((100, 100), np.float32)
    rgb = np.zeros((100, 100, 3), np.uint8)
    intrinsics = export.Intrinsics.assume(100, 100)
    assert export.write_ply(tmp_path / "p.ply", depth_m, rgb, depth_m, intrinsics, max_points=2500) == 2500


def test_glb_mesh_is_open_at_the_depth_edge(tmp_path, scene):
    triangles = export.write_glb(tmp_path / "m.glb", *scene)
    mesh = trimesh.load(tmp_path / "m.glb", force="mesh")
    across_edge = (12 - 1) * 2  # the column of quads between the two depths
    at_the_hole = 2
    assert triangles == len(mesh.faces) == 11 * 15 * 2 - across_edge - at_the_hole
    assert mesh.bounds[:, 2].tolist() == [-3.0, -2.0]


def test_float_tiff_keeps_nan(tmp_path, scene):
    export.write_float_tiff(tmp_path / "d.tiff", scene[0])
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "d.tiff"), cv2.IMREAD_UNCHANGED), scene[0])


def test_exr_round_trip(tmp_path, scene):
    openexr = pytest.importorskip("OpenEXR", reason="the exr extra is not installed")
    linear = scene[1].astype(np.float32) / 255
    export.write_exr(tmp_path / "d.exr", scene[0], linear)
    with openexr.File(str(tmp_path / "d.exr")) as file:
        np.testing.assert_array_equal(file.channels()["Z"].pixels, scene[0])


def test_nerfstudio_names_its_files(tmp_path, scene):
    export.write_nerfstudio(tmp_path / "transforms.json", 12, 16, scene[2])
    document = json.loads((tmp_path / "transforms.json").read_text())
    assert document["frames"][0]["depth_file_path"] == "depth.png"
    assert (document["w"], document["h"], document["fl_x"]) == (16, 12, 20.0)


def test_near_is_red_and_unknown_is_grey():
    inverse = np.array([[0.1, 1.0, np.nan]])
    rgb, low, high = export.colorize_inverse_depth(inverse)
    assert rgb[0, 1, 0] > rgb[0, 0, 0] and tuple(rgb[0, 2]) == (40, 40, 40)
    assert 0.1 <= low < high <= 1.0
