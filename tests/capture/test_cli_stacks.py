"""`daif import`, `daif info` and `daif pack` as a user or a script meets them."""

import json

import cv2
import numpy as np
import pytest
import typer

import capture.cli
from capture.errors import DataError, SomeFailedError, UsageError
from capture.lens import Lens
from capture.stack import StackWriter, write_stack

LENS = Lens(focal_length_m=0.05, f_number=2.8, pixel_pitch_m=1.2e-5)


def daif(*words):
    """Run one command; its errors come out as they reach `main`."""
    app = typer.Typer()
    capture.cli.register(app)
    app([str(word) for word in words], standalone_mode=False)


@pytest.fixture
def good(tmp_path):
    frames = np.zeros((3, 20, 30, 3), np.uint8)
    frames[1, :, :15] = 255
    return write_stack(
        tmp_path / "good.h5", frames, transfer="srgb", focus_distance_m=[1.0, 2.0, np.inf], lens=LENS,
        truth_depth_m=np.ones((20, 30)),
    )  # fmt: skip


def folder_of(path, count):
    path.mkdir()
    for i in range(count):
        cv2.imwrite(str(path / f"f{i}.png"), np.full((8, 9, 3), 20 * i, np.uint8))
    return path


def test_import_one_folder(tmp_path, capsys):
    daif("import", folder_of(tmp_path / "a", 3), "-o", tmp_path / "out.h5")
    assert capsys.readouterr().out == f"{tmp_path / 'out.h5'}\n"
    with pytest.raises(UsageError, match="--force"):
        daif("import", tmp_path / "a", "-o", tmp_path / "out.h5")
    daif("import", tmp_path / "a", "-o", tmp_path / "out.h5", "--force")


@pytest.mark.parametrize("name", ["f0.png", "stack.yaml", "../a/f1.png"])
def test_import_writes_over_none_of_its_inputs(tmp_path, name):
    folder = folder_of(tmp_path / "a", 2)
    (folder / "stack.yaml").write_text("frames: [{file: f0.png}, {file: f1.png}]\n")
    before = (folder / name).read_bytes()
    with pytest.raises(UsageError, match="one of the files that are read"):
        daif("import", folder, "-o", folder / name, "--force")
    assert (folder / name).read_bytes() == before


def test_import_refuses_a_name_that_no_disk_takes(tmp_path):
    folder = folder_of(tmp_path / "a", 2)
    for length in (250, 300):
        with pytest.raises(UsageError, match="240 at most"):
            daif("import", folder, "-o", tmp_path / ("x" * length))


def test_import_many_folders_names_the_bad_and_does_the_rest(tmp_path, capsys):
    folders = [folder_of(tmp_path / "a", 2), folder_of(tmp_path / "b", 1), folder_of(tmp_path / "c", 2)]
    with pytest.raises(SomeFailedError, match="1 of 3 folders failed"):
        daif("import", *folders, "-o", tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.h5", "c.h5"]
    assert "b has one image" in capsys.readouterr().err


def test_import_refuses_two_stacks_of_one_name(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    folders = [folder_of(tmp_path / "x" / "a", 2), folder_of(tmp_path / "y" / "a", 2)]
    with pytest.raises(UsageError, match="same name"):
        daif("import", *folders, "-o", tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        daif("import", folders[0], tmp_path / "x", "-o", tmp_path / "file")


def test_info_says_what_there_is(good, capsys):
    daif("info", good, "--deep")
    text = capsys.readouterr().out
    for words in ("complete", "checksums verified", "3 x 30 x 20 px, 8-bit RGB, srgb", "metric", "50 mm f/2.8", "inf"):
        assert words in text
    assert "true depth is stored" in text
    assert "warning: 1 frames have more than 1 % clipped values, up to 50.0 %" in text


def test_info_as_json(good, capsys):
    daif("info", good, "--json")
    (facts,) = json.loads(capsys.readouterr().out)
    assert facts["frames_ok"] == 3
    assert facts["metric"] is True
    assert facts["lens"] == LENS.model_dump()
    # kappa = f^2 / (N p) / (1 - f q): from 0 dpt to 1 dpt
    assert facts["kappa_px_per_dpt"] == pytest.approx([74.405, 78.321], rel=1e-4)
    assert facts["blur_range_px"] == pytest.approx(78.321, rel=1e-4)
    assert [frame["focus_distance_m"] for frame in facts["frames"]] == [1.0, 2.0, "inf"]
    assert facts["frames"][1]["clipped_fraction"] == 0.5
    assert facts["frames"][1]["iso"] is None


def test_info_on_an_unfinished_and_uncalibrated_stack(tmp_path, capsys):
    with StackWriter.create(tmp_path / "a.h5", n_frames=4, height=8, width=9, transfer="srgb") as writer:
        writer.append(0, np.zeros((8, 9, 3), np.uint8), focus_command=100, exposure_time_s=0.01)
        writer.append(1, np.zeros((8, 9, 3), np.uint8), focus_command=80, exposure_time_s=0.02)
        writer.fail(2, "no picture")
    daif("info", tmp_path / "a.h5.partial")
    text = capsys.readouterr().out
    assert "unfinished, 2 of 4 frames" in text
    assert "uncalibrated: relative" in text
    assert "2  failed" in text
    assert "3  pending" in text
    assert "exposure time changes between frames, 0.01 to 0.02" in text


def test_info_goes_on_after_a_bad_stack(good, tmp_path, capsys):
    bad = tmp_path / "bad.h5"
    bad.write_bytes(good.read_bytes()[:5000])
    with pytest.raises(SomeFailedError, match="1 of 2 stacks"):
        daif("info", bad, good)
    out = capsys.readouterr()
    assert "bad.h5: HDF5 structure cannot be read, the file is truncated" in out.err
    assert "good.h5: complete" in out.out
    with pytest.raises(DataError, match="truncated"):
        daif("info", bad)


def test_pack(good, tmp_path, capsys):
    daif("pack", good, "-o", tmp_path / "small.h5")
    assert "verified bit for bit" in capsys.readouterr().out
    daif("info", tmp_path / "small.h5", "--deep")
