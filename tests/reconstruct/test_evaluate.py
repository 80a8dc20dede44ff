"""`daif evaluate`: unknown pixels, bad truth, results without a unit; what can be scored is scored."""

import json

import cv2
import numpy as np
import pytest

from capture.errors import DataError, SomeFailedError, UsageError
from capture.stack import FocalStack, write_stack
from reconstruct import evaluate, job, metrics, result
from reconstruct.infer import Settings
from tests.reconstruct.small_result import small_result
from tests.reconstruct.small_stack import write_small_stack

SHAPE = (24, 32)
TRUTH_M = np.tile(np.linspace(1.5, 4.5, SHAPE[1], dtype=np.float32), (SHAPE[0], 1))


@pytest.fixture
def folders(tmp_path):
    """Where results go, with one of `take`, and an empty folder for the truth."""
    out, truth = tmp_path / "out", tmp_path / "truth"
    truth.mkdir()
    result.save(small_result(), out)
    return out, truth


def scores(folders, capsys):
    """What `evaluate --json` prints, read as strictly as JSON is defined."""
    evaluate.run(*folders, as_json=True)
    return json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_an_unknown_pixel_counts_as_infinitely_far(folders, capsys):
    out, truth = folders
    np.save(truth / "take.npy", TRUTH_M)
    whole = scores(folders, capsys)["take"]
    depth = np.load(out / "take" / "depth.npy")
    depth[0, 0] = np.nan
    np.save(out / "take" / "depth.npy", depth)
    holed = scores(folders, capsys)["take"]
    assert [name for name in whole if (holed[name] is None) != (whole[name] is None)] == []
    pixels = TRUTH_M.size
    more_dpt = (1 / 1.5 - abs(1 / 2.0 - 1 / 1.5)) / pixels
    assert holed["mae_dpt"] - whole["mae_dpt"] == pytest.approx(more_dpt, rel=1e-4)
    more_abs_rel = (abs(50 - 1.5) - abs(2.0 - 1.5)) / 1.5 / pixels
    assert holed["abs_rel"] - whole["abs_rel"] == pytest.approx(more_abs_rel, rel=1e-4)


def test_unknown_pixels_score_the_same_before_and_after_they_were_stored(tmp_path):
    answer = small_result()
    answer.inverse_depth_dpt[:3] = 0
    back = result.load(result.save(answer, tmp_path))
    assert np.isnan(back.depth[:3]).all()
    before, after = (metrics.depth_errors(a.inverse_depth_dpt, TRUTH_M, 20.0) for a in (answer, back))
    assert before == pytest.approx(after, rel=1e-5, nan_ok=True)


def test_figures_that_do_not_exist_are_null_in_json_and_blank_in_the_table(folders, capsys):
    np.save(folders[1] / "take.npy", np.full(SHAPE, 2.0, np.float32))  # a plane has no depth edge
    assert scores(folders, capsys)["take"]["edge_mae_coc_px"] is None
    evaluate.run(*folders, as_json=False)
    assert "nan" not in capsys.readouterr().out


def test_a_relative_result_is_not_scored_in_metres(tmp_path):
    result.save(small_result(metric=False), tmp_path / "out")
    np.save(tmp_path / "take.npy", TRUTH_M)
    with pytest.raises(DataError, match="is relative"):
        evaluate.run(tmp_path / "out", tmp_path, as_json=False)


def empty_npy(truth):
    (truth / "take.npy").write_bytes(b"")


def truncated_npy(truth):
    np.save(truth / "take.npy", TRUTH_M)
    (truth / "take.npy").write_bytes((truth / "take.npy").read_bytes()[:500])


def npy_of_text(truth):
    np.save(truth / "take.npy", np.full(SHAPE, "deep"))


def npy_of_objects(truth):
    np.save(truth / "take.npy", np.array([{}]))


def archive_named_npy(truth):
    with (truth / "take.npy").open("wb") as file:
        np.savez(file, depth=TRUTH_M)


def npy_of_three_axes(truth):
    np.save(truth / "take.npy", TRUTH_M[..., None])


def unknown_everywhere(truth):
    np.save(truth / "take.npy", np.full(SHAPE, np.nan, np.float32))


def another_size(truth):
    np.save(truth / "take.npy", TRUTH_M[:5])


