"""Stacks on disk: what goes in comes out, what is damaged is refused in words, what is acknowledged survives."""

import errno
import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest

from capture import stack as stack_module
from capture.errors import DataError, LockedError, NoSpaceError, UsageError
from capture.lens import Lens
from capture.stack import FAILED, OK, PENDING, FocalStack, StackFormatError, StackWriter, pack_stack, write_stack
from tests.capture import killed_writers

ROOT = Path(__file__).parents[2]
LENS = Lens(focal_length_m=0.05, f_number=2.8, pixel_pitch_m=1.2e-5)
DISTANCES = [1.0, 1.5, 4.0, np.inf]


@pytest.fixture
def frames(rng=np.random.default_rng(1)):
    return rng.integers(0, 256, (4, 40, 56, 3), dtype=np.uint8)


@pytest.fixture
def good(tmp_path, frames):
    truth = np.linspace(1, 3, 40 * 56).reshape(40, 56)
    truth[0, 0] = np.nan
    return write_stack(
        tmp_path / "good.h5",
        frames,
        focus_distance_m=DISTANCES,
        lens=LENS,
        transfer="srgb",
        truth_depth_m=truth,
        truth_aif=np.full((40, 56, 3), 0.5),
        plan={"count": 4},
        board={"squares": [8, 11]},
        exif=b"II*\0rest",
        camera={"make": "Acme", "model": "Ünïcode 1"},
    )


# --- round trip


def test_a_stack_reads_back_bit_for_bit(good, frames):
    with FocalStack.open(good, deep=True) as stack:
        assert (stack.n_frames, stack.height, stack.width, stack.channels) == (4, 40, 56, 3)
        for i in range(4):
            np.testing.assert_array_equal(stack.raw(i), frames[i])
        np.testing.assert_array_equal(stack.focus_distance_m, DISTANCES)
        np.testing.assert_array_equal(stack.focus_dpt, [1, 1 / 1.5, 0.25, 0])
        assert stack.lens == LENS
        assert stack.is_metric
        assert stack.transfer == "srgb"
        assert stack.white_level == 255
        assert stack.truth_depth_m.dtype == np.float32
        assert np.isnan(stack.truth_depth_m[0, 0])
        assert stack.truth_aif[3, 4, 1] == 0.5
        assert stack.plan == {"count": 4}
        assert stack.board == {"squares": [8, 11]}
        assert stack.exif == b"II*\0rest"
        assert stack.camera == {"make": "Acme", "model": "Ünïcode 1"}
        assert stack.profile is None
        np.testing.assert_allclose(stack.mean_level, frames.mean(axis=(1, 2, 3)) / 255, rtol=1e-6)


def test_linear_reads_the_window_it_is_asked_for(good, frames):
    with FocalStack.open(good) as stack:
        window = stack.linear(2, slice(3, 20), slice(50, None))
        whole = stack.linear_stack()
    encoded = frames[2, 3:20, 50:] / 255.0
    expected = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    np.testing.assert_allclose(window, expected, atol=1e-6)
    np.testing.assert_array_equal(whole[2, 3:20, 50:], window)
    assert whole.dtype == np.float32


def test_grey_frames_become_three_equal_channels(tmp_path):
    frames = np.arange(2 * 8 * 9, dtype=np.uint16).reshape(2, 8, 9, 1) * 400
    with FocalStack.open(write_stack(tmp_path / "grey.h5", frames)) as stack:
        assert stack.raw(0).shape == (8, 9, 1)
        linear = stack.linear(1)
    np.testing.assert_allclose(linear, np.repeat(frames[1] / 65535, 3, axis=2), atol=1e-7)


def test_floating_frames_are_linear_light(tmp_path):
    frames = np.linspace(0, 1, 2 * 4 * 5 * 3).reshape(2, 4, 5, 3)
    with FocalStack.open(write_stack(tmp_path / "float.h5", frames)) as stack:
        np.testing.assert_allclose(stack.linear_stack(), frames, atol=0.6 / 65535)
        assert not stack.is_metric
        assert np.isnan(stack.focus_distance_m).all()


