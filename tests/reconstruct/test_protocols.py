"""Published protocols: every figure against loops written from the description, and whole tables on tiny data sets."""

import json
import math

import numpy as np
import pytest
from typer.testing import CliRunner

from capture.errors import DataError, UsageError
from capture.stack import FocalStack
from reconstruct import protocols, result
from reconstruct.cli import app
from reconstruct.datasets import import_dataset, open_dataset
from tests.reconstruct.small_result import small_result
from tests.reconstruct.tiny_datasets import PX_M, write_ddff12, write_defocusnet, write_nyuv2, write_zedd

SCHARR = np.outer([3, 10, 3], [1, 0, -1]) / 16  # along columns; its transpose along rows


def maps(height=12, width=14, seed=0):
    rng = np.random.default_rng(seed)
    truth = rng.uniform(0.3, 1.4, (height, width))
    return truth * rng.uniform(0.6, 1.6, truth.shape), truth


def filtered(image, kernel):
    """Correlation with mirrored border (the sign does not matter here)."""
    height, width = image.shape
    out = np.zeros_like(image)
    for row in range(height):
        for col in range(width):
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    r = min(max(row + dy, 0), height - 1)
                    c = min(max(col + dx, 0), width - 1)
                    out[row, col] += kernel[dy + 1, dx + 1] * image[r, c]
    return out


def ddff_by_loops(found, truth):
    error = found - truth
    across, down = filtered(error, SCHARR), filtered(error, SCHARR.T)
    second = [filtered(across, SCHARR), filtered(across, SCHARR.T), filtered(down, SCHARR), filtered(down, SCHARR.T)]
    count = squares = logs = relative = square_relative = bump = 0.0
    within = [0, 0, 0]
    for row in range(truth.shape[0]):
        for col in range(truth.shape[1]):
            a, b = found[row, col], truth[row, col]
            if b <= 0:
                continue
            count += 1
            squares += (a - b) ** 2
            logs += (math.log(a) - math.log(b)) ** 2
            relative += abs(a - b) / b
            square_relative += (a - b) ** 2 / b
            for k in range(3):
                within[k] += max(a / b, b / a) < 1.25 ** (k + 1)
            bump += min(math.sqrt(sum(part[row, col] ** 2 for part in second)), 0.05)
    return {
        "mse": squares / count,
        "rms": math.sqrt(squares / count),
        "log_rms": math.sqrt(logs / count),
        "abs_rel": relative / count,
        "sq_rel": square_relative / count,
        **{f"delta{k + 1}": 100 * within[k] / count for k in range(3)},
        "bump": 100 * bump / count,
    }


@pytest.mark.parametrize("scale", [1.0, 0.02])  # errors beyond and below the cut of the bumpiness
def test_ddff_figures(scale):
    found, truth = maps()
    found = truth + scale * (found - truth)
    truth[:2, 3:6] = 0
    assert protocols.ddff_errors(found, truth) == pytest.approx(ddff_by_loops(found, truth), rel=1e-9)


def test_ddff_is_in_pixels_of_disparity():
    found, truth = maps()
    truth_px = PX_M / truth
    truth_px[4, 4] = 0
    expected = ddff_by_loops(PX_M / found, truth_px)
    assert protocols.ddff12_errors(found, truth_px) == pytest.approx(expected, rel=1e-9)


def test_a_scene_without_truth_counts_as_zero():
    found, truth = maps()
    assert set(protocols.ddff_errors(found, 0 * truth).values()) == {0.0}


def test_defocusnet_figures():
    found, truth = maps(seed=1)
    truth[0] *= 3  # beyond the 1.5 m of the second table
    found[1] *= 4
    truth[2, :3] = 0
    figures = protocols.defocusnet_errors(found, truth)
    absolute = squares = count = 0.0
    cut_found, cut_truth = np.zeros_like(found), np.zeros_like(truth)
    for place, b in np.ndenumerate(truth):
        a = found[place]
        cut_found[place], cut_truth[place] = (min(int(x * 10000) / 10000, 1.5) for x in (a, b))
        if b > 0:
            count, absolute, squares = count + 1, absolute + abs(a - b), squares + (a - b) ** 2
    assert figures["mae"] == pytest.approx(absolute / count)
    assert figures["mse"] == pytest.approx(squares / count)
    assert figures["rmse"] == pytest.approx(math.sqrt(squares / count))
    expected = {f"cut_{key}": value for key, value in ddff_by_loops(cut_found, cut_truth).items()}
    assert {key: figures[key] for key in expected} == pytest.approx(expected, rel=1e-9)


