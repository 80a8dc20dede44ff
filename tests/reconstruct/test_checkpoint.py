"""Weights and training states on disk: equal when read back, refused when damaged."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch

from capture.errors import DataError
from reconstruct import batch
from reconstruct.checkpoint import DEFAULT_WEIGHTS, latest_state, load_state, load_weights, save_state, save_weights
from reconstruct.device import pick_device
from reconstruct.infer import Settings
from reconstruct.job import Job
from reconstruct.network import build
from reconstruct.predict import load_network

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(2.5)}


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(path, TENSORS, {"preset": "default", "seed": 3})
    return path


def test_weights_come_back(weights):
    tensors, about = load_weights(weights, "default")
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert about["seed"] == 3
    assert not list(weights.parent.glob(".*"))


def flip_payload(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-5])


def break_json(path):
    path.with_suffix(".json").write_text("{")


def bury_json(path):
    path.with_suffix(".json").write_text("[" * 100_000)


def other_json(path):
    path.with_suffix(".json").write_text("[1, 2]")


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (flip_payload, "damaged"),
        (truncate, "damaged"),
        (break_json, "not readable as JSON"),
        (bury_json, "not readable as JSON"),
        (other_json, "not a description"),
        (lambda path: path.unlink(), "cannot be read"),
        (lambda path: path.with_suffix(".json").unlink(), "missing"),
    ],
)
def test_harmed_weights_are_refused(weights, harm, says):
    harm(weights)
    with pytest.raises(DataError, match=says) as caught:
        load_weights(weights)
    assert "w." in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_of_another_preset_are_refused(weights):
    with pytest.raises(DataError, match=r"preset 'default', expected 'paper'"):
        load_weights(weights, "paper")


def test_weights_that_do_not_fit_are_refused(weights):
    with pytest.raises(DataError, match="do not fit"):
        load_network(weights, pick_device("cpu"))


def test_unknown_preset_is_refused(tmp_path):
    save_weights(tmp_path / "w.safetensors", TENSORS, {"preset": "other"})
    with pytest.raises(DataError, match="other"):
        load_network(tmp_path / "w.safetensors", pick_device("cpu"))


@pytest.fixture
def run(tmp_path):
    """The folder of a run that left the shipped weights."""
    tensors, about = load_weights(DEFAULT_WEIGHTS)
    save_weights(tmp_path / "run/weights.safetensors", tensors, about)
    return tmp_path / "run"


@pytest.mark.parametrize("name", ["", "weights.safetensors", "weights.json"])
def test_a_run_and_either_of_its_files_mean_its_weights(run, name):
    network = load_network(run / name, pick_device("cpu"))
    assert network.identity.startswith("weights.safetensors ")


def test_workers_are_sent_the_weights_of_a_run(run, monkeypatch):
    sent = []
    monkeypatch.setattr(batch.cluster, "connect", lambda *where: contextlib.nullcontext())
    monkeypatch.setattr(batch.cluster, "send_files", lambda client, files: sent.extend(files))
    monkeypatch.setattr(batch.cluster, "run_on", lambda client, stacks, call: sent.append(call.keywords["job"]) or [])
    assert not list(batch._on_workers(["a.h5"], Job("out", Settings(weights=str(run))), 2, None))
    *files, job = sent
    assert files == [run / "weights.safetensors", run / "weights.json"]
    assert job.settings.weights == str(run / "weights.safetensors")


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds no weights\.safetensors; give a weights file, or the folder"):
        load_network(tmp_path, pick_device("cpu"))


@pytest.mark.parametrize("calibration", [[1], 3, None, {"std_gain": "x"}, {"std_floor_px": None}, {"std_gain": -1}])
def test_a_calibration_without_numbers_is_refused(run, calibration):
    path = run / "weights.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"calibration": calibration}))
    with pytest.raises(DataError, match=r"weights\.json: calibration: expected numbers .* found"):
        load_network(run, pick_device("cpu"))


def test_state_appears_whole(tmp_path):
    save_state(tmp_path, 7, {"model": TENSORS, "best": {}}, {"config": {"steps": 9}})
    save_state(tmp_path, 12, {"model": TENSORS}, {"config": {"steps": 9}})
    (tmp_path / ".partial-00000020").mkdir()  # a save that was killed
    newest = latest_state(tmp_path)
    assert newest is not None
    assert newest.name == "step-00000012"
    parts, about = load_state(newest)
    assert about["step"] == 12
    assert torch.equal(parts["model"]["a"], TENSORS["a"])


def test_damaged_state_is_refused(tmp_path):
    folder = save_state(tmp_path, 7, {"model": TENSORS}, {})
    flip_payload(folder / "model.safetensors")
    with pytest.raises(DataError, match="damaged"):
        load_state(folder)


def test_shipped_weights_fit_and_say_where_they_come_from():
    network = load_network("default", pick_device("cpu"), "default")
    assert network.net.state_dict().keys() == build("default").state_dict().keys()
    assert "simulated" in network.about["teacher"]
    assert network.about["calibration"]["std_gain"] > 0
    size = DEFAULT_WEIGHTS.stat().st_size + DEFAULT_WEIGHTS.with_suffix(".json").stat().st_size
    assert size < 8e6
    json.loads(DEFAULT_WEIGHTS.with_suffix(".json").read_text())