def test_the_file_is_plain_hdf5_with_fixed_length_text(good):
    with h5py.File(good) as file:
        assert file["stack/frames"].compression is None
        assert file["stack/frames"].fletcher32
        assert file.attrs["format"] == b"daif-focal-stack"

        def check(name, item):
            for key in item.attrs:
                kind = h5py.h5a.open(item.id, key.encode()).get_type()
                assert not (isinstance(kind, h5py.h5t.TypeStringID) and kind.is_variable_str()), (name, key)

        file.visititems(check)


def test_a_tile_read_does_not_read_the_frame(tmp_path):
    frames = np.zeros((2, 512, 512, 3), np.uint8)
    path = write_stack(tmp_path / "big.h5", frames, transfer="srgb")
    with h5py.File(path) as file:
        assert file["stack/frames"].chunks == (1, 256, 256, 3)
        broken = file["stack/frames"].id.get_chunk_info(3).byte_offset + 100
    with path.open("r+b") as raw:
        raw.seek(broken)
        raw.write(b"\xff")
    with FocalStack.open(path) as stack:
        assert stack.linear(0, slice(0, 200), slice(0, 200)).max() == 0  # its neighbour's damage is not touched
        with pytest.raises(StackFormatError, match="frame 0 of /stack/frames"):
            stack.linear(0)
    with pytest.raises(StackFormatError, match="frame 0"):
        FocalStack.open(path, deep=True)


# --- writing


def small_writer(path, **options):
    defaults = {"n_frames": 3, "height": 8, "width": 10, "transfer": "srgb"}
    return StackWriter.create(path, **(defaults | options))


def picture(value):
    return np.full((8, 10, 3), value, np.uint8)


def test_readers_see_ok_frames_while_the_writer_works(tmp_path):
    with small_writer(tmp_path / "a.h5", focus_unit="driver") as writer:
        writer.append(0, picture(10), focus_command=110, focus_distance_m=2.0, iso=100, metadata={"wb": "daylight"})
        writer.append(2, picture(30), focus_command=90, focus_distance_m=1.0)
        with FocalStack.open(writer.partial_path, allow_partial=True) as stack:
            assert stack.n_frames == 2
            assert stack.n_planned == 3
            assert list(stack.frame_index) == [0, 2]
            assert list(stack.status) == [OK, PENDING, OK]
            assert stack.raw(1).max() == 30
            assert list(stack.focus_command) == [110, 90]
            assert stack.focus_unit == "driver"
            assert stack.metadata == [{"wb": "daylight"}, {}]
            assert stack.iso[0] == 100
            assert np.isnan(stack.iso[1])
        with pytest.raises(StackFormatError, match=r"incomplete, 2 of 3 frames.*--resume"):
            FocalStack.open(writer.partial_path)
    assert not (tmp_path / "a.h5").exists()
    with pytest.raises(StackFormatError, match=r"a\.h5 does not exist; its capture is unfinished"):
        FocalStack.open(tmp_path / "a.h5")


def test_resume_takes_up_where_the_writer_stopped(tmp_path):
    path = tmp_path / "a.h5"
    with small_writer(path, plan={"steps": [1, 2, 3]}) as writer:
        writer.append(0, picture(1))
        writer.fail(1, "camera timed out")
    with pytest.raises(DataError, match="another plan"):
        StackWriter.resume(path, plan={"steps": [1, 2, 4]})
    with StackWriter.resume(path, plan={"steps": [1, 2, 3]}) as writer:
        assert list(writer.status) == [OK, FAILED, PENDING]
        assert writer.pending == [1, 2]
        writer.append(1, picture(2))
        with pytest.raises(DataError, match="2 of 3 frames"):
            writer.finish()
        writer.append(2, picture(3))
        assert writer.finish() == path
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.h5"]
    with FocalStack.open(path) as stack:
        assert [int(stack.raw(i).max()) for i in range(3)] == [1, 2, 3]
        assert stack.events[0]["reason"] == "camera timed out"
    with pytest.raises(DataError, match="nothing to resume"):
        StackWriter.resume(path)


def test_a_stopped_sweep_can_be_finished_short(tmp_path):
    with small_writer(tmp_path / "a.h5") as writer:
        writer.append(0, picture(1))
        with pytest.raises(DataError, match="1 of 3 frames, and 2 are needed"):
            writer.finish(allow_missing=True)
        writer.append(2, picture(3))
        writer.finish(allow_missing=True)
    with FocalStack.open(tmp_path / "a.h5") as stack:
        assert stack.n_frames == 2