def test_nyuv2_figures():
    """Enlarged with corners aligned: output pixel i lies at i (n - 1) / (2 n - 1) of the input."""
    found, _ = maps(6, 7, seed=2)
    found = 4 * found
    found[0, 0] = 30.0  # beyond 10 m
    truth = 4 * maps(12, 14, seed=3)[1]
    truth[0, :2] = 0.01, 12.0
    n, figures = truth.size, protocols.dered_errors(found, truth)
    sums = dict.fromkeys(("delta1", "delta2", "delta3", "square", "abs_rel", "sq_rel", "log"), 0.0)
    for (row, col), raw in np.ndenumerate(truth):
        b = min(max(raw, 0.1), 10.0)
        y, x = row * 5 / 11, col * 6 / 13
        top, left = min(int(y), 4), min(int(x), 5)
        a = 0.0
        for r, wr in ((top, 1 - (y - top)), (top + 1, y - top)):
            for c, wc in ((left, 1 - (x - left)), (left + 1, x - left)):
                a += wr * wc * min(found[r, c], 10.0)
        for k in (1, 2, 3):
            sums[f"delta{k}"] += max(a / b, b / a) < 1.25**k
        sums["square"] += (a - b) ** 2
        sums["abs_rel"] += abs(a - b) / b
        sums["sq_rel"] += (a - b) ** 2 / b
        sums["log"] += (math.log10(a) - math.log10(b)) ** 2
    for key in ("delta1", "delta2", "delta3", "abs_rel", "sq_rel"):
        assert figures[key] == pytest.approx(sums[key] / n, rel=1e-5)
    assert figures["rmse"] == pytest.approx(math.sqrt(sums["square"] / n), rel=1e-5)
    assert figures["rmse_log10"] == pytest.approx(math.sqrt(sums["log"] / n), rel=1e-5)


def test_zedd_figures():
    found, truth = maps(seed=4)
    truth[3, 2:5] = np.nan
    figures = protocols.zedd_errors(found, truth)
    known = [(found[place], b) for place, b in np.ndenumerate(truth) if math.isfinite(b)]
    for limit in (1.05, 1.15, 1.25):
        assert figures[f"d{limit}"] == sum(max(a / b, b / a) < limit for a, b in known) / len(known)
    assert figures["abs_rel"] == pytest.approx(sum(abs(a - b) / b for a, b in known) / len(known))


# --- whole tables


WRITERS = {
    "nyuv2": lambda folder: write_nyuv2(folder)[0],
    "defocusnet": lambda folder: (write_defocusnet(folder / "fs_6"), folder / "fs_6")[1],
    "ddff12": lambda folder: (write_ddff12(folder / "ddff.h5"), folder / "ddff.h5")[1],
    "zedd": lambda folder: (write_zedd(folder / "ZEDD"), folder / "ZEDD")[1],
}


def data_set(folder, kind):
    if kind == "defocusnet":
        pytest.importorskip("OpenEXR")
    return WRITERS[kind](folder)


def reconstructed(out, kind, source, factor, *, leave_out=0, metric=True):
    """Results in `out` whose depth is the truth of every scene times `factor`, however it was come by."""
    data = open_dataset(kind, source)
    for name in list(data.scenes)[leave_out:]:
        truth = data.truth(name)
        depth = PX_M / np.maximum(truth, 1e-3) if kind == "ddff12" else truth
        if kind == "nyuv2":
            depth = np.clip(depth, 0.1, 10)[::2, ::2]
        depth = np.where(np.isfinite(depth) & (depth > 0), depth, 1.0) * factor
        answer = small_result(name, metric=metric, height=depth.shape[0], width=depth.shape[1])
        answer.inverse_depth_dpt = (1 / depth).astype(np.float32)
        result.save(answer, out)
    return out


@pytest.mark.parametrize("kind", WRITERS)
def test_truth_scores_perfectly_and_ten_percent_more_is_ten_percent(tmp_path, capsys, kind):
    source = data_set(tmp_path, kind)
    means = {}
    for factor in (1.0, 1.1):
        out = reconstructed(tmp_path / str(factor), kind, source, factor)
        protocols.run(kind, out, source, subset=True, as_json=True)
        means[factor] = json.loads(capsys.readouterr().out)["mean"]
    abs_rel = "cut_abs_rel" if kind == "defocusnet" else "abs_rel"
    assert means[1.0][abs_rel] < (0.01 if kind == "nyuv2" else 1e-3)  # half the pixels of nyuv2 are interpolated
    expected = 1 - 1 / 1.1 if kind == "ddff12" else 0.1
    assert means[1.1][abs_rel] == pytest.approx(expected, abs=0.01)
    if kind == "zedd":
        assert means[1.1]["d1.05"] == 0.0
        assert means[1.1]["d1.15"] == 1.0


