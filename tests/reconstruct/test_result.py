"""The output folder: complete or absent, and the same when read back."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from capture.errors import DataError, UsageError
from reconstruct import remote, report, result
from tests.reconstruct.small_result import small_result

CONTRACT = {
    "depth.npy", "depth.png", "confidence.npy", "depth_std.npy", "aif.png", "depth_color.png", "points.ply",
    "report.html", "reconstruction.json",
}  # fmt: skip


def test_every_file_of_the_contract_and_nothing_else(tmp_path):
    answer = small_result()
    folder = result.save(answer, tmp_path, report_html=report.render_report(answer, []))
    assert {path.name for path in folder.iterdir()} == CONTRACT
    assert [path.name for path in tmp_path.iterdir()] == ["take"]
    assert json.loads((folder / "reconstruction.json").read_text())["points"] == 24 * 32


def test_reads_back(tmp_path):
    answer = small_result()
    back = result.load(result.save(answer, tmp_path))
    np.testing.assert_allclose(back.inverse_depth_dpt, answer.inverse_depth_dpt, rtol=1e-6)
    np.testing.assert_allclose(back.std_dpt, answer.std_dpt, rtol=1e-5)
    np.testing.assert_allclose(back.aif, answer.aif, atol=0.006)  # 8-bit sRGB


def test_relative_depth_is_ordered_and_unitless(tmp_path):
    folder = result.save(small_result(metric=False), tmp_path)
    depth = np.load(folder / "depth.npy")
    assert depth[0, 0] == 0.0
    assert depth[0, -1] == 1.0
    stored = cv2.imread(str(folder / "depth.png"), cv2.IMREAD_UNCHANGED)
    assert stored[0, 0] == 1
    assert stored[0, -1] == 65535
    assert "relative" in json.loads((folder / "reconstruction.json").read_text())["depth_png"]["unit"]


def test_relative_depth_is_never_called_metres_or_millimetres(tmp_path):
    folder = result.save(small_result(metric=False), tmp_path, extra_formats=("nerfstudio",))
    header = (folder / "points.ply").read_bytes().partition(b"end_header")[0]
    assert b"relative depth, no unit" in header and b"metres" not in header
    assert "depth_file_path" not in (folder / "transforms.json").read_text()
    assert "relative depth has no unit" in warnings_of(folder)[-1]


def test_nerfstudio_gets_depth_in_millimetres_or_none(tmp_path):
    for unit, there in (("mm", True), ("um", False)):
        answer = small_result(unit, depth_m=0.03)
        folder = result.save(answer, tmp_path, depth_unit=unit, extra_formats=("nerfstudio",))
        assert ("depth_file_path" in (folder / "transforms.json").read_text()) is there
        assert any("depth.png is in um" in warning for warning in warnings_of(folder)) is not there


def test_depth_that_its_png_cannot_hold_is_told(tmp_path):
    folder = result.save(small_result(depth_m=1.0), tmp_path, depth_unit="um")
    assert warnings_of(folder) == [
        "depth.png is 0 at 100% of the known pixels: in um it ends at 0.0655 m; depth.npy holds them all, "
        "--depth-unit mm reaches 65.5 m"
    ]
    half = result.save(small_result("half", depth_m=0.03), tmp_path, depth_unit="um")
    assert "0 at 50% of the known pixels" in warnings_of(half)[0]
    assert warnings_of(result.save(small_result("all"), tmp_path)) == []


def test_a_map_without_a_surface_is_kept_without_a_mesh(tmp_path):
    answer = small_result()
    answer.inverse_depth_dpt[:] = 0
    folder = result.save(answer, tmp_path, extra_formats=("glb",))
    assert not (folder / "mesh.glb").exists()
    assert warnings_of(folder) == ["mesh.glb is left out: depth is unknown or torn everywhere, so there is no surface"]


def warnings_of(folder):
    return json.loads((folder / "reconstruction.json").read_text())["warnings"]


def test_uncertainty_in_metres_grows_with_the_square_of_depth():
    std = small_result().depth_std
    np.testing.assert_allclose([std[0, 0], std[0, -1]], [0.01 * 2**2, 0.01 * 4**2], rtol=1e-5)


def test_beyond_infinity_is_unknown():
    answer = small_result()
    answer.inverse_depth_dpt[0, 0] = -0.1
    assert np.isnan(answer.depth[0, 0])


def test_an_existing_folder_is_kept_unless_replaced(tmp_path):
    result.save(small_result(), tmp_path)
    with pytest.raises(UsageError, match="already exists"):
        result.save(small_result(), tmp_path)
    result.save(small_result(depth_m=1.0), tmp_path, replace=True)
    assert np.load(tmp_path / "take" / "depth.npy")[0, 0] == 1.0
    assert [path.name for path in tmp_path.iterdir()] == ["take"]


def a_folder_of_photographs(target):
    target.mkdir()
    (target / "frame.png").write_bytes(b"mine")


def a_file(target):
    target.write_bytes(b"mine")


def a_link_to_a_result(target):
    result.save(small_result(), target.parent / "elsewhere")
    target.symlink_to(target.parent / "elsewhere" / "take", target_is_directory=True)


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("there", [a_folder_of_photographs, a_file, a_link_to_a_result])
def test_what_is_no_result_is_never_replaced(tmp_path, there, replace):
    there(tmp_path / "take")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    with pytest.raises(UsageError, match="no result of daif, so it is never replaced") as refused:
        result.save(small_result(), tmp_path, replace=replace)
    assert "--force" not in str(refused.value)
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "take").mkdir()
    assert result.is_complete(result.save(small_result(), tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["take"]


def test_a_run_stopped_while_it_replaces_keeps_the_old_result(tmp_path, monkeypatch):
    result.save(small_result(), tmp_path)
    rename = Path.rename

    def stopped(path, target):
        if ".partial-" in path.name:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises(KeyboardInterrupt):
        result.save(small_result(depth_m=1.0), tmp_path, replace=True)
    assert np.load(tmp_path / "take" / "depth.npy")[0, 0] == 2.0
    assert [path.name for path in tmp_path.iterdir()] == ["take"]


def test_what_a_killed_run_left_is_removed_but_nothing_of_the_living(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    here = platform.node()
    names = [f".take.partial-{here}-{ended.pid}", f".take.retired-{here}-{ended.pid}"]
    kept = [f".take.partial-{here}-{os.getpid()}", f".take.partial-elsewhere-{ended.pid}", f"take.partial-{here}-1x"]
    for name in (*names, *kept):
        (tmp_path / name).mkdir()
        (tmp_path / name / "depth.npy").write_bytes(b"half")
    remote.prepare_output(str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == set(kept)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), OSError("82944 requested and 51168 written")], ids=["", "NumPy's"]
)
def test_a_failure_while_writing_leaves_nothing(tmp_path, monkeypatch, error):
    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(result.export, "write_ply", full)
    with pytest.raises(result.NoSpaceError, match="disk is full"):
        result.save(small_result(), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="cannot be written"):
        result.save(small_result(), tmp_path)


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        result.save(small_result(), tmp_path / "out")


def test_an_unfinished_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=r"not a finished reconstruction: reconstruction\.json is missing"):
        result.load(tmp_path)


@pytest.mark.parametrize("name", ["</script><script>alert(1)</script>", "<!--<script>", "<!--<SCRIPT "])
def test_report_escapes_what_could_end_its_script_or_swallow_the_next(name):
    page = report.render_report(small_result(name=name), [])
    assert name not in page
    assert page.count("</script>") == 2 and page.lower().count("<script") == 2
    data = page.partition('id="data">')[2].partition("</script>")[0]
    assert "<" not in data and json.loads(data)["title"] == name
