"""Depth made even where nothing tells it, on maps whose truth is known."""

from __future__ import annotations

import pytest
import torch

from reconstruct.estimate import Estimate
from reconstruct.even import evened

KAPPA = torch.tensor([8.0, 8.0])  # 2 px of blur std a dioptre


@pytest.fixture
def scene():
    """Left half nearer and brighter than the right one; every second column unsure and off by 0.5 px."""
    true = torch.full((48, 64), 1.0)
    true[:, 32:] = 2.5
    aif = torch.full((3, 48, 64), 0.5)
    aif[:, :, 32:] = 0.1
    off, std = torch.zeros(48, 64), torch.full((48, 64), 0.02)
    off[:, 1::4], off[:, 3::4] = 0.25, -0.25
    std[:, 1::2] = 0.25
    confidence = 1 / (1 + 8 * std)
    return true, Estimate(true + off, std, confidence, aif)


def test_what_is_unsure_follows_its_surface(scene):
    true, answer = scene
    found = evened(answer, KAPPA)
    error = [(x.inverse_depth_dpt - true).abs()[:, 1::2].mean() for x in (answer, found)]
    assert error[0] == pytest.approx(0.25)
    assert error[1] < 0.05


def test_no_depth_crosses_an_edge(scene):
    true, answer = scene
    found = evened(answer, KAPPA).inverse_depth_dpt
    assert (found - true)[:, 28:36].abs().max() < 0.1  # the edge is 1.5 dioptres high


def test_what_is_sure_stays(scene):
    _, answer = scene
    found = evened(answer, KAPPA)
    assert (found.inverse_depth_dpt - answer.inverse_depth_dpt)[:, ::2].abs().max() < 1e-3
    assert found._replace(inverse_depth_dpt=answer.inverse_depth_dpt) == answer


def test_an_answer_without_spread_stays(scene):
    _, answer = scene
    silent = answer._replace(std_dpt=torch.full_like(answer.std_dpt, torch.nan))
    assert torch.equal(evened(silent, KAPPA).inverse_depth_dpt, answer.inverse_depth_dpt)
