"""Stacks and results on another machine: real servers in processes of their own, asked through real sockets."""

import contextlib
import json
import re
import subprocess
import sys
import threading

import cv2
import fsspec
import numpy as np
import pytest

from capture.errors import SomeFailedError, UsageError, without_password
from reconstruct import batch, remote
from reconstruct.infer import Settings
from reconstruct.job import Job, stack_name
from tests.reconstruct.small_stack import write_small_stack

SETTINGS = Settings(method="plane-sweep", device="cpu", align=False)
PASSWORD = "hush"
LIMIT_S = 300  # a server that nobody stopped stops by itself


@contextlib.contextmanager
def serving(*command):
    """The port of a server of the Python module and options in `command`, which is stopped on the way out."""
    limited = (
        f"import runpy, signal, sys; signal.alarm({LIMIT_S}); sys.argv[:] = sys.argv[1:]; "
        "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", limited, *command], stderr=subprocess.PIPE, text=True)
    lines = iter(process.stderr.readline, "")
    try:
        port = next(found.group(1) for line in lines if (found := re.search(r"127\.0\.0\.1:(\d+)", line)))
        drain = threading.Thread(target=lambda: list(lines))
        drain.start()
        yield port
    finally:
        process.terminate()
        process.wait(timeout=30)
        drain.join()
        process.stderr.close()