@pytest.mark.parametrize(
    ("reported", "kind"),
    [
        ((1.0, 1.0, 2.0, 2.0), "spread"),
        ((1.0, 1.0, 1.0, 1.0), "ignored"),
        ((1.0, 2.0, 1.5, 3.0), "ignored"),
        ((1.0, np.inf, np.inf, np.inf), "ignored"),
    ],
)
def test_distances_that_are_no_sweep_keep_no_frames_from_being_used(tmp_path, reported, kind, caplog):
    with small_writer(tmp_path / "a.h5", n_frames=4) as writer:
        for i, distance_m in enumerate(reported):
            writer.append(i, picture(i), focus_distance_m=distance_m, focus_distance_source="exif")
    with FocalStack.open(tmp_path / "a.h5.partial", allow_partial=True) as stack:  # of a version that refused to finish
        assert re.search("duplicate|turn", stack.distance_problem)
        partial_m = stack.focus_distance_m
    with StackWriter.resume(tmp_path / "a.h5") as writer:
        writer.finish()
    assert "a.h5: " in caplog.text
    with FocalStack.open(tmp_path / "a.h5", deep=True) as stack:
        assert stack.n_frames == 4
        assert stack.distance_problem is None
        np.testing.assert_array_equal(stack.focus_distance_m, partial_m)
        assert stack.events[-1]["kind"] == f"focus_distances_{kind}"
        assert stack.events[-1]["reported_m"] == list(reported)
        if kind == "spread":
            assert np.all(np.diff(stack.focus_distance_m) > 0)
            np.testing.assert_allclose(stack.focus_distance_m, reported, rtol=0.03)
            assert stack.focus_distance_source == ["exif"] * 4
        else:
            assert not stack.is_metric
            assert np.isnan(stack.focus_distance_m).all()
            assert stack.focus_distance_source == [""] * 4


def test_the_cameras_own_files_are_kept_beside_the_stack(tmp_path):
    import hashlib

    with small_writer(tmp_path / "a.h5") as writer:
        writer.append(0, picture(1), originals=[("../../x/DSC 1.NEF", b"raw"), ("DSC 1.JPG", b"jpg")])
    with FocalStack.open(tmp_path / "a.h5.partial", allow_partial=True) as stack:
        folder = f"a.h5.{stack.uuid[:8]}.originals"
        assert stack.original_name == [f"{folder}/000_DSC_1.NEF"]
        assert stack.original_sha256 == [hashlib.sha256(b"raw").hexdigest()]
        assert stack.metadata[0]["originals"][1]["file"] == f"{folder}/000_DSC_1.JPG"
    assert (tmp_path / folder / "000_DSC_1.NEF").read_bytes() == b"raw"


def originals_of(path):
    """The camera's own file of every frame, as the stack finds it; its sha256 must fit."""
    import hashlib

    with FocalStack.open(path) as stack:
        found = [(path.parent / name).read_bytes() for name in stack.original_name]
        assert [hashlib.sha256(data).hexdigest() for data in found] == stack.original_sha256
    return found


def captured(path, data, *, overwrite=False):
    with small_writer(path, n_frames=2, overwrite=overwrite) as writer:
        for i in range(2):
            writer.append(i, picture(i), originals=[("DSC.JPG", data + bytes([i]))])
        return writer.finish()


def test_no_later_stack_takes_the_cameras_files_of_an_earlier_one(tmp_path):
    monday = captured(tmp_path / "scene.h5", b"monday").rename(tmp_path / "monday.h5")
    captured(tmp_path / "scene.h5", b"tuesday")
    assert originals_of(monday) == [b"monday\0", b"monday\1"]
    assert originals_of(tmp_path / "scene.h5") == [b"tuesday\0", b"tuesday\1"]
    first, second = (captured(tmp_path / f"2026.11.{day}", bytes([day])) for day in (29, 30))
    assert [originals_of(path)[0] for path in (first, second)] == [b"\x1d\0", b"\x1e\0"]
    with small_writer(tmp_path / "scene.h5", n_frames=2, overwrite=True) as writer:  # --force that fails half-way
        writer.append(0, picture(0), originals=[("DSC.JPG", b"wednesday")])
    assert originals_of(tmp_path / "scene.h5") == [b"tuesday\0", b"tuesday\1"]


