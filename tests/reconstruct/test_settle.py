"""The network that ends a refinement: what it sees, what it is worth, and how it is trained."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from capture.config import load_yaml
from capture.errors import DataError, UsageError
from reconstruct import settle_train
from reconstruct.checkpoint import DEFAULT_WEIGHTS, load_weights
from reconstruct.cli import app
from reconstruct.dataset import render_scene
from reconstruct.metrics import confidence_errors
from reconstruct.plane_sweep import plane_sweep
from reconstruct.predict import load_network
from reconstruct.refine import RefineConfig, _Refinement, refine
from reconstruct.settle import (
    LEARNED,
    MIDWAY_WEIGHTS,
    OFFERS,
    SIGNS,
    WEIGHTS,
    Settled,
    SettlingNet,
    load_settling,
    settle,
    settle_midway,
    stay,
)
from reconstruct.settle_train import (
    FEW_EDGES,
    Ending,
    SettleRecipe,
    _batch,
    edge_shares,
    learn_to_choose,
    read_closing,
    refined_stack,
    train_settling,
)
from tests.reconstruct.test_refine import Stack

MIDWAY_RECIPE = Path(__file__).parents[2] / "configs" / "train" / "refinement_midway.yaml"
TINY = SettleRecipe(
    scenes=3,
    from_sweep=1,
    crowded=1,
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


def train(out: Path, pool: Path, recipe: SettleRecipe = TINY) -> str:
    """What `daif train` prints of a tiny run."""
    settings = out.with_suffix(".yaml")
    settings.write_text("\n".join(f"{name}: {value}" for name, value in recipe.model_dump().items()))
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
def closing(pool):
    """The end of one refinement."""
    return read_closing(refined_stack(TINY, pool, 0))[0]


def test_sees_misfits_relative_to_the_picture_s_own(closing):
    """A picture whose misfits are all twice as large is judged alike."""
    assert closing.signs().shape == (SIGNS, TINY.stack_px, TINY.stack_px)
    louder = closing._replace(here=closing.here * 2, shifted=closing.shifted * 2, left=closing.left * 2)
    torch.testing.assert_close(louder.signs(), closing.signs(), rtol=0, atol=1e-5)
    assert closing.signs().abs().max() < 5


def test_offers_are_the_moves_that_it_learned_to_judge():
    moves = RefineConfig()
    assert 2 * len(moves.moves_px) + len(moves.recede_px) == OFFERS


def answering_anything() -> SettlingNet:
    torch.manual_seed(0)
    net = SettlingNet()
    for scale in net.parameters():
        scale.data *= 30
    return net


@torch.no_grad()
def test_chooses_within_what_was_offered_and_a_little_beyond(closing):
    depth, candidates = answering_anything()(closing).depth_px, closing.candidates_px()
    assert (depth <= candidates.amax(0) + 1.001).all()
    assert (depth >= candidates.amin(0) - 1.001).all()


@torch.no_grad()
def test_doubts_whatever_the_start_said_of_itself(closing):
    """Infinite where the start did not say how sure it was."""
    for net in (SettlingNet(), answering_anything()):
        for said in (0.02, torch.inf):
            std = net(closing._replace(start_std_px=torch.full_like(closing.depth_px, said))).std_px
            assert torch.isfinite(std).all()
            assert (std > 0).all()


@torch.no_grad()
def test_untrained_it_doubts_as_the_start_did(closing):
    torch.testing.assert_close(SettlingNet()(closing).std_px, closing.start_std_px, rtol=0.1, atol=0)


def test_stays_where_other_moves_were_offered(closing):
    fewer = closing._replace(offers_px=closing.offers_px[:2], left=closing.left[:3])
    assert torch.equal(settle(fewer).depth_px, closing.settled_px)
    assert (stay(closing).std_px >= closing.start_std_px).all()


def test_refinement_ends_with_its_choice():
    stack = Stack()
    kept = []

    def keep(closing):
        kept.append(closing)
        return settle(closing)

    refined = refine(stack.frames, stack.focus, stack.kappa, stack.start, steps=2, choices=(settle_midway, keep))
    dpt_per_px = 4 / stack.kappa.mean()
    depth, std = settle(kept[0])
    torch.testing.assert_close(refined.inverse_depth_dpt, depth * dpt_per_px)
    torch.testing.assert_close(refined.std_dpt, std * dpt_per_px)
    torch.testing.assert_close(refined.confidence, 1 / (1 + refined.std_dpt * stack.kappa.mean()))
    assert (depth - kept[0].settled_px).abs().max() > 0.01
    assert inspect.signature(refine).parameters["choices"].default == (settle_midway, settle)


def test_a_choice_on_the_way_takes_the_place_of_a_round(monkeypatch):
    """And what it chose is what goes on."""
    stack = Stack()
    rounds, seen = [], []

    def round_of_moves(refinement):
        rounds.append(refinement)

    def choice(by_px):
        def chosen(closing):
            seen.append(closing.depth_px)
            return Settled(closing.depth_px + by_px, closing.start_std_px)

        return chosen

    monkeypatch.setattr(_Refinement, "try_moves", round_of_moves)
    refine(stack.frames, stack.focus, stack.kappa, stack.start, steps=2, choices=(choice(2.0), choice(0.0)))
    assert len(rounds) == RefineConfig().rounds - 1
    before, after = seen
    assert (after - before).median() > 1  # a step and the shifts of surfaces pull it back a little
    refine(stack.frames, stack.focus, stack.kappa, stack.start, steps=2, choices=(stay,))
    assert len(rounds) == 2 * RefineConfig().rounds - 1


def test_its_std_foresees_errors():
    """Better than the start's std and the distance that depth has moved, and neither far too wide nor too narrow."""
    stack = Stack()
    maps = stack.frames, stack.focus, stack.kappa, stack.start
    refined, stayed = (refine(*maps, steps=15, choices=choices) for choices in (LEARNED, (stay,)))
    told, before = (
        confidence_errors(*(x.numpy() for x in (*answer[:3], 1 / stack.truth))) for answer in (refined, stayed)
    )
    assert (stayed.std_dpt >= stack.start.std_dpt * (1 - 1e-6)).all()
    assert (stayed.confidence <= stack.start.confidence * (1 + 1e-6)).all()
    assert told["ause"] < before["ause"]
    assert told["kept70_cut"] > before["kept70_cut"]
    assert 0.6 < told["coverage"] < 0.95