@pytest.fixture(scope="module")
def ftp(tmp_path_factory):
    """URL, with a password, of a folder on an FTP server, whose driver comes with fsspec."""
    folder = tmp_path_factory.mktemp("ftp")
    with serving("pyftpdlib", "-i", "127.0.0.1", "-p", "0", "-w", "-d", str(folder)) as port:
        yield f"ftp://anonymous:{PASSWORD}@127.0.0.1:{port}"


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    """URL of a bucket on a server that speaks S3; needs pip install s3fs 'moto[s3]' flask flask-cors."""
    pytest.importorskip("s3fs")
    pytest.importorskip("moto")
    with pytest.MonkeyPatch.context() as patch, serving("moto.server", "-H", "127.0.0.1", "-p", "0") as port:
        patch.setenv("AWS_ACCESS_KEY_ID", "somebody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        fsspec.filesystem("s3").mkdir("archive")
        yield "s3://archive"


@pytest.fixture(params=["ftp", "s3"])
def bucket(request):
    return request.getfixturevalue(request.param)


def put(url, data):
    files, path = fsspec.core.url_to_fs(url)
    files.makedirs(path.rpartition("/")[0], exist_ok=True)
    files.pipe_file(path, data)


def photograph(sigma):
    rng = np.random.default_rng(0)
    picture = cv2.GaussianBlur(rng.integers(0, 255, (64, 80, 3)).astype(np.uint8), (0, 0), 1)
    return cv2.imencode(".png", cv2.GaussianBlur(picture, (0, 0), sigma))[1].tobytes()


def test_from_a_bucket_to_a_bucket(bucket, tmp_path, capsys):
    good = write_small_stack(tmp_path / "good.h5").read_bytes()
    put(f"{bucket}/in/good.h5", good)
    put(f"{bucket}/in/evening/damaged.h5", good[:20_000])
    for i, sigma in enumerate((0.5, 1.5)):
        put(f"{bucket}/in/photographs/frame_{i}.png", photograph(sigma))
    stacks = batch.find_stacks([f"{bucket}/in"])
    assert [stack_name(stack) for stack in stacks] == ["good", "damaged", "photographs"]  # largest first
    job = Job(f"{bucket}/in/out", SETTINGS)  # results below the stacks are not taken for stacks
    with pytest.raises(SomeFailedError, match="1 of 3 stacks failed: damaged"):
        batch.run(stacks, job)
    shown = without_password(bucket)
    said = "".join(capsys.readouterr())
    assert f"daif: {shown}/in/evening/damaged.h5: HDF5" in said and PASSWORD not in said
    files, out = fsspec.core.url_to_fs(job.out)
    written = {name.removeprefix(f"{out}/good/") for name in files.find(f"{out}/good")}
    assert {"depth.npy", "depth.png", "report.html", "reconstruction.json"} <= written
    assert batch.find_stacks([f"{bucket}/in"]) == stacks
    assert remote.read_record(job.out, "good")["input"]["file"] == f"{shown}/in/good.h5"
    assert not any(PASSWORD.encode() in text for text in files.cat(files.find(out)).values())
    entries = json.loads(files.cat_file(f"{out}/batch.json"))
    assert [entry["status"] for entry in entries] == ["done", "failed", "done"]
    again = [stack for stack in stacks if "damaged" not in stack]
    assert {outcome.status for outcome in batch.run(again, job)} == {"skipped"}


class CutOff:
    """A file system whose connection ends when depth.npy goes up."""

    def __init__(self, files):
        self.files = files

    def __getattr__(self, name):
        return getattr(self.files, name)

    def put_file(self, local, target):
        if target.endswith("depth.npy"):
            raise ConnectionResetError("cut off")
        self.files.put_file(local, target)


def test_a_replacement_cut_short_does_not_count_as_complete(bucket, monkeypatch):
    out, (files, path) = f"{bucket}/replaced", fsspec.core.url_to_fs(f"{bucket}/replaced")

    def write(words):
        with remote.output_folder(out) as folder:
            (folder / "one").mkdir()
            for name in ("aif.png", "depth.npy", "reconstruction.json"):
                (folder / "one" / name).write_text(json.dumps({"from": words}))

    write("first")
    assert remote.is_complete(out, "one")
    with monkeypatch.context() as patch:
        patch.setattr(fsspec.core, "url_to_fs", lambda url: (CutOff(files), path))
        with pytest.raises(UsageError, match="cut off"):
            write("second")
    assert not remote.is_complete(out, "one")
    write("third")
    assert remote.is_complete(out, "one") and remote.read_record(out, "one")["from"] == "third"


def test_watches_a_bucket(bucket, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(batch, "SETTLED_S", 0.3)
    monkeypatch.setattr(batch, "POLL_S", 0.1)
    put(f"{bucket}/hot/first.h5", write_small_stack(tmp_path / "first.h5").read_bytes())
    second = write_small_stack(tmp_path / "second.h5", seed=1).read_bytes()
    run = batch.run

    def two(stacks, job, ended):
        outcomes = run(stacks, job, ended=ended)
        if stack_name(stacks[0]) == "second":
            raise KeyboardInterrupt
        put(f"{bucket}/hot/second.h5", second)
        return outcomes

    monkeypatch.setattr(batch, "run", two)
    with pytest.raises(KeyboardInterrupt):
        batch.watch([f"{bucket}/hot"], Job(f"{bucket}/results", SETTINGS))
    assert [remote.is_complete(f"{bucket}/results", name) for name in ("first", "second")] == [True, True]
    entries = json.loads(fsspec.open(f"{bucket}/results/batch.json").open().read())
    assert [entry["stack"].rpartition("/")[2] for entry in entries] == ["first.h5", "second.h5"]


def test_a_bucket_out_of_reach_is_one_sentence(bucket):
    with pytest.raises(UsageError, match=r"/nowhere does not exist$"):
        batch.find_stacks([f"{bucket}/nowhere"])


def test_no_server_is_one_sentence(tmp_path):
    stack = write_small_stack(tmp_path / "small.h5")
    for call in (
        lambda: batch.find_stacks(["ftp://127.0.0.1:1/in"]),
        lambda: batch.run([str(stack)], Job("ftp://127.0.0.1:1/out", SETTINGS)),
    ):
        with pytest.raises(UsageError, match=r"ftp://127.0.0.1:1/\w+ cannot be reached or used \(.*refused\)"):
            call()
