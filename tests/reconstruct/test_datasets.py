"""Published data sets, read from tiny files of the same layout, become focal stacks with truth."""

import sys
import tracemalloc

import h5py
import numpy as np
import pytest

from capture.errors import DataError, SomeFailedError, UsageError
from capture.optics import NOTES_FOCUS_M, NOTES_LENS
from capture.stack import FocalStack
from reconstruct.datasets import Ddff12, import_dataset, open_dataset
from tests.reconstruct.tiny_datasets import (
    PX_M,
    ZEDD_DISTANCES_M,
    write_ddff12,
    write_defocusnet,
    write_mobile_depth,
    write_nyuv2,
    write_zedd,
)


def stack_of(path):
    with FocalStack.open(path, deep=True) as stack:
        truth = stack.truth_depth_m
        return stack, [stack.raw(i) for i in range(stack.n_frames)], truth


@pytest.mark.parametrize("renderer", ["aperture", "published"])
def test_nyuv2_is_rendered_with_the_published_camera(tmp_path, renderer):
    path, images, depth = write_nyuv2(tmp_path)
    import_dataset("nyuv2", path, tmp_path / "out", renderer=renderer, limit=1)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["nyuv2_0002.h5"]  # the first of splits.mat's test scenes
    stack, frames, truth = stack_of(tmp_path / "out/nyuv2_0002.h5")
    assert (stack.width, stack.height, stack.n_frames) == (320, 240, 5)
    assert stack.lens == NOTES_LENS
    np.testing.assert_allclose(stack.focus_distance_m, NOTES_FOCUS_M)
    assert truth.max() <= 10
    np.testing.assert_allclose(truth[20:, 20:], depth[1][40::2, 40::2], atol=0.02)  # upright, not mirrored
    # the frame focused nearest shows the near columns as the photograph has them, the far ones blurred
    sharp = images[1].reshape(240, 2, 320, 2, 3).mean(axis=(1, 3))
    error = np.abs(frames[1] - sharp)[:60].mean(axis=(0, 2))
    assert error[10:40].mean() < 0.5 * error[250:300].mean()
    assert stack.transfer == {"aperture": "srgb", "published": "linear"}[renderer]


def test_published_frames_are_those_of_the_generator_s_formula(tmp_path):
    """One pixel by hand: 7 x 7 Gaussian of every source's own radius, sources below 1 px left out, cut to 8 bit."""
    path, images, depth = write_nyuv2(tmp_path)
    import cv2

    sample = open_dataset("nyuv2", path, "all", "published").sample("nyuv2_0001")
    aif = cv2.resize(images[0], (320, 240)) / 255
    small = cv2.resize(np.clip(depth[0], 0.1, 10), (320, 240))
    focus_m, row, col = 1.0, 120, 300
    f, n, pitch = 0.05, 8.0, 1.2e-5
    sensor_m = focus_m * f / (focus_m - f)

    def radius_px(z):
        return f / n * sensor_m * abs(1 / f - 1 / sensor_m - 1 / z) / 2 / pitch

    assert radius_px(small[row, col]) > 1
    total, weight = np.zeros(3), 0.0
    for dy in range(-3, 4):
        for dx in range(-3, 4):
            c = radius_px(small[row + dy, col + dx])
            if c > 1:
                g = np.exp(-2 * (dx * dx + dy * dy) / c**2) / c**2
                total += g * aif[row + dy, col + dx]
                weight += g
    np.testing.assert_allclose(sample.frames[0, row, col], np.floor(total / weight * 255), atol=1)


def test_nyuv2_splits(tmp_path):
    path, *_ = write_nyuv2(tmp_path)
    assert list(open_dataset("nyuv2", path, "train").scenes) == ["nyuv2_0001"]
    assert len(open_dataset("nyuv2", path, "all").scenes) == 3
    (tmp_path / "splits.mat").unlink()
    with pytest.raises(DataError, match=r"splits\.mat is missing.*--split all"):
        open_dataset("nyuv2", path)


