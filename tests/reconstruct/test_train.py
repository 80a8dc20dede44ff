"""The training loop: learns, resumes to the bit, stops on nonsense; fine-tuning keeps only what is better."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from typer.testing import CliRunner

from capture.config import load_yaml
from capture.errors import DataError, StoppedError, UsageError
from capture.lens import Lens
from capture.stack import write_stack
from reconstruct import finetune, train
from reconstruct.checkpoint import DEFAULT_WEIGHTS, latest_state, load_state, load_weights, save_weights
from reconstruct.cli import app
from reconstruct.dataset import ScenePool, StackBatch, load_captured
from reconstruct.finetune import (
    FINETUNE,
    DistilTask,
    Lesson,
    PhotometricTask,
    adapt,
    finetune_config,
    train_paper,
    withheld_frame,
)
from reconstruct.network import DefaultNet, NetworkOutput, build
from reconstruct.predict import load_network, predict, wrap
from reconstruct.train import (
    RECIPE,
    SimulatedTask,
    TrainConfig,
    fit,
    learning_rate,
    pretrain,
    step_memory_bytes,
    supervised_terms,
)
from tests.reconstruct.small_stack import write_small_stack

CPU = torch.device("cpu")
TINY = TrainConfig(
    steps=6,
    batch=2,
    crop_px=32,
    scene_px=48,
    scenes=2,
    first_scenes=2,
    held_out_scenes=2,
    warmup_steps=1,
    validate_every=3,
    seed=5,
)


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return tmp_path_factory.mktemp("pool")


class ToyTask:
    """Two fixed batches with truth; fast, and the same at every call."""

    teacher = "a test"

    def __init__(self, poison_at=-1):
        generator = torch.Generator().manual_seed(3)
        frames = torch.rand(2, 3, 3, 32, 32, generator=generator)
        focus = torch.tensor([[0.5, 1.0, 1.5]]).expand(2, -1)
        truth = torch.full((2, 1, 32, 32), 0.8)
        self.data = StackBatch(frames, focus, torch.full((2, 3), 8.0), truth, frames.mean(1))
        self.poison_at = poison_at

    def batch(self, step, part=0, parts=1):
        if step == self.poison_at:
            return StackBatch(self.data.frames * torch.nan, *list(vars(self.data).values())[1:])
        return StackBatch(*(tensor[part::parts] for tensor in vars(self.data).values() if tensor is not None))

    def terms(self, output, batch):
        return supervised_terms(output, batch, TINY)

    def validate(self, net):
        with torch.inference_mode():
            output = net(self.data.frames, self.data.focus_dpt, self.data.kappa)
        return {"mae": float((output.inverse_depth_dpt - self.data.inverse_depth_dpt).abs().mean())}

    def pictures(self, net):
        return {}


def new_net():
    torch.manual_seed(1)
    return DefaultNet()


def test_the_beginning_of_a_longer_schedule_has_its_rates():
    whole = TrainConfig(steps=1000, warmup_steps=10)
    beginning = whole.model_copy(update={"steps": 100, "schedule_steps": 1000})
    assert [learning_rate(beginning, step) for step in range(100)] == [learning_rate(whole, s) for s in range(100)]


def test_overfits_one_batch(tmp_path):
    net, task = new_net(), ToyTask()
    before = task.validate(net)["mae"]
    net.load_state_dict(
        fit(
            net,
            task,
            TINY.model_copy(update={"steps": 25, "learning_rate": 1e-3, "ema_decay": 0.0}),
            tmp_path,
            device=CPU,
        )
    )
    assert task.validate(net)["mae"] < 0.5 * before


def test_resumed_run_is_bit_equal(tmp_path):
    config = TINY.model_copy(update={"checkpoint_every": 1})
    whole = fit(new_net(), ToyTask(), config, tmp_path / "whole", device=CPU)
    with pytest.raises(DataError):
        fit(new_net(), ToyTask(poison_at=3), config, tmp_path / "cut", device=CPU)  # dies in the fourth step
    resumed = fit(new_net(), ToyTask(), config, tmp_path / "cut", device=CPU, resume=True)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def moved_apart(one, two, start):
    """Distance of two trained networks, as a share of how far training moved them."""
    both = [torch.cat([weights[name].flatten() for name in start]) for weights in (one, two, start)]
    return float((both[0] - both[1]).norm() / (both[0] - both[2]).norm())


def test_accumulated_gradients_are_those_of_the_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "has_bf16", lambda device: False)  # there every part rounds for itself
    config = TINY.model_copy(update={"batch": 2, "ema_decay": 0.0})
    whole = fit(new_net(), ToyTask(), config, tmp_path / "whole", device=CPU)
    halves = fit(new_net(), ToyTask(), config.model_copy(update={"accumulate": 2}), tmp_path / "halves", device=CPU)
    assert moved_apart(whole, halves, new_net().state_dict()) < 0.02
    with pytest.raises(UsageError, match="make `batch` at least 3"):
        fit(new_net(), ToyTask(), config.model_copy(update={"accumulate": 3}), tmp_path / "thirds", device=CPU)


def test_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(tmp_path):
    config = TINY.model_copy(update={"checkpoint_every": 1})
    with pytest.raises(DataError, match=r"step 2: the loss is not finite \(depth = nan"):
        fit(net := new_net(), ToyTask(poison_at=2), config, tmp_path, device=CPU)
    assert not net.bf16
    state = latest_state(tmp_path)
    assert state is not None
    parts, about = load_state(state)
    assert about["step"] == 2
    assert all(torch.isfinite(tensor).all() for tensor in parts["model"].values())


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: not enough memory: you tried")])
def test_out_of_memory_says_what_to_lower(tmp_path, error):
    class Large(ToyTask):
        def batch(self, step, part=0, parts=1):
            raise error

    with pytest.raises(UsageError, match="batch 2 of 32 px crops; raise `accumulate`, or lower `batch`"):
        fit(new_net(), Large(), TINY, tmp_path, device=CPU)


def test_error_that_is_not_about_memory_stays_what_it_is(tmp_path):
    class Broken(ToyTask):
        def terms(self, output, batch):
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        fit(new_net(), Broken(), TINY, tmp_path, device=CPU)


def test_resuming_from_a_damaged_state_names_it_and_the_way_out(tmp_path):
    fit(new_net(), ToyTask(), TINY.model_copy(update={"checkpoint_every": 3}), tmp_path, device=CPU)
    state = latest_state(tmp_path)
    weights = state / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match=r"damaged.*delete step-00000006 to go on from the state before it"):
        fit(new_net(), ToyTask(), TINY, tmp_path, device=CPU, resume=True)
    shutil.rmtree(state)
    fit(new_net(), ToyTask(), TINY, tmp_path, device=CPU, resume=True)


def test_run_is_not_overwritten(tmp_path):
    fit(new_net(), ToyTask(), TINY, tmp_path, device=CPU)
    with pytest.raises(UsageError, match="--resume"):
        fit(new_net(), ToyTask(), TINY, tmp_path, device=CPU)


def test_resume_with_another_config_is_refused(tmp_path):
    fit(new_net(), ToyTask(), TINY, tmp_path, device=CPU)
    with pytest.raises(DataError, match=r"trained with learning_rate = 0\.001, now 0\.1"):
        fit(new_net(), ToyTask(), TINY.model_copy(update={"learning_rate": 0.1}), tmp_path, device=CPU, resume=True)


def test_resume_from_anything_else_is_refused(tmp_path):
    fit(new_net(), ToyTask(), TINY, tmp_path, device=CPU, made_from={"stacks": "1 of SHA-256 ab"})
    with pytest.raises(DataError, match="trained with stacks = '1 of SHA-256 ab', now '2 of SHA-256 cd'"):
        fit(new_net(), ToyTask(), TINY, tmp_path, device=CPU, resume=True, made_from={"stacks": "2 of SHA-256 cd"})


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_asked_to_stop_it_keeps_the_step_in_hand(tmp_path, number, code):
    class Interrupted(ToyTask):
        def batch(self, step, part=0, parts=1):
            if step == 3:
                os.kill(os.getpid(), number)
            return super().batch(step, part, parts)

    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    whole = fit(new_net(), ToyTask(), TINY, tmp_path / "whole", device=CPU)
    with pytest.raises(StoppedError, match="stopped after step 4 of 6; the same command with --resume") as stopped:
        fit(new_net(), Interrupted(), TINY, tmp_path / "cut", device=CPU)
    assert stopped.value.exit_code == code
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    resumed = fit(new_net(), ToyTask(), TINY, tmp_path / "cut", device=CPU, resume=True)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_best_state_wins_and_patience_ends_the_run(tmp_path):
    class Rising(ToyTask):
        calls = 0

        def validate(self, net):
            self.calls += 1
            return {"score": float(self.calls)}

    task = Rising()
    config = TINY.model_copy(update={"steps": 20, "validate_every": 1, "keep": "best", "patience": 3, "ema_decay": 0.0})
    best = fit(new_net(), task, config, tmp_path, device=CPU)
    assert task.calls == 4
    again = fit(new_net(), task, config, tmp_path, device=CPU, resume=True)
    assert task.calls == 4
    assert all(torch.equal(best[name], again[name]) for name in best)
    first = fit(new_net(), ToyTask(), config.model_copy(update={"steps": 1}), tmp_path / "one", device=CPU)
    changed = [name for name in best if not torch.allclose(best[name], first[name], atol=1e-2)]
    assert not changed


def test_learning_rate_warms_up_and_falls():
    config = TrainConfig(steps=100, warmup_steps=10, learning_rate=1.0)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] < 0.02
    config = config.model_copy(update={"restart_steps": (40, 70)})
    rates = [learning_rate(config, step) for step in range(100)]
    assert max(rates[39], rates[69], rates[99]) < 0.02
    assert max(rates[40:70]) == max(rates[70:]) == pytest.approx(0.5)


def test_the_recipe_is_spelt_out_and_is_that_of_the_shipped_weights():
    assert load_yaml(Path(__file__).parents[2] / "configs" / "train" / "default.yaml", TrainConfig) == RECIPE
    _, about = load_weights(DEFAULT_WEIGHTS)
    assert TrainConfig.model_validate(about["config"]) == RECIPE


def test_exact_answer_costs_next_to_nothing():
    batch = ToyTask().data
    net = new_net()
    output = net(batch.frames, batch.focus_dpt, batch.kappa)
    exact = NetworkOutput(batch.inverse_depth_dpt, output.std_dpt, batch.aif, output.logits, batch.inverse_depth_dpt)
    terms = supervised_terms(exact, batch, TINY)
    assert terms.depth < 1e-6
    assert terms.opinion < 1e-6
    assert terms.gradient < 1e-6
    assert terms.aif < 1e-6


def test_depth_loss_counts_blur_not_dioptres():
    """The same blur through a lens with ten times the gain and a tenth of the dioptres costs the same."""
    batch = ToyTask().data
    output = new_net()(batch.frames, batch.focus_dpt, batch.kappa)
    scaled = StackBatch(batch.frames, batch.focus_dpt / 10, batch.kappa * 10, batch.inverse_depth_dpt / 10, batch.aif)
    depths = (output.inverse_depth_dpt / 10, output.std_dpt / 10, output.opinion_dpt / 10)
    tenth = NetworkOutput(depths[0], depths[1], output.aif, output.logits, depths[2])
    with torch.no_grad():
        pairs = zip(supervised_terms(output, batch, TINY), supervised_terms(tenth, scaled, TINY), strict=True)
    for one, two in pairs:
        assert float(one) == pytest.approx(float(two), rel=1e-3, abs=1e-6)


def test_pretraining_writes_weights_that_say_what_taught_them(tmp_path, pool):
    path = pretrain(TINY.model_copy(update={"steps": 2}), tmp_path / "run", pool, device=CPU)
    _, about = load_weights(path, "default")
    assert "simulated truth" in about["teacher"]
    assert set(about["validation"]) >= {"mae_px", "median_px"}


def test_validation_scenes_are_not_training_scenes(pool):
    task = SimulatedTask(TINY, pool)
    assert task.data.pool.folder != ScenePool(pool, TINY.seed + 1000, TINY.scene_px).folder


@pytest.mark.slow
def test_sigkill_and_resume_is_bit_equal(tmp_path, pool):
    """Killed at ten random moments, resumed each time: the same weights as a run left alone."""
    script = textwrap.dedent(
        f"""
        import sys, torch
        from pathlib import Path
        from reconstruct.train import TrainConfig, pretrain
        torch.set_num_threads(1)
        config = TrainConfig(**{TINY.model_dump() | {"steps": 60, "checkpoint_every": 2}!r})
        pretrain(config, Path(sys.argv[1]), Path({str(pool)!r}), device=torch.device("cpu"), resume=True)
        """
    )
    command = [sys.executable, "-c", script]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, stderr=subprocess.DEVNULL)
    rng = np.random.default_rng(0)
    for _ in range(10):
        process = subprocess.Popen([*command, str(tmp_path / "cut")], stderr=subprocess.DEVNULL)
        time.sleep(float(rng.uniform(4, 12)))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run([*command, str(tmp_path / "cut")], check=True, stderr=subprocess.DEVNULL)
    one, _ = load_weights(tmp_path / "whole" / "weights.safetensors")
    two, _ = load_weights(tmp_path / "cut" / "weights.safetensors")
    assert all(torch.equal(one[name], two[name]) for name in one)


def torchrun(script, *arguments, restarts=0):
    """Two processes under torchrun, running."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    launch += [f"--max-restarts={restarts}", "--monitor-interval=0.5", str(script), *map(str, arguments)]
    return subprocess.Popen(launch, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()})


