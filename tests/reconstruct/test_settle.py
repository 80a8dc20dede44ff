"""The network that ends a refinement: what it sees, what it is worth, and how it is trained."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from capture.errors import DataError, UsageError
from reconstruct.checkpoint import DEFAULT_WEIGHTS, load_weights
from reconstruct.cli import app
from reconstruct.refine import RefineConfig, refine
from reconstruct.settle import OFFERS, SIGNS, WEIGHTS, Closing, SettlingNet, load_settling, settle
from reconstruct.settle_train import SettleRecipe, read_ending, refined_stack
from tests.reconstruct.test_refine import Stack

TINY = SettleRecipe(
    scenes=3,
    held_out=1,
    scene_px=96,
    stack_px=64,
    crop_px=48,
    refine_steps=2,
    steps=4,
    batch=2,
    warmup_steps=1,
    members=2,
)


def train(out: Path, pool: Path) -> str:
    """What `daif train` prints of a tiny run."""
    settings = out.with_suffix(".yaml")
    settings.write_text("\n".join(f"{name}: {value}" for name, value in TINY.model_dump().items()))
    options = ["--recipe", "refinement", "--config", settings, "--pool", pool, "-o", out]
    result = CliRunner().invoke(app, ["train", *map(str, options)])
    assert result.exit_code == 0, result.exception
    return result.stdout


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """The stacks of a tiny run, refined, and beside them the run."""
    folder = tmp_path_factory.mktemp("settling")
    assert str(folder / "run" / "settle.safetensors") in train(folder / "run", folder / "pool")
    return folder / "pool"


@pytest.fixture(scope="module")
def ending(pool):
    """One refined stack."""
    return refined_stack(TINY, pool, 0)


def closing_of(path: Path) -> Closing:
    maps, _ = load_weights(path, "closing")
    return Closing(**{name: maps[name] for name in Closing._fields})


def test_sees_misfits_relative_to_the_picture_s_own(ending):
    """A picture whose misfits are all twice as large is judged alike."""
    closing = closing_of(ending)
    assert closing.signs().shape == (SIGNS, TINY.stack_px, TINY.stack_px)
    louder = closing._replace(here=closing.here * 2, shifted=closing.shifted * 2, left=closing.left * 2)
    torch.testing.assert_close(louder.signs(), closing.signs(), rtol=0, atol=1e-5)
    assert closing.signs().abs().max() < 5


def test_offers_are_the_moves_that_it_learned_to_judge():
    moves = RefineConfig()
    assert 2 * len(moves.moves_px) + len(moves.recede_px) == OFFERS


def test_chooses_within_what_was_offered_and_a_little_beyond(ending):
    closing = closing_of(ending)
    torch.manual_seed(0)
    net = SettlingNet()
    for scale in net.parameters():
        scale.data *= 30  # answers of any kind
    candidates = closing.candidates_px()
    with torch.no_grad():
        depth = net(closing.signs()[None], candidates[None])[0]
    assert (depth <= candidates.amax(0) + 1.001).all()
    assert (depth >= candidates.amin(0) - 1.001).all()


def test_stays_where_other_moves_were_offered(ending):
    closing = closing_of(ending)
    fewer = closing._replace(offers_px=closing.offers_px[:2], left=closing.left[:3])
    assert torch.equal(settle(fewer), closing.settled_px)


def test_refinement_ends_with_its_choice():
    stack = Stack()
    kept = []

    def keep(closing):
        kept.append(closing)
        return settle(closing)

    refined = refine(stack.frames, stack.focus, stack.kappa, stack.start, steps=2, conclude=keep)
    dpt_per_px = 4 / stack.kappa.mean()
    torch.testing.assert_close(refined.inverse_depth_dpt, settle(kept[0]) * dpt_per_px)
    assert (settle(kept[0]) - kept[0].settled_px).abs().max() > 0.01
    assert inspect.signature(refine).parameters["conclude"].default is settle


def test_a_stack_is_refined_once(ending, pool):
    before = ending.stat().st_mtime_ns
    assert len(list(pool.rglob("*.safetensors"))) == TINY.scenes
    assert refined_stack(TINY, pool, 0) == ending
    assert ending.stat().st_mtime_ns == before
    read = read_ending(ending)
    assert read.start_error_px == pytest.approx(read.error_px(load_weights(ending)[0]["start_px"]))


def test_other_weights_are_refused():
    with pytest.raises(DataError, match="expected 'settle'"):
        load_settling(DEFAULT_WEIGHTS, torch.device("cpu"))


def test_trains_from_the_command_line_and_again_the_same(tmp_path, pool):
    train(tmp_path / "again", pool)
    first, again = (
        load_weights(run / "settle.safetensors", "settle") for run in (pool.parent / "run", tmp_path / "again")
    )
    assert all(torch.equal(x, again[0][name]) for name, x in first[0].items())
    assert first[1]["recipe"] == TINY.model_dump()
    assert first[1]["validation"] == again[1]["validation"]
    untrained = SettlingNet(TINY.width, TINY.members).state_dict()
    assert {name: x.shape for name, x in untrained.items()} == {name: x.shape for name, x in first[0].items()}


def test_the_plan_is_told(tmp_path):
    result = CliRunner().invoke(app, ["train", "--recipe", "refinement", "-o", str(tmp_path / "run"), "--dry-run"])
    assert "440 simulated stacks" in result.stdout
    assert not (tmp_path / "run").exists()


def test_shipped_weights_say_how_they_came_about():
    _, about = load_weights(WEIGHTS, "settle")
    assert about["recipe"] == SettleRecipe().model_dump()
    assert about["validation"]["chosen_to_start"] < about["validation"]["refined_to_start"]


@pytest.mark.parametrize(
    ("wrong", "says"), [({"scenes": 12}, "more than held_out"), ({"crop_px": 150}, "at most stack_px")]
)
def test_a_recipe_that_cannot_be_followed_is_one_sentence(tmp_path, wrong, says):
    settings = tmp_path / "wrong.yaml"
    settings.write_text("\n".join(f"{name}: {value}" for name, value in wrong.items()))
    options = ["train", "--recipe", "refinement", "--config", str(settings), "-o", str(tmp_path / "run")]
    result = CliRunner().invoke(app, options)
    assert isinstance(result.exception, UsageError)
    assert says in str(result.exception)
    assert "\n" not in str(result.exception)