def test_table_with_published_rows_and_their_sources(tmp_path, capsys):
    source = data_set(tmp_path, "ddff12")
    protocols.run("ddff12", reconstructed(tmp_path / "out", "ddff12", source, 1.0), source, subset=False, as_json=False)
    text = capsys.readouterr().out
    assert "daif, 2 scenes" in text
    assert "FOSSA ViT-B, zero-shot [1]" in text
    assert "[1] published: README of princeton-vl/FOSSA" in text
    assert "pixels of disparity" in text


def test_part_of_the_scenes_is_no_table(tmp_path, capsys):
    source = data_set(tmp_path, "ddff12")
    out = reconstructed(tmp_path / "out", "ddff12", source, 1.0, leave_out=1)
    with pytest.raises(DataError, match=r"holds 1 of the 2 scenes of protocol ddff12.*--subset"):
        protocols.run("ddff12", out, source, subset=False, as_json=False)
    protocols.run("ddff12", out, source, subset=True, as_json=False)
    text = capsys.readouterr().out
    assert "1 of 2 scenes: not comparable" in text
    assert "FOSSA ViT" not in text


def test_a_data_set_with_too_few_scenes_is_no_table(tmp_path):
    source = data_set(tmp_path, "zedd")
    out = reconstructed(tmp_path / "out", "zedd", source, 1.0)
    with pytest.raises(DataError, match="holds 2 of the 50 scenes of protocol zedd"):
        protocols.run("zedd", out, source, subset=False, as_json=False)


def test_what_cannot_be_scored_is_one_sentence(tmp_path):
    source = data_set(tmp_path, "ddff12")
    with pytest.raises(UsageError, match="unknown protocol 'kitti'; it must be one of nyuv2, defocusnet, ddff12, zedd"):
        protocols.run("kitti", tmp_path, source, subset=False, as_json=False)
    with pytest.raises(UsageError, match="is not a folder"):
        protocols.run("ddff12", tmp_path / "none", source, subset=False, as_json=False)
    with pytest.raises(DataError, match=r"holds 0 of the 2 scenes.*import-dataset"):
        protocols.run("ddff12", tmp_path, source, subset=False, as_json=False)
    relative = reconstructed(tmp_path / "relative", "ddff12", source, 1.0, metric=False)
    with pytest.raises(DataError, match="is relative"):
        protocols.run("ddff12", relative, source, subset=False, as_json=False)
    small = tmp_path / "small"
    for name in open_dataset("ddff12", source).scenes:
        result.save(small_result(name, height=12, width=16), small)
    with pytest.raises(DataError, match="ddff12_val_0000: the reconstruction is 16 x 12 px and the truth 32 x 24"):
        protocols.run("ddff12", small, source, subset=False, as_json=False)
    with pytest.raises(DataError, match="needs a reconstruction of 16 x 12 px, half the size"):
        protocols.dered_errors(np.ones((24, 32)), np.ones((24, 32)))


def test_published_rows_use_the_columns_of_their_table():
    for protocol in protocols.PROTOCOLS.values():
        for row in protocol.published:
            assert row.values.keys() <= protocol.columns.keys()
            assert row.source


def test_from_data_set_to_table_by_command(tmp_path):
    source = data_set(tmp_path, "zedd")

    def daif(*words):
        return CliRunner().invoke(app, [str(word) for word in words])

    done = daif("import-dataset", "zedd", source, "-o", tmp_path / "stacks", "--limit", 1)
    assert done.stdout.split() == [str(tmp_path / "stacks/zedd_val_0001.h5")]
    done = daif("import-dataset", "ddff12", source, "-o", tmp_path / "x", "--frames", "0;2")
    assert isinstance(done.exception, UsageError)
    score = ("evaluate", reconstructed(tmp_path / "out", "zedd", source, 1.0), "--truth", source)
    done = daif(*score, "--protocol", "zedd", "--subset", "--json")
    assert json.loads(done.stdout)["mean"]["d1.25"] == 1.0
    assert isinstance(daif(*score, "--protocol", "zedd").exception, DataError)
    assert isinstance(daif(*score, "--subset").exception, UsageError)


def test_an_imported_stack_reconstructs(tmp_path):
    """NYUv2 at the published camera through the plane sweep: better than one constant depth by the paper's figures."""
    from reconstruct.infer import Settings, reconstruct

    source = write_nyuv2(tmp_path)[0]
    import_dataset("nyuv2", source, tmp_path / "stacks", renderer="published", limit=1)
    with FocalStack.open(tmp_path / "stacks/nyuv2_0002.h5") as stack:
        answer = reconstruct(stack, Settings(method="plane-sweep"))
    truth = open_dataset("nyuv2", source).truth("nyuv2_0002")
    found = protocols.dered_errors(np.nan_to_num(answer.depth, nan=10.0), truth)
    constant = protocols.dered_errors(np.full(answer.depth.shape, np.median(truth)), truth)
    assert found["rmse"] < 0.5 * constant["rmse"]
    assert found["delta1"] > 0.9