def test_defocusnet(tmp_path):
    pytest.importorskip("OpenEXR")
    depths = write_defocusnet(tmp_path / "fs_6")
    import_dataset("defocusnet", tmp_path / "fs_6", tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["defocusnet_000400.h5", "defocusnet_000401.h5"]
    stack, frames, truth = stack_of(tmp_path / "out/defocusnet_000400.h5")
    np.testing.assert_allclose(stack.focus_distance_m, [0.1, 0.15, 0.3, 0.7, 1.5])
    assert [int(frame[3, 3, 0]) for frame in frames] == [0, 40, 80, 120, 160]  # in order; red first
    assert np.isnan(truth[0, 0])
    np.testing.assert_allclose(truth[1:], depths[400][1:])
    # kappa = f^2 / (N p) / (1 - f q): 0.69 px per dioptre of a 2.9 mm f/1 lens over 3.1 mm in 256 px
    assert stack.lens.kappa_px_per_dpt(0.0) == pytest.approx(2.9e-3**2 / (3.1e-3 / 256))


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
@pytest.mark.parametrize("extra_axis", [False, True])
def test_ddff12(tmp_path, kind, extra_axis):
    disparity = write_ddff12(tmp_path / "ddff.h5", kind=kind, extra_axis=extra_axis)
    import_dataset("ddff12", tmp_path / "ddff.h5", tmp_path / "out")
    stack, frames, truth = stack_of(tmp_path / "out/ddff12_val_0001.h5")
    with h5py.File(tmp_path / "ddff.h5") as file:
        np.testing.assert_array_equal(np.stack(frames), file["stack_val"][1].astype(np.uint8))
    assert stack.focus_distance_m[[0, -1]] == pytest.approx([0.5, 7.0])
    np.testing.assert_allclose(np.diff(1 / stack.focus_distance_m), (1 / 7 - 2) / 9)  # even in dioptres
    assert np.isnan(truth[:3, :4]).all()
    np.testing.assert_allclose(truth[3:], PX_M / disparity[1][3:], rtol=1e-6)


def test_ddff12_frames_can_be_chosen(tmp_path):
    write_ddff12(tmp_path / "ddff.h5")
    import_dataset("ddff12", tmp_path / "ddff.h5", tmp_path / "out", frames=(0, 2, 4, 6, 9), limit=1)
    stack, frames, _ = stack_of(tmp_path / "out/ddff12_val_0000.h5")
    assert len(frames) == 5
    np.testing.assert_allclose(PX_M / stack.focus_distance_m, np.linspace(PX_M / 0.5, PX_M / 7, 10)[[0, 2, 4, 6, 9]])


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        ((0, 10), "asks for 10, but the stacks have frames 0 to 9"),
        ((-1, 0), "asks for -1, but the stacks have frames 0 to 9"),
        ((3,), "asks for 3 alone, but depth needs at least two frames"),
    ],
)
def test_frames_that_cannot_be_chosen_are_named(tmp_path, frames, words):
    write_ddff12(tmp_path / "ddff.h5")
    with pytest.raises(UsageError, match=words):
        import_dataset("ddff12", tmp_path / "ddff.h5", tmp_path / "out", frames=frames)


@pytest.mark.parametrize("out", ["ddff.h5/out", "/proc/out"])
def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path, out):
    write_ddff12(tmp_path / "ddff.h5")
    with pytest.raises(UsageError, match="choose another output folder with -o"):
        import_dataset("ddff12", tmp_path / "ddff.h5", tmp_path / out)


def test_ddff12_lens_blurs_as_the_refocused_views_do():
    """A point refocused over 9 x 9 views spreads to their shifts; the lens is the disc of the same second moment."""
    depth_m, focus_m = 0.7, 3.0
    defocus_px = PX_M / focus_m - PX_M / depth_m
    shifts = [(5 - u) * defocus_px for u in range(1, 10) for _ in range(1, 10)]
    coc_px = Ddff12.lens.kappa_px_per_dpt(1 / focus_m) * (1 / focus_m - 1 / depth_m)
    assert np.var(shifts) == pytest.approx(coc_px**2 / 16, rel=3e-3)