def test_a_stack_is_refined_once(pool):
    path = refined_stack(TINY, pool, 0)
    before = path.stat().st_mtime_ns
    assert len(list(pool.rglob("*.safetensors"))) == TINY.stacks
    assert load_network("default", torch.device("cpu")).identity.split()[1] in path.name  # not others'
    assert refined_stack(TINY, pool, 0) == path
    assert path.stat().st_mtime_ns == before


def test_some_stacks_are_refined_from_the_plane_sweep_and_some_are_crowded(pool, monkeypatch):
    begun, crowds = [], []

    def told(frames, focus, kappa, start, **_):
        begun.append(torch.equal(start.inverse_depth_dpt, plane_sweep(frames, focus, kappa).inverse_depth_dpt))
        raise InterruptedError

    def drawn(seed, size, *, crowded):
        crowds.append(crowded)
        return render_scene(seed, size, crowded=crowded)

    monkeypatch.setattr(settle_train, "refine", told)
    monkeypatch.setattr(settle_train, "render_scene", drawn)
    for index in (0, TINY.scenes, TINY.scenes + TINY.from_sweep):
        with pytest.raises(InterruptedError):
            refined_stack(TINY, pool / "none yet", index)
    assert begun == [False, True, False]
    assert crowds == [False, False, True]


def test_stacks_with_more_depth_edges_are_learned_from_more_often():
    """But plain ones, too."""
    flat = torch.full((10, 10), 2.0)
    stepped = flat.clone()
    stepped[:, 5:] += 1.0  # 10 of the 180 steps from pixel to pixel
    recipe = TINY.model_copy(update={"stack_px": 10, "crop_px": 8, "batch": 4000})
    maps = torch.zeros(1, 10, 10), torch.zeros(1, 10, 10), torch.zeros(2, 10, 10)
    endings = [Ending(*maps, true_px) for true_px in (flat, stepped)]
    shares = edge_shares(endings)
    assert shares.sum() == pytest.approx(1)
    assert shares[1] / shares[0] == pytest.approx((10 / 180 + FEW_EDGES) / FEW_EDGES)
    for often, expected in ((shares, shares[1]), (None, 0.5)):
        crops, _ = _batch(endings, np.random.default_rng(3), recipe, often)
        assert float((crops.true_px.amax((1, 2)) > 2).float().mean()) == pytest.approx(expected, abs=0.03)


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


