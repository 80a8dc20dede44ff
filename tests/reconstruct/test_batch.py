"""Finding stacks, skipping finished ones, going past failures, URLs."""

import json
import shutil
import threading
import time

import cv2
import fsspec
import numpy as np
import pytest

from capture.errors import DataError, SomeFailedError, UsageError
from capture.stack import FocalStack, StackWriter
from reconstruct import batch
from reconstruct.infer import Settings
from reconstruct.job import Job, stack_name
from tests.reconstruct.small_stack import write_small_stack

SETTINGS = Settings(method="plane-sweep", device="cpu", align=False)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Two good stacks (one in a folder below), one damaged, and a folder of photographs."""
    folder = tmp_path_factory.mktemp("archive")
    good = write_small_stack(folder / "good.h5")
    (folder / "evening").mkdir()
    write_small_stack(folder / "evening" / "second.h5", seed=1)
    (folder / "damaged.h5").write_bytes(good.read_bytes()[:20_000])
    photographs = folder / "photographs"
    photographs.mkdir()
    rng = np.random.default_rng(0)
    picture = cv2.GaussianBlur(rng.integers(0, 255, (64, 80, 3)).astype(np.uint8), (0, 0), 1)
    for i, sigma in enumerate((0.5, 1.5)):
        cv2.imwrite(str(photographs / f"frame_{i}.png"), cv2.GaussianBlur(picture, (0, 0), sigma))
    return folder


def test_finds_stacks_and_folders_of_photographs(archive):
    found = {stack_name(stack) for stack in batch.find_stacks([str(archive)])}
    assert found == {"good", "second", "damaged", "photographs"}


def test_a_failed_stack_does_not_stop_the_others_and_a_second_run_does_nothing(archive, tmp_path, capsys):
    job = Job(str(tmp_path / "out"), SETTINGS)
    stacks = batch.find_stacks([str(archive)])
    with pytest.raises(SomeFailedError, match="1 of 4 stacks failed: damaged"):
        batch.run(stacks, job)
    assert "damaged.h5" in capsys.readouterr().err
    entries = {
        entry["stack"].rsplit("/", 1)[-1]: entry for entry in json.loads((tmp_path / "out/batch.json").read_text())
    }
    assert {name: entry["status"] for name, entry in entries.items()} == {
        "good.h5": "done",
        "second.h5": "done",
        "photographs": "done",
        "damaged.h5": "failed",
    }
    record = json.loads((tmp_path / "out/photographs/reconstruction.json").read_text())
    assert record["metric"] is False
    good = [stack for stack in stacks if "damaged" not in stack]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("depth.npy")}
    assert {outcome.status for outcome in batch.run(good, job)} == {"skipped"}
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("depth.npy")}


def test_results_are_not_taken_for_stacks(archive, tmp_path):
    out = tmp_path / "out"
    batch.run([str(archive / "good.h5")], Job(str(out), SETTINGS))
    with pytest.raises(DataError, match="no focal stack"):
        batch.find_stacks([str(out)])


def test_a_single_stack_fails_with_its_own_error(archive, tmp_path):
    with pytest.raises(DataError, match=r"damaged\.h5"):
        batch.run([str(archive / "damaged.h5")], Job(str(tmp_path), SETTINGS))


def test_two_stacks_of_one_name_are_refused(archive, tmp_path):
    write_small_stack(tmp_path / "good.h5")
    with pytest.raises(UsageError, match="would both write good/"):
        batch.find_stacks([str(archive), str(tmp_path)])


@pytest.mark.parametrize(
    ("location", "words"), [("/no/such/place", "does not exist"), ("memory://nowhere", "does not exist")]
)
def test_a_place_that_is_not_there(location, words):
    with pytest.raises(UsageError, match=words):
        batch.find_stacks([location])


def test_from_a_bucket_to_a_bucket(archive):
    files = fsspec.filesystem("memory")
    files.pipe("/bucket/in/good.h5", (archive / "good.h5").read_bytes())
    stacks = batch.find_stacks(["memory://bucket/in"])
    batch.run(stacks, Job("memory://bucket/out", SETTINGS))
    written = {name.rsplit("/", 1)[-1] for name in files.find("/bucket/out")}
    assert {"depth.npy", "report.html", "reconstruction.json", "batch.json"} <= written
    assert batch.run(stacks, Job("memory://bucket/out", SETTINGS))[0].status == "skipped"


def test_follows_a_stack_that_is_being_captured(tmp_path, capsys):
    """Another thread commits frames while the result is refreshed."""
    with FocalStack.open(write_small_stack(tmp_path / "source.h5")) as source:
        frames, lens = [source.raw(i) for i in range(source.n_frames)], source.lens
        distances, transfer = source.focus_distance_m, source.transfer
    folder = tmp_path / "live"
    folder.mkdir()
    height, width, _ = frames[0].shape
    writer = StackWriter.create(
        folder / "live.h5", n_frames=4, height=height, width=width, dtype=frames[0].dtype, transfer=transfer, lens=lens
    )

    def capture():
        for i, frame in enumerate(frames):
            writer.append(i, frame, focus_distance_m=distances[i])
            time.sleep(1.0)
        writer.finish()

    thread = threading.Thread(target=capture)
    thread.start()
    batch.follow(str(folder / "live.h5"), Job(str(tmp_path / "out"), SETTINGS))
    thread.join()
    assert json.loads((tmp_path / "out/live/reconstruction.json").read_text())["input"]["frames"] == 4
    assert len(capsys.readouterr().out.splitlines()) > 1


def test_following_says_at_the_end_what_is_to_be_known_of_the_result(tmp_path, capsys):
    stack = write_small_stack(tmp_path / "small.h5", calibrated=False)
    batch.follow(str(stack), Job(str(tmp_path / "out"), SETTINGS))
    assert "depth is relative" in capsys.readouterr().err


@pytest.fixture
def photographs_in_the_way(archive, tmp_path):
    """`good.h5`, and where its result would go a folder of photographs."""
    shutil.copytree(archive / "photographs", tmp_path / "good")
    shutil.copy(archive / "good.h5", tmp_path)
    return tmp_path


def no_work(*args, **kwargs):
    raise AssertionError("the work has started")


@pytest.mark.parametrize("force", [False, True])
def test_photographs_in_the_place_of_a_result_are_told_before_any_work(photographs_in_the_way, monkeypatch, force):
    folder = photographs_in_the_way
    monkeypatch.setattr(batch, "solve", no_work)
    with pytest.raises(UsageError, match="never replaced"):
        batch.run([str(folder / "good.h5")], Job(str(folder), SETTINGS, force=force))
    monkeypatch.setattr(batch, "process_stack", no_work)
    with pytest.raises(UsageError, match="never replaced"):
        batch.follow(str(folder / "good.h5"), Job(str(folder), SETTINGS, force=force))
    assert len(list((folder / "good").iterdir())) == 2


def test_the_other_stacks_are_reconstructed_all_the_same(archive, photographs_in_the_way, capsys):
    folder = photographs_in_the_way
    shutil.copy(archive / "evening" / "second.h5", folder)
    with pytest.raises(SomeFailedError, match="1 of 2 stacks failed: good"):
        batch.run([str(folder / "good.h5"), str(folder / "second.h5")], Job(str(folder), SETTINGS, force=True))
    assert "never replaced" in capsys.readouterr().err
    assert (folder / "second" / "reconstruction.json").exists()
    assert {entry["status"] for entry in json.loads((folder / "batch.json").read_text())} == {"failed", "done"}


def test_a_stack_is_never_in_the_place_of_its_own_result(archive, tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "solve", no_work)
    shutil.copytree(archive / "photographs", tmp_path / "shoot")
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "reconstruction.json").write_text("{}")
    shutil.copy(archive / "good.h5", tmp_path / "inside" / "inside.h5")
    files = fsspec.filesystem("memory")
    files.pipe("/in/shoot/a.png", b"mine")
    for stack, out in (
        (str(tmp_path / "shoot"), str(tmp_path)),
        (str(tmp_path / "inside/inside.h5"), str(tmp_path)),
        ("memory://in/shoot", "memory://in"),
    ):
        with pytest.raises(UsageError, match="where the stack itself lies"):
            batch.run([stack], Job(out, SETTINGS, force=True))


@pytest.mark.slow
def test_on_workers(archive, tmp_path):
    stacks = [stack for stack in batch.find_stacks([str(archive)]) if "damaged" not in stack]
    outcomes = batch.run(stacks, Job(str(tmp_path), SETTINGS), workers=2)
    assert {outcome.status for outcome in outcomes} == {"done"}