def test_a_frame_taken_again_keeps_both_files_and_the_same_file_once(tmp_path):
    with small_writer(tmp_path / "a.h5", n_frames=2) as writer:
        for data in (b"first", b"second", b"second", b"third"):
            writer.append(0, picture(1), originals=[("DSC.JPG", data)])
        writer.append(1, picture(2), originals=[("DSC.JPG", b"other")])
        writer.finish()
    assert originals_of(tmp_path / "a.h5") == [b"third", b"other"]
    (folder,) = tmp_path.glob("*.originals")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "000_DSC.JPG": b"first", "000_DSC_2.JPG": b"second", "000_DSC_3.JPG": b"third", "001_DSC.JPG": b"other",
    }  # fmt: skip


def test_long_names_of_stack_and_camera_file_are_found_again(tmp_path):
    path = tmp_path / ("ü" * 110 + ".h5")
    with small_writer(path, n_frames=2) as writer:
        for i in range(2):
            writer.append(i, picture(i), originals=[("ö" * 100 + ".JPG", b"data")])
        writer.finish()
    assert originals_of(path) == [b"data", b"data"]


def test_a_retaken_frame_does_not_count_while_it_is_overwritten(tmp_path, monkeypatch):
    with small_writer(tmp_path / "a.h5") as writer:
        writer.append(0, picture(1))

        def die(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(writer, "_fitting_json", die)
        with pytest.raises(KeyboardInterrupt):
            writer.append(0, picture(2))
    with FocalStack.open(tmp_path / "a.h5.partial", allow_partial=True) as stack:
        assert list(stack.status) == [PENDING, PENDING, PENDING]


def test_long_metadata_is_shortened_and_said_so(tmp_path):
    with small_writer(tmp_path / "a.h5") as writer:
        writer.append(0, picture(1), metadata={"short": 1, "long": "x" * 3000})
    with FocalStack.open(tmp_path / "a.h5.partial", allow_partial=True) as stack:
        assert stack.metadata == [{"short": 1}]
        assert stack.events[0] | {"time": 0} == {"time": 0, "kind": "metadata_left_out", "frame": 0, "keys": ["long"]}


def test_the_event_log_grows(tmp_path):
    with small_writer(tmp_path / "a.h5", sync=False) as writer:
        for i in range(600):
            writer.event("retry", number=i, text="y" * 50)
    with StackWriter.resume(tmp_path / "a.h5") as writer:
        writer.event("last")
    with FocalStack.open(tmp_path / "a.h5.partial", allow_partial=True) as stack:
        assert [event.get("number") for event in stack.events] == [*range(600), None]


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((8, 11, 3), np.uint8), r"frame 1: expected 10 x 8 px, 3 channels, uint8, found shape \(8, 11, 3\)"),
        (np.zeros((8, 10, 3), np.uint16), "found shape .* uint16"),
        (np.zeros((8, 10), np.uint8), "found shape"),
    ],
)
def test_frames_must_be_alike(tmp_path, image, words):
    with small_writer(tmp_path / "a.h5") as writer, pytest.raises(DataError, match=words):
        writer.append(1, image)


def test_an_existing_stack_is_not_overwritten(good, frames):
    before = good.read_bytes()
    with pytest.raises(UsageError, match=r"exists already.*--force"):
        write_stack(good, frames, transfer="srgb")
    with pytest.raises(DataError, match="duplicate focus distance"):
        write_stack(good, frames, transfer="srgb", focus_distance_m=[1, 1, 2, 3], overwrite=True)
    assert good.read_bytes() == before
    assert sorted(p.name for p in good.parent.iterdir()) == ["good.h5"]
    write_stack(good, frames[:2], transfer="srgb", overwrite=True)
    with FocalStack.open(good) as stack:
        assert stack.n_frames == 2


def test_an_unfinished_stack_is_not_overwritten(tmp_path):
    small_writer(tmp_path / "a.h5").close()
    with pytest.raises(UsageError, match=r"unfinished stack; continue it with --resume"):
        small_writer(tmp_path / "a.h5")
    small_writer(tmp_path / "a.h5", overwrite=True).close()