@pytest.fixture
def training_script(tmp_path, pool):
    path = tmp_path / "train.py"
    config = TINY.model_dump() | {"steps": 40, "batch": 3, "checkpoint_every": 2, "validate_every": 40}
    path.write_text(
        textwrap.dedent(
            f"""
            import atexit, sys, torch
            from pathlib import Path
            from reconstruct import train
            from reconstruct.train import TrainConfig, pretrain
            torch.set_num_threads(1)
            threads = lambda: [x.read_text().strip() for x in Path("/proc/self/task").glob("*/comm")]
            atexit.register(lambda: print("left:", [x for x in threads() if "gloo" in x]))
            train.has_bf16 = lambda device: False
            config = TrainConfig(**{config!r})
            pretrain(config, Path(sys.argv[1]), Path({str(pool)!r}), device=torch.device("cpu"), resume=True)
            """
        )
    )
    return path


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_processes_learn_what_one_learns_and_a_killed_one_comes_back(tmp_path, training_script, capfd):
    """An odd batch shared by two; one of two killed when it has a state to go back to: then the same weights."""
    subprocess.run([sys.executable, str(training_script), str(tmp_path / "one")], check=True)
    assert torchrun(training_script, tmp_path / "two").wait(timeout=900) == 0
    assert capfd.readouterr().out.count("left: []") == 3  # gloo's threads, which could abort a process that ends
    killed = torchrun(training_script, tmp_path / "killed", restarts=3)
    while latest_state(tmp_path / "killed") is None:
        assert killed.poll() is None
        time.sleep(0.1)
    ranks = [p for p in psutil.Process(killed.pid).children(recursive=True) if "train.py" in " ".join(p.cmdline())]
    ranks[-1].kill()
    assert killed.wait(timeout=900) == 0
    one, two, back = (load_weights(tmp_path / name / "weights.safetensors")[0] for name in ("one", "two", "killed"))
    torch.manual_seed(TINY.seed)
    assert moved_apart(one, two, build(TINY.preset).state_dict()) < 0.05
    assert all(torch.equal(two[name], back[name]) for name in two)


