"""The judge of fine-tuning: does a withheld frame tell a better depth from a worse one?"""

from __future__ import annotations

import copy
import threading
import time
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from capture.optics import Condition, simulate_sweep, sweep_for_scene
from capture.scenes import procedural_scene
from reconstruct import finetune
from reconstruct.dataset import CapturedStack
from reconstruct.finetune import Lesson, reliably_lower, withheld_error
from reconstruct.predict import load_network
from reconstruct.settle import LEARNED, stay


@pytest.fixture(scope="module")
def captured():
    """A noisy sweep, and its true inverse depth."""
    scene = procedural_scene(3, 72, 96)
    sweep = simulate_sweep(scene, *sweep_for_scene(scene, 5, 12.0), Condition(noise_std=0.01, bits=8))
    frames = torch.from_numpy(np.ascontiguousarray(sweep.linear().transpose(0, 3, 1, 2)))
    focus, kappa = (torch.tensor(x, dtype=torch.float32) for x in (sweep.focus_dpt, sweep.kappa_px_per_dpt))
    stack = CapturedStack("scene", frames, torch.ones(5, 72, 96, dtype=torch.bool), focus, kappa, True)
    return stack, torch.from_numpy((1 / scene.depth_m).astype(np.float32))


@pytest.fixture(scope="module")
def judged(captured, tmp_path_factory):
    """That sweep, its middle frame withheld."""
    stack, truth = captured
    return Lesson.prepare(stack, None, 0, torch.device("cpu"), tmp_path_factory.mktemp("kept")), truth


def test_withheld_frame_prefers_the_truth(judged):
    """To the plane sweep, and to smoothed, shifted and wavy versions of the truth."""
    lesson, truth = judged
    px = 4 / float(lesson.stack.kappa.mean())
    y, x = torch.meshgrid(torch.arange(72.0), torch.arange(96.0), indexing="ij")
    worse = {
        "sweep": lesson.wanted.inverse_depth_dpt,
        "smoothed": torch.from_numpy(cv2.GaussianBlur(truth.numpy(), (0, 0), 2)),
        "shifted": truth + 0.3 * px,
        "wavy": truth + 0.4 * px * torch.sin(x / 6) * torch.sin(y / 6),
    }

    def error(depth):
        return withheld_error(lesson, lesson.wanted._replace(inverse_depth_dpt=depth))

    best = error(truth)
    assert all(best < error(depth) for depth in worse.values())


def test_a_gain_must_exceed_the_disagreement_of_the_stacks():
    assert reliably_lower([3.0, 2.0, 4.0], [2.8, 1.9, 3.8])
    assert not reliably_lower([3.0, 2.0, 4.0], [2.4, 2.0, 4.4])  # lower on average, by one stack
    assert not reliably_lower([3.0], [2.99])
    assert reliably_lower([3.0], [2.9])
    assert not reliably_lower([3.0], [2.95])
    assert reliably_lower([3.0, 2.0, 4.0], [2.95, 1.965, 3.935])  # as little, but of each of three
    assert not reliably_lower([3.0, 2.0], [3.1, 2.1])


def test_a_fine_tuned_network_keeps_a_share_of_its_start():
    start = load_network("default", torch.device("cpu"))
    learned = copy.deepcopy(start.net)
    with torch.no_grad():
        for parameter in learned.parameters():
            parameter += 1.0
    kept, before = finetune._tempered(start, learned), start.net.state_dict()
    assert all(torch.allclose(new, before[name] + finetune.KEPT_CHANGE) for name, new in kept.state_dict().items())
    assert all(torch.allclose(learned.state_dict()[name], before[name] + 1) for name in before)  # goes on learning


@pytest.mark.parametrize(("start", "choosing"), [("default", LEARNED), (None, (stay,))])
def test_nothing_learned_elsewhere_teaches_a_network_that_starts_from_nothing(
    captured, tmp_path, monkeypatch, start, choosing
):
    network = start and load_network(start, torch.device("cpu"))
    told = []

    def refine(frames, focus, kappa, first, *, choices, **_):
        told.append(choices)
        return first

    monkeypatch.setattr(finetune, "refine", refine)
    finetune.prepare_lessons([captured[0]], network, 1, torch.device("cpu"), tmp_path)
    assert told == [choosing]


def test_processes_share_the_refining(captured, tmp_path, monkeypatch):
    """Two processes, one after the other: each refines its share and reads the other's; the same as one process."""
    first, _ = captured
    stacks = [first, replace(first.without(0), name="shorter")]
    refined, refine = [], finetune.refine

    def counted(frames, *rest, **more):
        refined.append(len(frames))
        return refine(frames, *rest, **more)

    def prepare(run="shared"):
        return finetune.prepare_lessons(stacks, None, 1, torch.device("cpu"), tmp_path / run)

    alone = prepare("alone")
    monkeypatch.setattr(finetune, "refine", counted)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    second = threading.Thread(target=prepare)
    second.start()
    while not refined:
        time.sleep(0.01)
    monkeypatch.setenv("RANK", "0")
    together = prepare()
    second.join()
    assert refined == [3, 4]  # one frame of each is withheld
    for one, two in zip(alone, together, strict=True):
        assert one.full.name == two.full.name
        assert one.psf == two.psf
        assert all(torch.equal(getattr(one.wanted, name), getattr(two.wanted, name)) for name in finetune.MAPS)
    assert [lesson.wanted.metric for lesson in prepare()] == [True, True]
    assert refined == [3, 4]  # not again after a restart


def test_the_fewer_the_stacks_the_more_is_learned_from_mixtures(captured, tmp_path):
    """None of many stacks, which vary enough; most of one alone. Every stack gets its own and they are all exact."""
    first = Lesson.prepare(captured[0], None, 0, torch.device("cpu"), tmp_path)
    shares = {}
    for count in (1, 3, finetune.VARIED):
        task = finetune.DistilTask([first] * count, finetune.FINETUNE, torch.device("cpu"), tmp_path)
        assert len(task.mixed) == (count < finetune.VARIED) * count * finetune.MIXTURES
        assert all(lesson.exact for lesson in task.mixed)
        drawn = [task.batch(step).exact.mean().item() for step in range(200)]
        shares[count] = 1 - np.mean(drawn)  # of crops from the stacks themselves
    expected = {count: 0.4 * count / finetune.VARIED for count in shares}  # 2 of 5 where nothing is mixed
    assert shares == pytest.approx(expected, abs=0.05)