def test_ddff12_reads_one_scene_at_a_time(tmp_path):
    """A file of 25 GB on paper, nothing of it allocated: opening and reading a scene needs that scene's memory."""
    with h5py.File(tmp_path / "big.h5", "w") as file:
        shape = (4000, 10, 383, 552, 3)
        file.create_dataset("stack_val", shape, np.uint8, chunks=(1, 1, 383, 552, 3), fillvalue=128)
        file.create_dataset("disp_val", shape[:1] + shape[2:4], np.float32, chunks=(1, 383, 552), fillvalue=0.1)
    data = open_dataset("ddff12", tmp_path / "big.h5")
    tracemalloc.start()
    sample = data.sample("ddff12_val_3999")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sample.frames.shape == shape[1:]
    assert peak < 4 * sample.frames.nbytes + 4 * 383 * 552 * 8


def test_zedd(tmp_path):
    depths = write_zedd(tmp_path / "ZEDD")
    import_dataset("zedd", tmp_path / "ZEDD", tmp_path / "out")
    stack, frames, truth = stack_of(tmp_path / "out/zedd_val_0002.h5")
    assert (stack.width, stack.height) == (640, 480)
    np.testing.assert_allclose(stack.focus_distance_m, ZEDD_DISTANCES_M[::2])
    assert [int(frame[240, 320, 1]) for frame in frames] == [20, 60, 100, 140, 180]  # runs 1, 3, 5, 7, 9
    # 228 x 152 becomes 720 x 480, its middle 640 columns stay: column c shows source column (c + 40) / 720 * 228
    np.testing.assert_allclose(frames[0][240, :, 0], (np.arange(640) + 40.5) * 228 / 720 - 0.5, atol=3)
    expected = np.empty((480, 640), np.float32)
    source = depths["zedd_val_0002"]
    for row in range(480):
        for col in range(640):
            expected[row, col] = source[int((row + 0.5) * 152 / 480), int((col + 40 + 0.5) * 228 / 720)]
    known = np.isfinite(expected) & (expected >= 0.01)
    assert not known.all()
    np.testing.assert_array_equal(np.isfinite(truth), known)
    np.testing.assert_allclose(truth[known], expected[known])


def test_zedd_test_split_has_frames_but_no_truth(tmp_path):
    write_zedd(tmp_path / "ZEDD", scenes=1)
    data = open_dataset("zedd", tmp_path / "ZEDD", "test")
    sample = data.sample("zedd_test_0001")
    assert sample.frames.shape == (5, 1216, 1824, 3)
    assert sample.truth_depth_m is None
    with pytest.raises(DataError, match="server"):
        data.truth("zedd_test_0001")


@pytest.mark.parametrize("reorganised", [True, False])
def test_mobile_depth(tmp_path, capsys, reorganised):
    distances = write_mobile_depth(tmp_path / "mobile", reorganised=reorganised)
    import_dataset("mobile-depth", tmp_path / "mobile", tmp_path / "out")
    for name in ("balls", "metals"):  # the list of `metals` is stored backwards
        stack, frames, _ = stack_of(tmp_path / f"out/mobile_{name}.h5")
        np.testing.assert_allclose(stack.focus_distance_m, distances, rtol=1e-4)
        assert [int(frame.mean()) for frame in frames] == [10 * i for i in range(11)]  # a10 follows a9
    assert np.isnan(stack_of(tmp_path / "out/mobile_window.h5")[0].focus_distance_m).all()
    assert "mobile_window becomes uncalibrated: " in capsys.readouterr().err


def test_a_second_run_does_only_what_is_missing(tmp_path, capsys):
    write_ddff12(tmp_path / "ddff.h5")
    out = tmp_path / "out"
    import_dataset("ddff12", tmp_path / "ddff.h5", out, limit=1)
    (out / "ddff12_val_0001.h5.partial").write_bytes(b"cut off")
    before = (out / "ddff12_val_0000.h5").stat().st_mtime_ns
    import_dataset("ddff12", tmp_path / "ddff.h5", out)
    assert (out / "ddff12_val_0000.h5").stat().st_mtime_ns == before
    assert "already there" in capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == ["ddff12_val_0000.h5", "ddff12_val_0001.h5"]