def test_packing_leaves_an_unfinished_stack_alone(good, tmp_path):
    small_writer(tmp_path / "a.h5").close()
    before = (tmp_path / "a.h5.partial").read_bytes()
    for overwrite in (False, True):
        with pytest.raises(UsageError, match=r"a\.h5\.partial holds an unfinished stack"):
            pack_stack(good, tmp_path / "a.h5", overwrite=overwrite)
    assert (tmp_path / "a.h5.partial").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.h5.partial", "good.h5"]


def test_names_that_cannot_be_written_are_refused(good, tmp_path):
    for path, words in ((tmp_path, "is a folder"), (tmp_path / ("x" * 250 + ".h5"), "253 bytes, 240 at most")):
        with pytest.raises(UsageError, match=words):
            small_writer(path, overwrite=True)
        with pytest.raises(UsageError, match=words):
            pack_stack(good, path, overwrite=True)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"folder .*nowhere does not exist"):
        small_writer(tmp_path / "nowhere" / "a.h5")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_named(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UsageError, match="not writable"):
            small_writer(tmp_path / "a.h5")
    finally:
        tmp_path.chmod(0o700)


# --- full disks


def test_space_is_checked_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(stack_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000_000))
    with pytest.raises(NoSpaceError, match=r"needs 12\d\.\d MB and .* has 10\.0 MB free"):
        small_writer(tmp_path / "a.h5", n_frames=20, height=1080, width=1920)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("Unable to flush file (file write failed: errno = 28, error message = 'No space left on device')"),
    ],
)
def test_a_disk_that_fills_up_keeps_earlier_frames(tmp_path, monkeypatch, error):
    with small_writer(tmp_path / "a.h5") as writer:
        writer.append(0, picture(7))
        monkeypatch.setattr(writer, "_flush", lambda: (_ for _ in ()).throw(error))
        with pytest.raises(NoSpaceError, match=r"disk is full.*frames written before are safe.*--resume"):
            writer.append(1, picture(8))
    with FocalStack.open(tmp_path / "a.h5.partial", allow_partial=True) as stack:
        assert stack.raw(0).max() == 7


SMALL_DISK = """
import sys, numpy as np
from capture.errors import NoSpaceError
from capture.stack import StackWriter, write_stack
import capture.stack as stack
stack.check_free_space = lambda *_: None  # as if another program filled the disk after the check
frames = np.zeros((4, 256, 256, 3), np.uint8)
write_stack(sys.argv[1] + "/small.h5", frames, transfer="srgb")
try:
    StackWriter.create(sys.argv[1] + "/big.h5", n_frames=40, height=256, width=256, transfer="srgb")
except NoSpaceError as error:
    print("said:", error)
"""


def test_a_really_full_disk(tmp_path):
    """A 3 MB tmpfs in a user namespace; skipped where those are not allowed."""
    mount = f"mount -t tmpfs -o size=3m none {tmp_path} && exec {sys.executable} -c '{SMALL_DISK}' {tmp_path}"
    probe = subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False)
    if probe.returncode != 0:
        pytest.skip("no user namespaces here")
    result = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount + f"; ls {tmp_path}"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    if "mount:" in result.stderr:
        pytest.skip("tmpfs cannot be mounted here")
    assert result.returncode == 0, result.stderr
    assert re.search(r"said: .*disk is full while writing .*big\.h5, 7\.9 MB", result.stdout), result


# --- one writer


def test_a_second_writer_is_told_who_holds_the_stack(tmp_path):
    with small_writer(tmp_path / "a.h5"):
        for again in (small_writer, StackWriter.resume):
            with pytest.raises(LockedError, match=rf"a\.h5 is being written by process {os.getpid()} on .* since"):
                again(tmp_path / "a.h5")


