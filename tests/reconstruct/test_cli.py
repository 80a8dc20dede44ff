"""`daif` as its users call it: exit codes, one sentence, no traceback."""

import os
import signal
import subprocess
import sys
import time

import cv2
import pytest

from capture.decode import to_srgb8
from capture.errors import UsageError
from capture.stack import FocalStack
from reconstruct import job
from reconstruct.cli import app
from tests.reconstruct.small_stack import write_small_stack

COMMANDS = {
    *("demo", "cameras", "plan", "capture", "session", "import", "info", "pack", "board", "calibrate"),
    *("train", "reconstruct", "evaluate", "view", "import-dataset"),
}
HEAVY = ("torch", "cv2", "h5py", "scipy", "distributed", "starlette")


def daif(*arguments, timeout=120):
    command = [sys.executable, "-c", "from reconstruct.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def test_every_command_of_the_contract_is_there():
    names = {command.name or command.callback.__name__.removesuffix("_command") for command in app.registered_commands}
    assert names >= COMMANDS


def test_help_does_not_import_what_it_does_not_need():
    code = f"import sys, reconstruct.cli; print([name for name in {HEAVY} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_one_stack_to_files_and_errors(tmp_path):
    stack = write_small_stack(tmp_path / "small.h5")
    done = daif("reconstruct", stack, "-o", tmp_path / "out", "--method", "plane-sweep", "--formats", "glb,nerfstudio")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/small/mesh.glb").exists()
    again = daif("reconstruct", stack, "-o", tmp_path / "out", "--method", "plane-sweep")
    assert "skipped" in again.stdout
    table = daif("evaluate", tmp_path / "out", "--truth", tmp_path)
    assert "AbsRel" in table.stdout
    scores = daif("evaluate", tmp_path / "out", "--truth", tmp_path, "--json")
    assert '"abs_rel"' in scores.stdout


BAD_INPUT = [
    pytest.param(lambda d: ["reconstruct", d / "missing.h5", "-o", d / "o"], 2, "does not exist", id="missing file"),
    pytest.param(lambda d: ["reconstruct", d, "-o", d / "o"], 6, "no focal stack", id="empty folder"),
    pytest.param(lambda d: ["reconstruct", write_small_stack(d / "s.h5"), "-o", d / "o", "--method", "magic"], 2,
                 "--method", id="unknown method"),
    pytest.param(lambda d: ["reconstruct", write_small_stack(d / "s.h5"), "-o", d / "o", "--method", "plane-sweep",
                            "--device", "cuda:9"], 2, "CUDA", id="no such device"),
    pytest.param(lambda d: ["reconstruct", write_small_stack(d / "s.h5"), "-o", "/proc/daif", "--method",
                            "plane-sweep"], 2, "cannot be written", id="output not writable"),
    pytest.param(lambda d: ["evaluate", d, "--truth", d], 6, "no finished reconstruction", id="nothing to evaluate"),
    pytest.param(lambda d: ["view", d / "missing"], 2, "is not a folder", id="nothing to view"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "code", "words"), BAD_INPUT)
def test_bad_input_is_one_sentence(tmp_path, arguments, code, words):
    run = daif(*arguments(tmp_path))
    assert run.returncode == code, run.stderr
    assert words in run.stderr
    assert "Traceback" not in run.stderr
    assert run.stderr.startswith("daif: ")
    assert len(run.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("format", ["exr", "glb,exr"])
def test_a_missing_package_is_told_before_any_work(tmp_path, monkeypatch, format):
    monkeypatch.setitem(sys.modules, "OpenEXR", None)  # as where it is not installed
    arguments = ["reconstruct", str(tmp_path / "there.h5"), "-o", str(tmp_path / "out"), "--formats", format]
    with pytest.raises(UsageError, match=r"pip install 'daif\[exr\]'"):
        app(arguments)
    with pytest.raises(UsageError, match=r"pip install 'daif\[exr\]'"):
        job.solve(str(tmp_path / "there.h5"), job.Job(str(tmp_path / "out"), formats=("exr",)))


def test_terminated_in_the_middle_leaves_nothing_behind(tmp_path):
    photographs, scratch = tmp_path / "photographs", tmp_path / "scratch"
    for folder in (photographs, scratch):
        folder.mkdir()
    with FocalStack.open(write_small_stack(tmp_path / "small.h5")) as stack:
        for i in range(stack.n_frames):
            cv2.imwrite(str(photographs / f"{i}.png"), to_srgb8(stack.linear(i)))
    arguments = ["reconstruct", str(photographs), "-o", str(tmp_path / "out"), "--refine", "1000000"]
    run = subprocess.Popen(
        [sys.executable, "-c", "from reconstruct.cli import main; main()", *arguments],
        env=os.environ | {"TMPDIR": str(scratch)},
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list(scratch.glob("daif-*/*.h5")) and run.poll() is None:
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    said = run.communicate(timeout=60)[1]
    assert run.returncode == 143, said
    assert said.splitlines()[-1] == "daif: terminated; run the same command again to continue"
    assert "Traceback" not in said
    assert list(scratch.iterdir()) == []
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["batch.json"]


def test_debug_shows_where(tmp_path):
    assert "Traceback" in daif("--debug", "view", tmp_path / "missing").stderr


@pytest.mark.slow
def test_help_is_quick():
    started = time.perf_counter()
    daif("--help")
    assert time.perf_counter() - started < 5