def test_a_bad_scene_is_named_and_the_others_are_written(tmp_path, capsys):
    write_zedd(tmp_path / "ZEDD")
    missing = "img_run_3_motor_3B39_aperture_F2.8.jpg"
    (tmp_path / "ZEDD/val/val_0001/focus_stack" / missing).unlink()
    with pytest.raises(SomeFailedError, match="1 of 2 scenes"):
        import_dataset("zedd", tmp_path / "ZEDD", tmp_path / "out")
    assert missing in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["zedd_val_0002.h5"]


# --- what is not such a data set


def _without(field):
    def damage(folder):
        path, *_ = write_nyuv2(folder, height=12, width=16)
        with h5py.File(path, "a") as file:
            del file[field]
        return "nyuv2", path

    return damage


def _axes_not_reversed(folder):
    path, images, _ = write_nyuv2(folder, height=12, width=16)
    with h5py.File(path, "a") as file:
        del file["images"]
        file["images"] = images
    return "nyuv2", path


def _depths_of_another_size(folder):
    path, _, depth = write_nyuv2(folder, height=12, width=16)
    with h5py.File(path, "a") as file:
        del file["depths"]
        file["depths"] = depth[:, :10, :]
    return "nyuv2", path


def _bad_splits(text):
    def damage(folder):
        path, *_ = write_nyuv2(folder, height=12, width=16, test=(2, 99))
        if text is not None:
            (folder / "splits.mat").write_bytes(text)
        return "nyuv2", path

    return damage


def _no_hdf5(folder):
    (folder / "x.mat").write_bytes(b"MATLAB 5.0 MAT-file" + bytes(200))
    return "nyuv2", folder / "x.mat"


