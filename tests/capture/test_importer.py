"""Folders of photographs to stacks: what is said is kept, what is unknown stays unknown, contradictions are refused."""

import math
import os
import shutil

import cv2
import numpy as np
import pytest
import yaml

from capture import exif, stack
from capture.errors import DataError, NoSpaceError, UsageError
from capture.exif import NIKON_STEP, Exif
from capture.importer import import_folder, natural_key, spread_ties
from capture.stack import FocalStack, StackWriter
from tests.benchmarks.real_stacks import STACKS, write_stack_yaml

LENS = {"focal_length_m": 0.05, "f_number": 2.8, "pixel_pitch_m": 1.2e-5}


def picture(seed, shape=(24, 32, 3), dtype=np.uint8):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


def save(path, pixels):
    cv2.imwrite(str(path), pixels[..., ::-1] if pixels.ndim == 3 else pixels)


@pytest.fixture
def folder(tmp_path):
    """Three frames and a stack.yaml."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    for i in range(3):
        save(folder / f"frame_{i}.png", picture(i))
    describe(folder)
    return folder


def describe(folder, **changes):
    document = {
        "transfer": "srgb",
        "lens": LENS,
        "frames": [{"file": f"frame_{i}.png", "focus_distance_m": d} for i, d in enumerate((1.0, 1.5, 4.0))],
    }
    document |= changes
    (folder / "stack.yaml").write_text(yaml.safe_dump(document, sort_keys=False))


def with_distances(folder, *distances, **changes):
    describe(
        folder,
        frames=[{"file": f"frame_{i}.png", "focus_distance_m": d} for i, d in enumerate(distances)],
        **changes,
    )


def test_a_described_folder(folder, tmp_path):
    out = import_folder(folder, tmp_path / "out.h5")
    assert out == tmp_path / "out.h5"
    with FocalStack.open(out, deep=True) as found:
        for i in range(3):
            np.testing.assert_array_equal(found.raw(i), picture(i))
        np.testing.assert_array_equal(found.focus_distance_m, [1.0, 1.5, 4.0])
        assert found.lens.model_dump() == LENS
        assert found.is_metric
        assert found.transfer == "srgb"
        assert found.original_name == [f"frame_{i}.png" for i in range(3)]
        assert len(found.original_sha256[0]) == 64
        assert found.focus_distance_source == ["operator"] * 3


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bit_linear_frames(tmp_path, suffix):
    for i in range(2):
        save(tmp_path / f"f{i}{suffix}", picture(i, dtype=np.uint16))
    (tmp_path / "stack.yaml").write_text("transfer: linear\n")
    with FocalStack.open(import_folder(tmp_path, tmp_path / "o.h5")) as found:
        np.testing.assert_allclose(found.linear(1), picture(1, dtype=np.uint16) / 65535.0, atol=1e-6)


def test_a_bare_folder_is_an_uncalibrated_stack_in_counting_order(tmp_path):
    for i in (10, 9, 1):
        save(tmp_path / f"IMG_{i}.png", picture(i))
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "._IMG_1.png").write_text("left by a Mac")
    with FocalStack.open(import_folder(tmp_path, tmp_path / "o.h5")) as found:
        assert found.original_name == ["IMG_1.png", "IMG_9.png", "IMG_10.png"]
        assert not found.is_metric
        assert found.lens is None
        assert np.isnan(found.focus_distance_m).all()


def test_unknown_distances_may_be_null_or_left_out(folder, tmp_path):
    frames = [{"file": "frame_0.png", "focus_distance_m": 1.0}, {"file": "frame_1.png", "focus_distance_m": None}]
    describe(folder, frames=[*frames, {"file": "frame_2.png", "focus_command": 85}], focus_unit="driver")
    with FocalStack.open(import_folder(folder, tmp_path / "o.h5")) as found:
        np.testing.assert_array_equal(found.focus_distance_m, [1.0, np.nan, np.nan])
        assert not found.is_metric
        assert found.focus_command[2] == 85
        assert found.focus_unit == "driver"


def test_infinity(folder, tmp_path):
    with_distances(folder, 1.0, 3.0, math.inf)
    with FocalStack.open(import_folder(folder, tmp_path / "o.h5")) as found:
        assert list(found.focus_dpt) == [1.0, 1 / 3.0, 0.0]
        assert found.is_metric


def test_a_lens_that_cannot_be_focused_so_close_is_refused(folder, tmp_path):
    for lens in (LENS | {"focal_length_m": 1.5}, "lens.yaml"):
        (folder / "lens.yaml").write_text(yaml.safe_dump(LENS | {"focal_length_m": 1.5}))
        describe(folder, lens=lens)
        with pytest.raises(DataError, match=r"stack\.yaml: frame frame_0\.png is focused at 1 m, .* 1\.5 m can"):
            import_folder(folder, tmp_path / "o.h5")
        assert not list(tmp_path.glob("o.h5*"))


def test_a_lens_file(folder, tmp_path):
    (folder / "my lens.yaml").write_text(yaml.safe_dump(LENS))
    describe(folder, lens="my lens.yaml")
    with FocalStack.open(import_folder(folder, tmp_path / "o.h5")) as found:
        assert found.lens.model_dump() == LENS
        assert found.lens_info["source"] == "my lens.yaml"


def test_a_calibrated_profile_is_copied_into_the_stack(folder, tmp_path):
    from capture.lens import Breathing, FocusTable, Intrinsics, LensProfile, Measured

    exact = {"std": 0.0}
    profile = LensProfile(
        grade="metric",
        width_px=32,
        height_px=24,
        pupil_diameter_m=Measured(value=0.0178, **exact),
        focus=FocusTable(positions=(0.0, 100.0), focus_dpt=(2.0, 0.0), std_dpt=(0.01, 0.01)),
        breathing=Breathing(
            reference_position=0.0, scale=(1, 1), scale_std=(0, 0), shift_x_px=(0, 0), shift_y_px=(0, 0)
        ),
        intrinsics=Intrinsics(
            focal_length_px=Measured(value=40.0, **exact),
            center_x_px=Measured(value=15.5, **exact),
            center_y_px=Measured(value=11.5, **exact),
        ),
        floor_sigma_px=Measured(value=0.4, **exact),
    )
    profile.write(folder / "lens.yaml")
    describe(folder, lens="lens.yaml")
    with FocalStack.open(import_folder(folder, tmp_path / "o.h5")) as found:
        assert found.profile == profile
        assert found.lens is None


# --- refused


BAD = {
    "unknown key": (
        lambda f: describe(f, transfr="srgb"),
        UsageError,
        r"unknown key 'transfr'; did you mean 'transfer'",
    ),
    "millimetres": (
        lambda f: describe(f, lens=LENS | {"focal_length_m": 50}),
        UsageError,
        "50 is not a focal length in m",
    ),
    "curve": (
        lambda f: describe(f, transfer="log"),
        UsageError,
        "transfer: input should be 'linear', 'srgb' or 'rec709'",
    ),
    "nan": (
        lambda f: with_distances(f, 1.0, math.nan, 4.0),
        UsageError,
        r"frames\[1\].focus_distance_m: nan is not a foc",
    ),
    "negative": (
        lambda f: with_distances(f, 1.0, -2.0, 4.0),
        UsageError,
        r"frames\[1\].focus_distance_m: -2 is not a foc",
    ),
    "zero": (lambda f: with_distances(f, 0, 2.0, 4.0), UsageError, r"frames\[0\].focus_distance_m: 0 is not a focus"),
    "duplicate": (
        lambda f: with_distances(f, 0.5, 1.0, 1.0),
        DataError,
        r"stack\.yaml: duplicate focus distance 1 m in frames 1 and 2",
    ),
    "turning": (
        lambda f: with_distances(f, 1.0, 3.0, 2.0),
        DataError,
        r"focus distances turn at frame 1 \(1, 3, 2 m\)",
    ),
    "missing frame": (
        lambda f: (f / "frame_1.png").unlink(),
        DataError,
        r"frame_1\.png, named in .*stack\.yaml, does not exist",
    ),
    "listed twice": (
        lambda f: describe(f, frames=[{"file": "frame_0.png"}, {"file": "frame_0.png"}]),
        DataError,
        r"frame_0\.png is listed twice",
    ),
    "one frame": (lambda f: describe(f, frames=[{"file": "frame_0.png"}]), DataError, "at least 2 frames"),
    "sizes": (
        lambda f: save(f / "frame_1.png", picture(1, (24, 33, 3))),
        DataError,
        r"frame_1\.png is 33 x 24 px 8-bit srgb RGB and frame_0\.png is 32 x 24 px 8-bit srgb RGB; all frames",
    ),
    "depths": (lambda f: save(f / "frame_2.png", picture(1, dtype=np.uint16)), DataError, "16-bit srgb RGB and"),
    "grey": (lambda f: save(f / "frame_2.png", picture(1)[..., 0]), DataError, "8-bit srgb grey and"),
    "truncated": (
        lambda f: (f / "frame_2.png").write_bytes((f / "frame_2.png").read_bytes()[:900]),
        DataError,
        r"frame_2\.png is truncated",
    ),
    "text": (lambda f: (f / "frame_0.png").write_text("hello"), DataError, r"frame_0\.png is no image"),
    "no lens file": (lambda f: describe(f, lens="nope.yaml"), UsageError, r"nope\.yaml does not exist"),
    "a list": (lambda f: (f / "stack.yaml").write_text("- 1"), UsageError, "expected keys and values"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_contradicts_is_refused_and_leaves_nothing(folder, tmp_path, case):
    change, error, words = BAD[case]
    change(folder)
    with pytest.raises(error, match=words) as caught:
        import_folder(folder, tmp_path / "o.h5")
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["shelf"]


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        import_folder(tmp_path / "no", tmp_path / "o.h5")
    with pytest.raises(DataError, match="has no images"):
        import_folder(tmp_path, tmp_path / "o.h5")
    save(tmp_path / "a.png", picture(0))
    with pytest.raises(DataError, match=r"has one image, a\.png; a focal stack needs at least 2"):
        import_folder(tmp_path, tmp_path / "o.h5")
    with pytest.raises(UsageError, match="is a file"):
        import_folder(tmp_path / "a.png", tmp_path / "o.h5")


def test_outputs_are_not_overwritten(folder, tmp_path):
    out = import_folder(folder, tmp_path / "o.h5")
    with pytest.raises(UsageError, match="exists already.*--force"):  # noqa: RUF043
        import_folder(folder, out)
    with_distances(folder, 2.0, 3.0, 4.0)
    import_folder(folder, out, overwrite=True)
    with FocalStack.open(out) as found:
        assert found.focus_distance_m[0] == 2.0


def test_a_full_disk(folder, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(stack.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(NoSpaceError, match=r"needs .* MB and .* has 0\.0 MB free"):
        import_folder(folder, tmp_path / "o.h5")


# --- EXIF


def import_with_exif(tmp_path, monkeypatch, *described):
    """Import frames whose files say `described` (Exif each)."""
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(len(described)):
        save(folder / f"DSC_{i}.png", picture(i))
    monkeypatch.setattr("capture.importer.read_files", lambda paths: list(described))
    return FocalStack.open(import_folder(folder, tmp_path / "o.h5"))


def nikon(distance_m, **changes):
    facts = {"focal_length_m": 0.05, "f_number": 5.0, "sensor_width_m": 0.0231, "sensor_width_source": "specification"}
    std = distance_m * NIKON_STEP / math.sqrt(12)
    return Exif(
        **facts,
        focus_distance_m=distance_m,
        focus_distance_std_m=std,
        focus_distance_source="exif, quantised",
        **changes,
    )


def test_equal_quantised_neighbours_stay_in_order(tmp_path, monkeypatch):
    reported = (0.79433, 0.79433, 0.84140, 1.0)
    with import_with_exif(tmp_path, monkeypatch, *map(nikon, reported)) as found:
        assert found.is_metric
        assert np.all(np.diff(found.focus_distance_m) > 0)
        expected = [exif.from_sensor_plane(d, 0.05) for d in reported]
        np.testing.assert_allclose(found.focus_distance_m, expected, rtol=0.4 * NIKON_STEP)
        assert found.focus_distance_source == ["exif, quantised"] * 4
        assert np.all(found.focus_distance_std_m > 0)
        assert found.events[0]["kind"] == "ties_spread"
        # a sensor of 23.1 mm stored 32 px wide
        assert found.lens.pixel_pitch_m == pytest.approx(0.0231 / 32)


def test_frames_that_went_back_and_forth_are_sorted_by_distance(tmp_path, monkeypatch):
    with import_with_exif(tmp_path, monkeypatch, nikon(1.0), nikon(3.0), nikon(2.0)) as found:
        assert found.original_name == ["DSC_0.png", "DSC_2.png", "DSC_1.png"]
        np.testing.assert_array_equal(found.raw(1), picture(2))
        assert found.events[0]["kind"] == "reordered"


def test_one_distance_for_all_frames_is_no_distance(tmp_path, monkeypatch):
    with import_with_exif(tmp_path, monkeypatch, nikon(0.6), nikon(0.6), nikon(0.6)) as found:
        assert not found.is_metric
        assert np.isnan(found.focus_distance_m).all()
        assert np.isnan(found.focus_distance_std_m).all()
        assert found.focus_distance_source == [""] * 3
        assert found.events[0]["reason"] == "all frames report 0.6 m"
        assert found.lens is not None


def test_some_known_distances_that_contradict_are_dropped(tmp_path, monkeypatch):
    with import_with_exif(tmp_path, monkeypatch, nikon(1.0), nikon(3.0), nikon(2.0), Exif()) as found:
        assert np.isnan(found.focus_distance_m).all()
        assert found.events[0]["kind"] == "exif_distances_ignored"


def test_a_zoomed_sweep_has_no_lens(tmp_path, monkeypatch):
    zoomed = Exif(focal_length_m=0.07, f_number=5.0, sensor_width_m=0.0231)
    with import_with_exif(tmp_path, monkeypatch, nikon(1.0), zoomed) as found:
        assert found.lens is None


def test_an_exif_lens_that_cannot_be_focused_so_close_is_left_out(folder, tmp_path, monkeypatch):
    with_distances(folder, 0.04, 0.1, 0.2, lens=None)
    monkeypatch.setattr("capture.importer.read_files", lambda paths: [nikon(1.0)] * 3)
    with FocalStack.open(import_folder(folder, tmp_path / "o.h5")) as found:
        assert found.lens is None
        assert found.events[0]["kind"] == "exif_lens_ignored"
        assert "frame_0.png is focused at 0.04 m" in found.events[0]["reason"]


def test_raw_wins_over_the_jpeg_beside_it(tmp_path):
    from capture.importer import image_names

    for name in ("DSC_2.JPG", "DSC_2.NEF", "DSC_10.JPG"):
        (tmp_path / name).write_bytes(b"x")
    assert image_names(tmp_path) == ["DSC_2.NEF", "DSC_10.JPG"]


def test_a_replayed_folder_has_the_frames_that_import_would_take(tmp_path):
    from capture.cameras.replay import ReplayCamera

    for name in ("f2.png", "f10.png", "f1.png"):
        save(tmp_path / name, picture(1))
    (tmp_path / "._f1.png").write_bytes(b"of a Mac")
    with ReplayCamera(tmp_path) as device:
        device.open()
        assert [device.focus_range().near, device.focus_range().far] == [0, 2]
        taken = []
        for place in range(3):
            device.move_focus(place)
            taken.append(device.grab(1.0).originals[0][0])
    assert taken == ["f1.png", "f2.png", "f10.png"]


def test_an_import_that_was_killed_is_not_said_to_be_resumable(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    for i in range(3):
        save(tmp_path / "a" / f"{i}.png", picture(i))
    with monkeypatch.context() as patch:
        patch.setattr(StackWriter, "discard", StackWriter.close)  # killed: no time to clear up
        patch.setattr(StackWriter, "finish", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            import_folder(tmp_path / "a", tmp_path / "o.h5")
    with pytest.raises(UsageError, match=r"left of an import that was stopped; discard it with --force"):
        import_folder(tmp_path / "a", tmp_path / "o.h5")
    with pytest.raises(DataError, match="3 of 3 frames are there; import it again"):
        FocalStack.open(tmp_path / "o.h5.partial")
    import_folder(tmp_path / "a", tmp_path / "o.h5", overwrite=True)
    assert not (tmp_path / "o.h5.partial").exists()


def test_more_images_than_a_stack_holds_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("capture.stack._MAX_FRAMES", 2)
    for i in range(3):
        save(tmp_path / f"{i}.png", picture(i))
    with pytest.raises(DataError, match=r"3 frames cannot be stored, 2 at most"):
        import_folder(tmp_path, tmp_path / "o.h5")
    assert not list(tmp_path.glob("o.h5*"))


def test_natural_order():
    names = ["b1", "a10.jpg", "a9.jpg", "A1.jpg", "10", "9", "a", ""]
    assert sorted(names, key=natural_key) == ["", "9", "10", "a", "A1.jpg", "a9.jpg", "a10.jpg", "b1"]


@pytest.mark.parametrize("reported", [(1.0, 1.0, 1.06, 2.0), (2.0, 1.06, 1.0, 1.0), (1.0, 2.0, 2.0, 2.0)])
def test_ties_are_spread_inside_their_step(reported):
    spread = np.array(spread_ties(reported))
    steps = np.diff(spread)
    assert np.all(steps > 0) or np.all(steps < 0)
    assert np.all(np.abs(np.log(spread / reported)) < 0.5 * np.log(1 + NIKON_STEP))


# --- the photographs


@pytest.mark.skipif(not STACKS.exists(), reason="shared/data/stacks is not here")
@pytest.mark.parametrize("name", ["dslr_homesign", "dslr_shelf", "pcb_usb", "webcam_sponge"])
def test_real_stacks(tmp_path, name):
    folder = write_stack_yaml(STACKS / name, tmp_path / name)
    with FocalStack.open(import_folder(folder, tmp_path / "o.h5")) as found:
        assert found.is_metric == name.startswith("dslr")
        assert (found.lens is not None) == name.startswith("dslr")
        if name == "webcam_sponge":
            assert list(found.focus_command[:2]) == [110, 100]
        if name == "dslr_homesign":  # 0.794 m from the sensor, twice
            np.testing.assert_allclose(found.focus_distance_m[:2], [0.7293, 0.7523], atol=1e-3)


@pytest.mark.skipif(not (STACKS.parent / "exif").exists(), reason="shared/data/exif is not here")
def test_a_folder_of_camera_files(tmp_path):
    for i in range(2):
        os.symlink((STACKS.parent / "exif" / "nikon_d3100_full.jpg").resolve(), tmp_path / f"DSC_{i}.JPG")
    with FocalStack.open(import_folder(tmp_path, tmp_path / "o.h5")) as found:
        assert found.lens.focal_length_m == pytest.approx(0.05)
        assert found.lens.pixel_pitch_m == pytest.approx(0.0231 / 2304)
        assert found.camera["model"] == "NIKON D3100"
        assert found.iso[0] == 500
        assert found.exif[:2] in (b"II", b"MM")
        assert not found.is_metric  # both say 1 m