# --------------------------------------------------------------------------------------------------- captured stacks


@pytest.fixture(scope="module")
def stack_file(tmp_path_factory, pool):
    scene = ScenePool(pool, 5, 64)[2]
    frames = np.square(scene.frames[::3].astype(np.float32) / 65535)
    lens = Lens(focal_length_m=0.05, f_number=2.0, pixel_pitch_m=1e-4)
    path = tmp_path_factory.mktemp("stacks") / "scene.h5"
    write_stack(path, frames, focus_distance_m=1 / scene.focus_dpt[::3], lens=lens, transfer="linear")
    return path


QUICK = FINETUNE.model_copy(update={"steps": 4, "batch": 2, "crop_px": 32, "validate_every": 2})


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_adapt_as_one_does(tmp_path, stack_file):
    """Refining shared, both trainings (judged, then from all frames), the same weights; told to be better, as few steps
    make nothing better."""
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys, torch
            from pathlib import Path
            from reconstruct import finetune, train
            from reconstruct.dataset import load_captured
            from reconstruct.predict import load_network
            from reconstruct.train import TrainConfig
            torch.set_num_threads(1)
            train.has_bf16 = lambda device: False
            finetune.reliably_lower = lambda before, after: True
            finetune.VARIED = 1  # mixtures make rounding grow; how processes share them is tested bit for bit below
            stack, cpu = load_captured({str(stack_file)!r}), torch.device("cpu")
            config = TrainConfig(**{QUICK.model_dump() | {"steps": 12, "warmup_steps": 1}!r})
            finetune.adapt([stack], load_network("default", cpu), Path(sys.argv[1]), config, device=cpu, refine_steps=2)
            """
        )
    )
    subprocess.run([sys.executable, str(script), str(tmp_path / "one")], check=True)
    assert torchrun(script, tmp_path / "two").wait(timeout=600) == 0
    (one, about), (two, other) = (load_weights(tmp_path / name / "weights.safetensors") for name in ("one", "two"))
    assert moved_apart(one, two, load_network("default", CPU).net.state_dict()) < 0.05
    assert about["withheld_before"] == other["withheld_before"]
    assert about["withheld_after"]["scene"] == pytest.approx(other["withheld_after"]["scene"], rel=1e-3)


def test_processes_share_a_batch_of_mixtures_and_all_else(tmp_path, stack_file):
    """Together they see what one process sees, to the bit."""
    lesson = Lesson.prepare(load_captured(stack_file), None, 0, CPU, tmp_path)
    alone, shared = (DistilTask([lesson], QUICK.model_copy(update={"batch": 4}), CPU, tmp_path) for _ in range(2))
    assert alone.mixed
    for step in range(8):
        whole, parts = alone.batch(step), [shared.batch(step, part, 2) for part in (0, 1)]
        order = [0, 2, 1, 3]  # crops are dealt out in turn
        for name in ("frames", "focus_dpt", "kappa", "inverse_depth_dpt", "exact"):
            assert torch.equal(getattr(whole, name)[order], torch.cat([getattr(x, name) for x in parts])), name
        for i, maps in enumerate(whole.prior):
            assert torch.equal(maps[order], torch.cat([x.prior[i] for x in parts]))


def test_withheld_frame_is_in_the_middle(stack_file):
    stack = load_captured(stack_file)
    place = stack.focus_dpt.sort().values.tolist().index(float(stack.focus_dpt[withheld_frame(stack)]))
    assert 0 < place < len(stack.frames) - 1
    assert withheld_frame(stack.without(0).without(0).without(0)) == -1


def test_evidence_is_gathered_once_and_turns_with_the_picture(tmp_path, stack_file):
    """Crops as large as the picture, mirrored and turned: the network says the same as if it swept each anew."""
    lesson = Lesson.prepare(load_captured(stack_file), None, 0, CPU, tmp_path)
    task, net = DistilTask([lesson], QUICK.model_copy(update={"crop_px": 64, "batch": 6}), CPU, tmp_path), new_net()
    batch = task.batch(3)  # one quarter turn is in it: that changes a few per cent of the sweep's own answer
    assert len({tuple(picture[:, 0, 0].tolist()) for picture in batch.frames[:, 0]}) > 2
    with torch.inference_mode():
        kept = net(batch.frames, batch.focus_dpt, batch.kappa, prior=batch.prior).inverse_depth_dpt
        noise = batch.prior.noise.flatten()
        anew = net(batch.frames, batch.focus_dpt, batch.kappa, noise=noise).inverse_depth_dpt
    off_px = (kept - anew).abs() * batch.kappa.mean()
    assert off_px.median() < 0.01
    assert (off_px > 0.1).float().mean() < 0.01
    assert not list(tmp_path.iterdir())


def test_adaptation_that_does_not_help_is_not_kept(tmp_path, stack_file):
    config = QUICK.model_copy(update={"learning_rate": 1.0, "keep": "last", "ema_decay": 0.0})  # wrecks the network
    start = wrap(new_net().eval(), {}, "start")
    result = adapt([load_captured(stack_file)], start, tmp_path, config, device=CPU, refine_steps=0)
    assert result.weights is None
    assert not (tmp_path / "weights.safetensors").exists()
    assert "scene" in result.table()


def test_spread_is_learned_from_retakes_alone(tmp_path, stack_file):
    """They have the truth; a refined map does not, and being far from it says little."""
    lesson = Lesson.prepare(load_captured(stack_file), None, 0, CPU, tmp_path)
    task, net = DistilTask([lesson], QUICK.model_copy(update={"batch": 6}), CPU, tmp_path), new_net()
    batch = next(x for x in map(task.batch, range(99)) if 0 < x.exact.sum() < 6)  # both kinds are in it
    output = net(batch.frames, batch.focus_dpt, batch.kappa, prior=batch.prior)
    output.std_dpt.retain_grad()
    terms = task.terms(output, batch)
    terms.spread.backward(retain_graph=True)
    assert torch.equal(output.std_dpt.grad.abs().amax((1, 2, 3)) > 0, batch.exact > 0)
    output.std_dpt.grad = None
    (terms.depth + terms.gradient).backward()
    assert output.std_dpt.grad is None


def test_adapted_network_doubts_as_much_as_its_start(tmp_path, stack_file, monkeypatch):
    monkeypatch.setattr(finetune, "reliably_lower", lambda before, after: True)
    start, stack = load_network("default", CPU), load_captured(stack_file)
    config = QUICK.model_copy(update={"warmup_steps": 0})
    result = adapt([stack], start, tmp_path, config, device=CPU, refine_steps=0)
    after = load_network(result.weights, CPU)
    spreads = [predict(x, stack.frames, stack.focus_dpt, stack.kappa).std_dpt.log().mean() for x in (start, after)]
    narrower = np.log(after.std_gain / start.std_gain)
    assert abs(narrower) > 0.01
    assert abs(spreads[1] - spreads[0]) < 0.1 * abs(narrower)
    before, now = start.net.state_dict(), after.net.state_dict()
    left_alone = {name.split(".")[0] for name in now if torch.equal(before[name], now[name])}
    assert left_alone == {*finetune.IMAGE_HEAD, *finetune.READING}


def test_network_from_nothing_is_written_with_its_teacher(tmp_path, stack_file):
    result = adapt([load_captured(stack_file)], None, tmp_path, QUICK, device=CPU, refine_steps=2)
    assert result.weights is not None
    _, about = load_weights(result.weights, "default")
    assert "no ground truth" in about["teacher"]
    assert about["started_from"] == "nothing"


def test_stacks_of_one_name_are_all_judged(tmp_path, stack_file):
    stack = load_captured(stack_file)
    result = adapt([stack, stack.without(0)], None, tmp_path, QUICK, device=CPU, refine_steps=0)
    assert list(result.after) == ["scene", "scene (2)"]
    assert result.after["scene"] != result.after["scene (2)"]


def test_stack_of_one_colour_is_left_out(tmp_path, stack_file, capfd):
    stack = load_captured(stack_file)
    plain = type(stack)(**(vars(stack) | {"name": "plain", "frames": torch.full_like(stack.frames, 0.3)}))
    result = adapt([stack, plain], None, tmp_path, QUICK, device=CPU, refine_steps=0)
    assert list(result.after) == ["scene"]
    assert "plain: every frame is of one colour" in capfd.readouterr().err
    with pytest.raises(DataError, match="nothing to learn depth from"):
        adapt([plain], None, tmp_path / "plain", QUICK, device=CPU, refine_steps=0)


def test_resume_with_another_start_is_refused(tmp_path, stack_file):
    adapt([load_captured(stack_file)], None, tmp_path, QUICK, device=CPU, refine_steps=0)
    with pytest.raises(DataError, match="trained with refinement steps = '0', now '1'"):
        adapt([load_captured(stack_file)], None, tmp_path, QUICK, device=CPU, refine_steps=1, resume=True)


def test_two_frames_cannot_be_judged(tmp_path, stack_file):
    stack = load_captured(stack_file)
    while len(stack.frames) > 2:
        stack = stack.without(1)
    with pytest.raises(DataError, match="two frames only"):
        adapt([stack], None, tmp_path, QUICK, device=CPU, refine_steps=0)


def test_paper_training_runs_on_the_published_terms(tmp_path, stack_file):
    stack = load_captured(stack_file)
    config = QUICK.model_copy(update={"preset": "paper", "steps": 2})
    path = train_paper([stack], tmp_path, config, device=CPU)
    _, about = load_weights(path, "paper")
    assert 0 <= about["validation"]["dead_depth"] <= 1
    task = PhotometricTask([stack], config)
    batch = task.batch(0, 0)
    terms = task.terms(build("paper")(batch.frames, batch.focus_dpt, batch.kappa), batch)
    assert not terms.coarse_sharpness.requires_grad
    assert terms.reconstruction.requires_grad


def test_paper_needs_focus_distances(tmp_path, stack_file):
    stack = load_captured(stack_file)
    stack = type(stack)(**(vars(stack) | {"metric": False}))
    with pytest.raises(DataError, match="unknown in scene"):
        train_paper([stack], tmp_path, QUICK, device=CPU)


# ------------------------------------------------------------------------------------------------------ command line


def run(*arguments):
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


def test_dry_run_prints_the_plan(tmp_path, stack_file):
    result = run(stack_file, "-o", tmp_path / "run", "--dry-run", "--device", "cpu")
    assert result.exit_code == 0
    assert f"300 of {FINETUNE.batch} crops of {FINETUNE.crop_px} px" in result.stdout
    assert "GiB" in result.stdout
    assert not (tmp_path / "run").exists()


def test_config_replaces_what_it_sets_and_nothing_else(tmp_path, stack_file):
    (tmp_path / "c.yaml").write_text("checkpoint_every: 100")
    (tmp_path / "p.yaml").write_text("{preset: paper, batch: 2}")
    plan = [stack_file, "-o", tmp_path / "run", "--dry-run", "--device", "cpu"]
    assert run(*plan, "--config", tmp_path / "c.yaml").stdout == run(*plan).stdout
    assert "steps      25000 of 2 crops of 256 px" in run(*plan, "--config", tmp_path / "p.yaml").stdout
    for more in (["--preset", "default"], ["--preset", "default", "--init", "none"]):
        assert "leave one of them out" in str(run(*plan, "--config", tmp_path / "p.yaml", *more).exception)
    simulated = ["--recipe", "default", "-o", tmp_path / "run", "--dry-run", "--device", "cpu"]
    assert "leave preset out" in str(run(*simulated, "--config", tmp_path / "p.yaml").exception)
    assert f"{RECIPE.steps} of" in run(*simulated, "--config", tmp_path / "c.yaml").stdout


def test_crops_must_fit_into_simulated_scenes(tmp_path):
    with pytest.raises(UsageError, match="crop_px is 64, scene_px 48"):
        SimulatedTask(TINY.model_copy(update={"crop_px": 64}), tmp_path)


def test_output_that_is_a_file_is_one_sentence(tmp_path, stack_file):
    (tmp_path / "run").write_text("")
    for what in ([stack_file], ["--recipe", "default"]):
        assert "choose another output folder" in str(run(*what, "-o", tmp_path / "run", "--device", "cpu").exception)


def test_stacks_of_a_folder_are_found_below_it_but_hidden_ones(tmp_path, stack_file):
    (tmp_path / "day" / "one").mkdir(parents=True)
    (tmp_path / "day" / "one" / "a.h5").symlink_to(stack_file)
    (tmp_path / "day" / "._a.h5").write_text("of macOS")
    assert "data       1 stack(s)" in run(tmp_path / "day", "-o", tmp_path / "run", "--dry-run").stdout


def test_few_stacks_are_learned_from_for_fewer_steps(tmp_path, stack_file):
    for name in "abc":
        (tmp_path / f"{name}.h5").symlink_to(stack_file)
    result = run(tmp_path, "-o", tmp_path / "run", "--dry-run", "--device", "cpu")
    assert "3 stack(s)" in result.stdout
    assert "steps      900 of" in result.stdout
    assert finetune_config(1000).steps == FINETUNE.steps


def test_one_of_many_processes_prints_what_came_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr("reconstruct.train.pretrain", lambda *given, **settings: "weights")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, said in (("0", "weights\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        assert run("--recipe", "default", "-o", tmp_path / "run", "--device", "cpu").stdout == said


def test_memory_grows_with_the_batch():
    small, large = (step_memory_bytes(TINY.model_copy(update={"batch": n})) for n in (1, 8))
    assert large > 1.5 * small


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "name the stacks"),
        (["--recipe", "nonsense"], "default or refinement"),
        (["x.h5", "--recipe", "default"], "leave the captured ones out"),
        (["--recipe", "refinement", "--device", "cuda"], "leave --device out"),
        (["--recipe", "refinement", "--preset", "paper"], "leave --preset out"),
        (["--recipe", "default", "--init", "w.safetensors", "--refine", "3"], "leave --init and --refine out"),
        (["x.h5", "--preset", "odd"], "default or paper"),
        (["x.h5", "--preset", "paper", "--init", "w.safetensors"], "leave --init out"),
        (["x.h5", "--device", "cuda"], "no CUDA device"),
        (["x.h5", "--init", "missing.safetensors"], "missing"),
        (["x.h5", "--init", "missing.safetensors", "--dry-run"], "missing"),
        (["nothing.h5", "--dry-run"], "nothing.h5 does not exist"),
    ],
)
def test_bad_usage_is_one_sentence(tmp_path, arguments, says, stack_file):
    arguments = [str(stack_file) if a == "x.h5" else a for a in arguments]
    result = run(*arguments, "-o", tmp_path / "run")
    assert result.exit_code != 0
    assert says in str(result.exception)
    assert "\n" not in str(result.exception)


def test_damaged_weights_cannot_start(tmp_path, stack_file):
    save_weights(tmp_path / "w.safetensors", new_net().state_dict(), {"preset": "default"})
    damaged = bytearray((tmp_path / "w.safetensors").read_bytes())
    damaged[-3] ^= 1
    (tmp_path / "w.safetensors").write_bytes(damaged)
    result = run(stack_file, "-o", tmp_path / "run", "--init", tmp_path / "w.safetensors")
    assert result.exit_code == 1
    assert "damaged; its SHA-256" in str(result.exception)


def test_stack_without_focus_distances_is_trained_on_in_relative_mode_and_said_so(tmp_path):
    path = write_small_stack(tmp_path / "unknown.h5", lens=None, calibrated=False)
    (tmp_path / "quick.yaml").write_text("{steps: 2, batch: 1, crop_px: 32, validate_every: 2, seed: 1}")
    arguments = ("--init", "none", "--refine", 0, "--config", tmp_path / "quick.yaml", "--device", "cpu")
    result = run(path, "-o", tmp_path / "run", *arguments)
    assert result.exit_code == 0, result.exception
    assert "unknown: focus distances unknown; trained on in relative mode (ordered depth, no metres)" in result.stdout
    assert (tmp_path / "run" / "weights.safetensors").exists()


def test_weights_of_the_paper_cannot_start_the_default(tmp_path, stack_file):
    save_weights(tmp_path / "p.safetensors", build("paper").state_dict(), {"preset": "paper"})
    result = run(stack_file, "-o", tmp_path / "run", "--init", tmp_path / "p.safetensors")
    assert "expected 'default'" in str(result.exception)