def _truncated(folder):
    write_ddff12(folder / "ddff.h5")
    data = (folder / "ddff.h5").read_bytes()
    (folder / "ddff.h5").write_bytes(data[: len(data) // 2])
    return "ddff12", folder / "ddff.h5"


def _grey_stack(folder):
    with h5py.File(folder / "d.h5", "w") as file:
        file["stack_val"] = np.zeros((2, 10, 8, 8), np.uint8)
    return "ddff12", folder / "d.h5"


def _other_disparities(folder):
    with h5py.File(folder / "d.h5", "w") as file:
        file["stack_val"] = np.zeros((2, 10, 8, 9, 3), np.uint8)
        file["disp_val"] = np.zeros((2, 9, 8), np.float32)
    return "ddff12", folder / "d.h5"


def _hostile_shape(folder):
    with h5py.File(folder / "d.h5", "w") as file:
        file.create_dataset("stack_val", (1, 10, 1 << 20, 1 << 20, 3), np.uint8, chunks=(1, 1, 64, 64, 3))
    return "ddff12", folder / "d.h5"


def _empty_folder(kind):
    def damage(folder):
        (folder / "empty").mkdir()
        return kind, folder / "empty"

    return damage


def _four_frames(folder):
    pytest.importorskip("OpenEXR")
    write_defocusnet(folder / "fs_6")
    (folder / "fs_6/000400_04All.tif").unlink()
    return "defocusnet", folder / "fs_6"


def _zedd_metadata(text):
    def damage(folder):
        write_zedd(folder / "ZEDD", scenes=1)
        (folder / "ZEDD/metadata.txt").write_text(text)
        return "zedd", folder / "ZEDD"

    return damage


def _no_calibration(folder):
    write_mobile_depth(folder / "m", reorganised=True)
    (folder / "m/balls/focus_dpth.txt").unlink()
    return "mobile-depth", folder / "m"


BAD = {
    "unknown set": (lambda d: ("kitti", d), UsageError, "unknown data set 'kitti'; it must be one of nyuv2, "),
    "not there": (lambda d: ("zedd", d / "none"), UsageError, "none does not exist"),
    "file for folder": (lambda d: ("zedd", _no_hdf5(d)[1]), UsageError, "is not a folder"),
    "folder for file": (lambda d: ("ddff12", d), UsageError, "is not a file"),
    "not HDF5": (_no_hdf5, DataError, "not a whole HDF5"),
    "truncated": (_truncated, DataError, "not a whole HDF5"),
    "no images": (_without("images"), DataError, "no data set images, found depths"),
    "no depths": (_without("depths"), DataError, "no data set depths, found images"),
    "axes": (_axes_not_reversed, DataError, r"images must be numbers of shape \(N, 3, W, H\), found \(3, 12, 16, 3\)"),
    "sizes differ": (_depths_of_another_size, DataError, r"depths must be \(3, 16, 12\) to match images"),
    "splits: other file": (_bad_splits(None), DataError, "testNdxs must hold scene numbers from 1 to 3"),
    "splits: no MATLAB": (_bad_splits(b"hello"), DataError, "is not MATLAB's splits.mat"),
    "grey stack": (_grey_stack, DataError, r"stack_val must be numbers of shape \(N, S, H, W, 3\), found \(2, 10, 8,"),
    "disparity": (_other_disparities, DataError, r"disp_val must be \(2, 8, 9\) to match its stacks, found \(2, 9,"),
    "hostile shape": (_hostile_shape, DataError, "stack_val must be numbers of shape"),
    "no FoD500": (_empty_folder("defocusnet"), DataError, r"holds no \*All.tif and \*Dpt.exr"),
    "four frames": (_four_frames, DataError, "scene 000400 must have a number, 5 .*, found 4 and 1"),
    "no metadata": (_empty_folder("zedd"), DataError, "metadata.txt is missing"),
    "metadata torn": (_zedd_metadata("run_1 6D3E 0.82\n"), DataError, "every line must be run, motor position"),
    "runs missing": (_zedd_metadata("run_1\t6D3E\t0.82\n"), DataError, "expected run_3, run_5, run_7, run_9"),
    "motor is a path": (
        _zedd_metadata("".join(f"run_{i}\t../x\t1.0\n" for i in range(1, 10))), DataError, "hexadecimal",
    ),
    "no stacks": (_empty_folder("mobile-depth"), DataError, "holds no folder with a1.jpg"),
    "no calibration": (_no_calibration, DataError, "has no focus_dpth.txt"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(tmp_path, case):
    damage, error, words = BAD[case]
    kind, source = damage(tmp_path)
    with pytest.raises(error, match=words) as caught:
        open_dataset(kind, source)
    assert "\n" not in str(caught.value)


def test_options_that_do_not_fit(tmp_path):
    path, *_ = write_nyuv2(tmp_path, height=12, width=16)
    with pytest.raises(UsageError, match="--split is 'val'; nyuv2 has test, train, all"):
        open_dataset("nyuv2", path, "val")
    with pytest.raises(UsageError, match="--renderer is 'magic'"):
        open_dataset("nyuv2", path, renderer="magic")
    with pytest.raises(UsageError, match="leave it out for ddff12"):
        open_dataset("ddff12", path, renderer="published")


def test_values_out_of_range_are_refused(tmp_path):
    with h5py.File(tmp_path / "d.h5", "w") as file:
        file["stack_val"] = np.full((1, 10, 8, 8, 3), 0.5, np.float32)
        file["disp_val"] = np.full((1, 8, 8), 0.1, np.float32)
    with pytest.raises(DataError, match="values from 0 to 255, found"):
        open_dataset("ddff12", tmp_path / "d.h5").sample("ddff12_val_0000")


def test_exr_that_cannot_be_read(tmp_path, monkeypatch):
    OpenEXR = pytest.importorskip("OpenEXR")
    write_defocusnet(tmp_path / "fs_6", numbers=(400,))
    data = open_dataset("defocusnet", tmp_path / "fs_6")
    path = tmp_path / "fs_6/000400Dpt.exr"
    with OpenEXR.File({}, {"Y": np.zeros((32, 32), np.float16)}) as file:
        file.write(str(path))
    with pytest.raises(DataError, match="must have a channel R, found Y"):
        data.sample("defocusnet_000400")
    path.write_bytes(b"no EXR at all")
    with pytest.raises(DataError, match="not a whole OpenEXR file"):
        data.sample("defocusnet_000400")
    monkeypatch.setitem(sys.modules, "OpenEXR", None)
    with pytest.raises(UsageError, match=r"pip install 'daif\[exr\]'"):
        data.sample("defocusnet_000400")