def test_an_interrupted_run_goes_on_with_the_next_part(tmp_path, pool, monkeypatch):
    """And ends as if it had not been interrupted; what another recipe learned is of no use to it."""
    chosen = []

    def counted(member, *rest):
        chosen.append(member)
        learn_to_choose(member, *rest)

    def interrupted(*_):
        raise InterruptedError

    monkeypatch.setattr(settle_train, "learn_to_choose", counted)
    with monkeypatch.context() as broken:
        broken.setattr(settle_train, "learn_to_doubt", interrupted)
        with pytest.raises(InterruptedError):
            train_settling(TINY, tmp_path, pool)
    assert len(chosen) == TINY.members
    resumed = train_settling(TINY, tmp_path, pool)
    assert len(chosen) == TINY.members
    whole, again = (load_weights(path, "settle")[0] for path in (pool.parent / "run" / "settle.safetensors", resumed))
    assert all(torch.equal(x, again[name]) for name, x in whole.items())
    another = TINY.model_copy(update={"steps": 2})
    with pytest.raises(UsageError, match="made by another recipe; use another -o"):
        train_settling(another, tmp_path, pool)
    resumed.unlink()
    train_settling(another, tmp_path, pool)
    assert len(chosen) == 2 * TINY.members


def test_the_network_on_the_way_is_made_by_refinements_that_end_there(tmp_path, pool):
    """It starts afresh; the other goes on from it."""
    first = TINY.model_copy(update={"midway": False, "members": 1, "from_sweep": 0, "crowded": 0, "scenes": 2})
    train(tmp_path / "run", tmp_path / "pool", first)
    (made,) = (path.parent.name for path in (tmp_path / "pool").rglob("*000000.safetensors"))
    (made_after,) = (path.parent.name for path in pool.rglob("*000000.safetensors"))
    identity = load_weights(MIDWAY_WEIGHTS)[1]["sha256"][:12]
    assert made_after == f"{made.removesuffix('midway')}after-{identity}"
    afresh, alone = load_weights(tmp_path / "run" / "settle.safetensors")
    going_on, after = load_weights(pool.parent / "run" / "settle.safetensors")
    assert (alone["midway"], after["midway"]) == (None, identity)
    known = load_weights(MIDWAY_WEIGHTS)[0]
    name = "members.0.first.weight"
    assert torch.dist(going_on[name], known[name]) < 0.1 * torch.dist(afresh[name], known[name])


@pytest.mark.parametrize("midway", [False, True])
def test_a_network_learns_from_what_refinement_shows_it_where_it_chooses(tmp_path, monkeypatch, midway):
    asked = []

    def noted(*args, **options):
        asked.append((args, options))
        return refine(*args, **options)

    with monkeypatch.context() as noting:
        noting.setattr(settle_train, "refine", noted)
        recipe = TINY.model_copy(update={"midway": midway, "refine_steps": 4})
        kept, _ = read_closing(refined_stack(recipe, tmp_path, 0))
    ((args, options),) = asked
    shown = []

    def watched(choice):
        def watching(closing):
            shown.append(closing)
            return choice(closing)

        return watching

    refine(*args, **options | {"choices": [watched(choice) for choice in LEARNED]})
    on_the_way, in_the_end = shown
    mine, other = (in_the_end, on_the_way) if midway else (on_the_way, in_the_end)
    assert torch.equal(kept.signs(), mine.signs())
    assert not torch.equal(kept.depth_px, other.depth_px)


def test_the_plan_is_told(tmp_path):
    result = CliRunner().invoke(app, ["train", "--recipe", "refinement", "-o", str(tmp_path / "run"), "--dry-run"])
    assert "520 simulated stacks" in result.stdout
    assert not (tmp_path / "run").exists()


def test_shipped_weights_say_how_they_came_about():
    _, midway = load_weights(MIDWAY_WEIGHTS, "settle")
    _, about = load_weights(WEIGHTS, "settle")
    assert about["midway"] == midway["sha256"][:12]
    shipped = load_network("default", torch.device("cpu")).identity
    assert about["started_from"] == midway["started_from"] == shipped
    assert about["recipe"] == SettleRecipe().model_dump()
    assert midway["recipe"] == load_yaml(MIDWAY_RECIPE, SettleRecipe).model_dump()
    for validation in (about["validation"], midway["validation"]):
        assert validation["chosen_to_start"] < validation["refined_to_start"]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"scenes": 12}, "more than held_out"),
        ({"crop_px": 150}, "at most stack_px"),
        ({"width": 8}, "5 of width 24"),
        ({"members": 6}, "5 of width 24"),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_one_sentence(tmp_path, wrong, says):
    settings = tmp_path / "wrong.yaml"
    settings.write_text("\n".join(f"{name}: {value}" for name, value in wrong.items()))
    options = ["train", "--recipe", "refinement", "--config", str(settings), "-o", str(tmp_path / "run")]
    result = CliRunner().invoke(app, options)
    assert isinstance(result.exception, UsageError)
    assert says in str(result.exception)
    assert "\n" not in str(result.exception)