def photograph_of_another_size(truth):
    (truth / "take").mkdir()
    cv2.imwrite(str(truth / "take" / "depth.png"), (TRUTH_M * 1000).astype(np.uint16))
    cv2.imwrite(str(truth / "take" / "rgb.png"), np.zeros((5, 7, 3), np.uint8))


BAD_TRUTH = [
    (empty_npy, "take.npy cannot be read"),
    (truncated_npy, "take.npy cannot be read"),
    (npy_of_text, "take.npy must hold one number for every pixel"),
    (npy_of_objects, "take.npy cannot be read"),
    (archive_named_npy, "take.npy cannot be read"),
    (npy_of_three_axes, r"found float32 of shape \(24, 32, 1\)"),
    (unknown_everywhere, "unknown .* at every pixel"),
    (another_size, "true depth of take is 32 x 5 px"),
    (photograph_of_another_size, "true sharp image of take is 7 x 5 px"),
    (lambda truth: None, "no truth for take"),
]


@pytest.mark.parametrize(("write", "words"), BAD_TRUTH)
def test_bad_truth_is_one_sentence(folders, write, words):
    write(folders[1])
    with pytest.raises(DataError, match=words) as told:
        evaluate.run(*folders, as_json=True)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("name", ["depth.npy", "depth_std.npy", "confidence.npy"])
@pytest.mark.parametrize("keep", [0, 7, 200])
def test_a_damaged_result_is_one_sentence(folders, name, keep):
    np.save(folders[1] / "take.npy", TRUTH_M)
    path = folders[0] / "take" / name
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=f"take is damaged .*{name}"):
        evaluate.run(*folders, as_json=True)


def test_maps_of_different_sizes_are_a_damaged_result(folders):
    np.save(folders[0] / "take" / "depth_std.npy", TRUTH_M[:5])
    with pytest.raises(DataError, match="not of one size"):
        result.load(folders[0] / "take")


def test_a_truth_folder_that_is_not_there(folders):
    with pytest.raises(UsageError, match="missing is not a folder"):
        evaluate.run(folders[0], folders[1] / "missing", as_json=False)


@pytest.mark.parametrize("as_json", [True, False])
def test_the_others_are_scored_and_the_one_without_truth_is_named(folders, capsys, as_json):
    out, truth = folders
    for name in ("lonely", "second"):
        result.save(small_result(name), out)
    for name in ("second", "take"):
        np.save(truth / f"{name}.npy", TRUTH_M)
    with pytest.raises(SomeFailedError, match="1 of 3 reconstructions were not scored: lonely"):
        evaluate.run(out, truth, as_json=as_json)
    said = capsys.readouterr()
    assert "no truth for lonely" in said.err
    assert "second" in said.out and "take" in said.out
    assert not as_json or json.loads(said.out).keys() == {"second", "take"}


def test_the_table_has_every_figure_that_any_stack_has(folders, capsys):
    out, truth = folders
    result.save(small_result("with_photograph"), out)
    np.save(truth / "take.npy", TRUTH_M)
    (truth / "with_photograph").mkdir()
    cv2.imwrite(str(truth / "with_photograph" / "depth.png"), (TRUTH_M * 1000).astype(np.uint16))
    cv2.imwrite(str(truth / "with_photograph" / "rgb.png"), np.zeros((*SHAPE, 3), np.uint8))
    evaluate.run(out, truth, as_json=False)
    printed = capsys.readouterr().out
    assert "PSNR" in printed and "SSIM" in printed


def test_a_stack_whose_truth_is_unknown_is_reconstructed_without_errors(tmp_path):
    with FocalStack.open(write_small_stack(tmp_path / "known.h5")) as stack:
        write_stack(
            tmp_path / "unknown.h5",
            np.stack([stack.raw(i) for i in range(stack.n_frames)]),
            focus_distance_m=stack.focus_distance_m,
            lens=stack.lens,
            transfer=stack.transfer,
            truth_depth_m=np.full(stack.raw(0).shape[:2], np.nan, np.float32),
        )
    settings = Settings(method="plane-sweep", device="cpu", align=False)
    record = job.process_stack(str(tmp_path / "unknown.h5"), job.Job(str(tmp_path / "out"), settings))
    assert "errors" not in record