def test_a_lease_of_a_dead_process_is_taken_over(tmp_path):
    script = (
        "import os, signal, sys; from capture.stack import StackWriter\n"
        "StackWriter.create(sys.argv[1], n_frames=3, height=8, width=10, transfer='srgb')\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "a.h5")], cwd=ROOT, check=False)
    assert (tmp_path / "a.h5.lock").exists()
    with StackWriter.resume(tmp_path / "a.h5") as writer:
        assert writer.pending == [0, 1, 2]
    assert not (tmp_path / "a.h5.lock").exists()


def test_a_lease_of_another_machine_is_respected(tmp_path):
    (tmp_path / "a.h5.lock").write_text(json.dumps({"pid": 7, "host": "elsewhere", "started": "yesterday"}))
    with pytest.raises(LockedError, match=r"process 7 on elsewhere since yesterday; .*delete .*a\.h5\.lock"):
        small_writer(tmp_path / "a.h5")


def _race(path, start, results):
    start.wait()
    try:
        with small_writer(path, overwrite=True, sync=False) as writer:
            results.put("won")
            time.sleep(0.3)
            writer.discard()
    except LockedError:
        results.put("told")


def test_of_many_writers_one_wins(tmp_path):
    context = multiprocessing.get_context("spawn")
    start, results = context.Event(), context.Queue()
    racers = [context.Process(target=_race, args=(tmp_path / "a.h5", start, results)) for _ in range(3)]
    for racer in racers:
        racer.start()
    time.sleep(1.5)
    start.set()
    answers = [results.get(timeout=60) for _ in racers]
    for racer in racers:
        racer.join()
    assert answers.count("won") >= 1
    assert set(answers) <= {"won", "told"}
    assert not (tmp_path / "a.h5.lock").exists()


# --- SIGKILL


def check_killed(folder, runs, seed):
    """Kill `runs` writers at random moments; returns how many frames were acknowledged in all."""
    result = subprocess.run(
        [sys.executable, str(ROOT / "tests/capture/killed_writers.py"), str(folder), str(runs), str(seed)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    moments = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(moments) == runs
    for moment in moments:
        run, path = moment["run"], Path(moment["path"])
        acknowledged = [i for i in moment["frames"] if i < killed_writers.N_FRAMES]
        partial = path.with_name(path.name + ".partial")
        if ord("F") in moment["frames"]:
            assert path.exists()
        existing = path if path.exists() else partial
        if not existing.exists():
            assert acknowledged == []  # killed before the file was created
            continue
        with FocalStack.open(existing, allow_partial=True, deep=True) as stack:
            there = list(stack.frame_index)
            assert set(acknowledged) <= set(there)
            assert len(there) <= len(acknowledged) + 1
            for row, i in enumerate(there):
                np.testing.assert_array_equal(stack.raw(row), killed_writers.frame(run, i))
                assert stack.focus_distance_m[row] == 1.0 + i
                assert (path.parent / stack.original_name[row]).read_bytes() == bytes([run % 256, i])
        if existing == partial:
            with StackWriter.resume(path, plan={"run": run}, sync=False) as writer:
                for i in writer.pending:
                    writer.append(i, killed_writers.frame(run, i), focus_distance_m=1.0 + i)
                writer.finish()
            with FocalStack.open(path, deep=True) as stack:
                for i in range(killed_writers.N_FRAMES):
                    np.testing.assert_array_equal(stack.raw(i), killed_writers.frame(run, i))
    return [len(moment["frames"]) for moment in moments]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_sigkill_at_100_random_moments_loses_nothing_acknowledged(tmp_path):
    counts = check_killed(tmp_path, 100, seed=0)
    assert len(set(counts)) > 3, "the moments should differ"


@pytest.mark.slow
def test_sigkill_at_1000_random_moments(tmp_path):
    check_killed(tmp_path, 1000, seed=1)


# --- bad files


def edited(path, change):
    with h5py.File(path, "r+") as file:
        change(file)
    return path


def set_item(name, index, value):
    def change(file):
        file[name][index] = value

    return change


def set_attribute(name, key, value):
    def change(file):
        file[name].attrs[key] = value

    return change


def replace(name, **options):
    def change(file):
        del file[name]
        file.create_dataset(name, **options)

    return change


BAD = {
    "other version": (
        set_attribute("/", "format_version", np.bytes_("2.0")),
        "format_version: expected 1.0.*found 2.0",
    ),
    "other format": (set_attribute("/", "format", np.bytes_("nyu")), "attribute format: expected daif-focal-stack"),
    "variable text": (
        set_attribute("/", "format", "daif-focal-stack"),
        "format: expected numbers or fixed-length text",
    ),
    "no frames": (lambda file: file.__delitem__("stack/frames"), "/stack/frames: expected a dataset, found nothing"),
    "no stack": (lambda file: file.__delitem__("stack"), "/stack/frames: expected a dataset, found nothing"),
    "frames as floats": (
        replace("stack/frames", data=np.zeros((4, 8, 8, 3))),
        "/stack/frames: expected values of kind u",
    ),
    "frames too flat": (
        replace("stack/frames", data=np.zeros((4, 8, 8), np.uint8)),
        "/stack/frames: expected .frames,",
    ),
    "four channels": (replace("stack/frames", data=np.zeros((4, 8, 8, 4), np.uint8)), "/stack/frames: expected"),
    "promised pixels": (
        replace("stack/frames", shape=(4, 60000, 60000, 3), dtype="u1", chunks=(1, 64, 64, 3)),
        "at most the file's .* bytes, found a shape",
    ),
    "fewer states": (replace("stack/status", data=np.ones(3, np.uint8)), r"/stack/status: expected shape \(4,\)"),
    "unknown state": (set_item("stack/status", 1, 9), "/stack/status: expected 0, 1 or 2, found 9"),
    "one frame": (set_item("stack/status", slice(1, None), 0), "at least 2 frames that are ok, found 1"),
    "duplicate": (set_item("stack/focus_distance", 2, 1.5), "duplicate focus distance 1.5 m in frames 1 and 2"),
    "turning": (set_item("stack/focus_distance", 1, 9.0), r"turn at frame 1 \(1, 9, 4 m\)"),
    "negative": (set_item("stack/focus_distance", 1, -1.0), "focus distance -1 m of frame 1 is not positive"),
    "zero": (set_item("stack/focus_distance", 0, 0.0), "focus distance 0 m of frame 0 is not positive"),
    "unknown curve": (
        lambda file: file["stack/frames"].attrs.__setitem__("transfer_function", np.bytes_("log")),
        "transfer_function: expected linear, srgb or rec709, found 'log'",
    ),
    "no white": (set_attribute("stack/frames", "white_level", 0.0), r"white_level: expected a number in \(0, 255\]"),
    "millimetres": (set_attribute("lens", "focal_length", 50.0), "focal_length_m: 50 is not a focal length in metres"),
    "half a lens": (lambda file: file["lens"].attrs.__delitem__("f_number"), "/lens attribute f_number"),
    "soft link": (
        lambda file: (file.__delitem__("stack/frames"), file.__setitem__("stack/frames", h5py.SoftLink("/x")))[0],
        "expected data in this file, found a link",
    ),
    "external link": (
        lambda file: (
            file.__delitem__("stack/frames"),
            file.__setitem__("stack/frames", h5py.ExternalLink("/etc/passwd", "/x")),
        )[0],
        "expected data in this file, found a link",
    ),
    "incomplete": (set_attribute("/", "complete", np.uint8(0)), "is incomplete, 4 of 4 frames"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_trusted_is_refused_in_one_sentence(good, case):
    change, words = BAD[case]
    edited(good, change)
    with pytest.raises(StackFormatError, match=words) as caught:
        FocalStack.open(good)
    assert str(good) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "not a focal stack"), (b"\x89PNG\r\n\x1a\n" + bytes(99), "not a focal stack.*daif import")],
)
def test_other_files_are_refused(tmp_path, content, words):
    path = tmp_path / "x.h5"
    path.write_bytes(content)
    with pytest.raises(StackFormatError, match=words):
        FocalStack.open(path)
    with pytest.raises(StackFormatError, match="does not exist"):
        FocalStack.open(tmp_path / "y.h5")
    with pytest.raises(StackFormatError, match="cannot be read"):
        FocalStack.open(tmp_path)


def test_truncation_is_refused_at_every_length(good):
    content = good.read_bytes()
    for length in range(0, len(content), len(content) // 40):
        good.write_bytes(content[:length])
        with pytest.raises(StackFormatError):
            FocalStack.open(good)


@pytest.mark.parametrize("unknown", [[0], [1, 2], [0, 1, 2, 3]])
def test_unknown_distances_make_an_uncalibrated_stack(good, unknown):
    edited(good, set_item("stack/focus_distance", unknown, np.nan))
    with FocalStack.open(good) as stack:
        assert not stack.is_metric
        assert list(np.flatnonzero(np.isnan(stack.focus_dpt))) == unknown


def test_later_minor_versions_and_unknown_fields_are_read(good):
    def change(file):
        file.attrs["format_version"] = np.bytes_("1.7")
        file.create_group("later").attrs["text"] = "variable"
        file["stack/later"] = np.arange(3)

    with FocalStack.open(edited(good, change), deep=True) as stack:
        assert stack.n_frames == 4


def use_everything(path, frames):
    """Read all there is; wrong pixels are an error, as every tile has a checksum."""
    with FocalStack.open(path, deep=True) as stack:
        linear = stack.linear_stack()
        for name in ("events", "plan", "board", "exif", "metadata", "truth_depth_m", "truth_aif", "profile"):
            getattr(stack, name)
        for name in ("original_name", "original_sha256", "focus_distance_source", "profile_yaml"):
            getattr(stack, name)
        if stack.height == frames.shape[1] and stack.width == frames.shape[2]:
            for row, i in enumerate(stack.frame_index):
                np.testing.assert_array_equal(stack.raw(row), frames[i])
        return linear


def mutate(content, rng):
    """Truncated (one in four), or up to 20 bytes changed, mostly in the metadata."""
    changed = bytearray(content)
    if rng.integers(4) == 0:
        return changed[: rng.integers(len(changed))]
    for _ in range(rng.integers(1, 20)):
        place = rng.integers(len(changed)) if rng.random() < 0.3 else rng.integers(min(20_000, len(changed)))
        changed[place] = rng.integers(256)
    return changed


def check_mutations(good, frames, count, seed):
    content, rng = good.read_bytes(), np.random.default_rng(seed)
    refused = []
    for _ in range(count):
        good.write_bytes(mutate(content, rng))
        started = time.process_time()
        try:
            use_everything(good, frames)
        except StackFormatError as error:
            refused.append(str(error))
        assert time.process_time() - started < 5
    assert all(str(good) in sentence and len(sentence) < 600 for sentence in refused)
    return len(refused)


def test_damaged_files_give_one_error_class(good, frames):
    assert check_mutations(good, frames, 300, seed=0) > 100


@pytest.mark.slow
def test_many_damaged_files_give_one_error_class(good, frames):
    check_mutations(good, frames, 20_000, seed=1)


# --- pack


def test_pack_is_smaller_and_the_same(tmp_path):
    frames = np.repeat(np.arange(60, dtype=np.uint8), 60).reshape(1, 60, 60, 1) + np.arange(3, dtype=np.uint8).reshape(
        3, 1, 1, 1
    )
    frames = np.repeat(frames, 3, axis=3)
    path = write_stack(
        tmp_path / "a.h5", frames, transfer="srgb", focus_distance_m=[1, 2, np.nan], truth_depth_m=np.ones((60, 60)),
        plan={"a": 1}, lens=LENS,
    )  # fmt: skip
    packed = pack_stack(path, tmp_path / "b.h5")
    with FocalStack.open(path) as one, FocalStack.open(packed, deep=True) as two:
        for i in range(3):
            np.testing.assert_array_equal(one.raw(i), two.raw(i))
        np.testing.assert_array_equal(one.focus_distance_m, two.focus_distance_m)
        np.testing.assert_array_equal(one.truth_depth_m, two.truth_depth_m)
        assert (one.plan, one.lens, one.uuid) == (two.plan, two.lens, two.uuid)
    with h5py.File(packed) as file:
        assert file["stack/frames"].compression == "gzip"
        assert file["stack/frames"].id.get_storage_size() < frames.size / 2
    with pytest.raises(UsageError, match="exists already"):
        pack_stack(path, packed)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.h5", "b.h5"]


def test_pack_notices_a_copy_that_differs(good, tmp_path, monkeypatch):
    def spoil(source, target):
        write_stack_bytes = source.path.read_bytes()
        target.write_bytes(write_stack_bytes)
        edited(target, set_item("stack/iso", 0, 123.0))

    monkeypatch.setattr(stack_module._Source, "copy_packed", spoil)
    with pytest.raises(StackFormatError, match="/stack/iso: expected the same bytes"):
        pack_stack(good, tmp_path / "b.h5")
    assert not (tmp_path / "b.h5").exists()
    assert not (tmp_path / "b.h5.partial").exists()
