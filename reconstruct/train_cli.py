"""The `daif train` command."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from capture.errors import StoppedError, UsageError

if TYPE_CHECKING:
    import torch

    from reconstruct.settle_train import SettleRecipe
    from reconstruct.train import TrainConfig


def register(app: typer.Typer) -> None:
    """Add `train` to `app`."""
    app.command("train")(train_command)


def train_command(
    out: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run: states, curves, weights.")],
    stacks: Annotated[list[str] | None, typer.Argument(help="Captured stacks (.h5), folders of them, or URLs.")] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Train on simulated stacks: default, or refinement (what chooses depths in it).")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="default, or paper for the published network and training.")
    ] = None,
    init: Annotated[
        str | None, typer.Option(help="Start from: default (if nothing is said), none, or a weights file.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML; what it sets replaces what is set otherwise.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Number of training steps.")] = None,
    refine: Annotated[
        int | None, typer.Option(min=0, help="Refinement steps of each stack before distilling; 25 if not said.")
    ] = None,
    lens: Annotated[Path | None, typer.Option(help="Lens profile (lens.yaml) from `daif calibrate`.")] = None,
    pool: Annotated[Path | None, typer.Option(help="Where simulated scenes are kept; RUN/pool by default.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in -o.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and the memory it needs, then stop.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
) -> None:
    """Train the network: on your own stacks without any ground truth, or on simulated ones.

    STACKS with --init default adapts the shipped network to today's scene in minutes and keeps it only if it predicts
    withheld frames better. --init none learns from the stacks alone. --preset paper trains as published.
    """
    if preset not in (None, "default", "paper"):
        raise UsageError(f"--preset is {preset!r}; it must be default or paper")
    if recipe is None and not stacks:
        raise UsageError("name the stacks to train on, or --recipe default to train on simulated ones")
    if recipe not in (None, "default", "refinement"):
        raise UsageError(f"--recipe is {recipe!r}; it must be default or refinement (change it by --config)")
    if recipe is not None and stacks:
        raise UsageError("--recipe trains on simulated stacks; leave the captured ones out")
    given = {"--preset": preset, "--init": init, "--refine": refine, "--lens": lens}
    if recipe is not None:
        _refuse(f"--recipe {recipe} trains a new network on simulated stacks", given)
    try:
        if recipe == "refinement":
            if device not in ("auto", "cpu"):
                raise UsageError("--recipe refinement trains a small network on CPUs; leave --device out")
            print(_train_refinement(config, steps, out, pool or out / "pool", dry_run=dry_run))
            return
        from reconstruct import remote
        from reconstruct.device import pick_device
        from reconstruct.train import is_first_process, pretrain, refuse_another

        target = pick_device(device)
        files = _files(stacks or [])
        settings = _settings(config, recipe, preset, init, steps, len(files))
        if settings.preset == "paper":
            _refuse("the paper preset trains a new network as published", {"--init": init, "--refine": refine})
        for run in (out, out / "judged"):
            refuse_another(run, resume=resume)
        if recipe is None:
            said = _train_on_stacks(files, out, settings, init or "default", refine, lens, resume, target, dry_run)
        elif dry_run:
            said = _plan(settings, f"recipe {recipe}: {settings.scenes} simulated scenes", target)
        else:
            remote.prepare_output(str(out))
            said = str(pretrain(settings, out, pool or out / "pool", device=target, resume=resume))
        if is_first_process():
            print(said)
    except KeyboardInterrupt:
        raise StoppedError(f"interrupted; the same command with --resume goes on from what {out} holds") from None


def _refuse(why: str, given: Mapping[str, object]) -> None:
    unused = [name for name, value in given.items() if value is not None]
    if unused:
        raise UsageError(f"{why}; leave {' and '.join(unused)} out")


def _train_refinement(config: Path | None, steps: int | None, out: Path, pool: Path, *, dry_run: bool) -> str:
    from capture.config import load_yaml
    from reconstruct.settle_train import SettleRecipe, train_settling

    settings = SettleRecipe() if config is None else load_yaml(config, SettleRecipe)
    if steps is not None:
        settings = settings.model_copy(update={"steps": steps})
    return _refinement_plan(settings) if dry_run else str(train_settling(settings, out, pool))


def _refinement_plan(settings: SettleRecipe) -> str:
    from reconstruct.settle import SettlingNet

    net = SettlingNet(settings.width, settings.members)
    when = "in the end" if settings.midway else "on the way"
    return (
        f"network    refinement's choice {when}, {sum(p.numel() for p in net.parameters()):,} parameters\n"
        f"data       recipe refinement: {settings.stacks} simulated stacks, refined on all cores\n"
        f"steps      {settings.steps} of {settings.batch} crops of {settings.crop_px} px\n"
        f"device     cpu"
    )


def _settings(
    config: Path | None, recipe: str | None, preset: str | None, init: str | None, steps: int | None, stacks: int
) -> TrainConfig:
    """What is usual for such a training, changed by what `config` sets."""
    from capture.config import load_yaml
    from reconstruct.finetune import FROM_NOTHING, PAPER, finetune_config
    from reconstruct.train import RECIPE, TrainConfig

    changed: dict[str, object] = {}
    if config is not None:
        changed = load_yaml(config, TrainConfig).model_dump(exclude_unset=True)
    if preset is not None and changed.get("preset", preset) != preset:
        raise UsageError(f"{config}: preset is {changed['preset']}, --preset {preset}; leave one of them out")
    if recipe is not None:
        usual = RECIPE
    elif (preset or changed.get("preset")) == "paper":
        usual = PAPER
    else:
        usual = FROM_NOTHING if init == "none" else finetune_config(stacks)
    if recipe is not None and changed.get("preset") == "paper":
        raise UsageError(f"{config}: preset is paper, but --recipe trains the default network; leave preset out")
    if steps is not None:
        changed["steps"] = steps
    return usual.model_copy(update=changed)


def _plan(settings: TrainConfig, data: str, device: torch.device) -> str:
    from reconstruct.network import build
    from reconstruct.train import step_memory_bytes

    net = build(settings.preset)
    return (
        f"network    {settings.preset}, {sum(p.numel() for p in net.parameters()):,} parameters\n"
        f"data       {data}\n"
        f"steps      {settings.steps} of {settings.batch} crops of {settings.crop_px} px\n"
        f"memory     about {step_memory_bytes(settings) / 2**30:.2f} GiB a step with 5 frames\n"
        f"device     {device}"
    )


def _files(locations: list[str]) -> list[str]:
    from reconstruct import remote

    found: list[str] = []
    for location in locations:
        if remote.is_url(location):
            below = remote.listing(location).items()
            inside = [f"{folder}/{name}" for folder, names in below for name in names if name.endswith(".h5")]
        else:
            path = Path(location)
            inside = _below(path) if path.is_dir() else [location]
            if not path.exists():
                raise UsageError(f"{location} does not exist; check the name")
        if not inside:
            raise UsageError(f"{location}: no stack (*.h5) in this folder; `daif import` makes one of photographs")
        found += inside
    return found


def _below(folder: Path) -> list[str]:
    """Stacks in `folder` and below, but hidden ones, such as what macOS leaves on foreign disks."""
    return sorted(str(path) for path in folder.rglob("*.h5") if not path.name.startswith("."))


def _train_on_stacks(
    files: list[str],
    out: Path,
    settings: TrainConfig,
    init: str,
    refine: int | None,
    lens: Path | None,
    resume: bool,
    device: torch.device,
    dry_run: bool,
) -> str:
    """What there is to say of the run when it has ended, or of what it would be."""
    from capture.lens import LensProfile
    from reconstruct import remote
    from reconstruct.dataset import prepare_captured
    from reconstruct.finetune import adapt, train_paper
    from reconstruct.predict import load_network
    from reconstruct.train import is_first_process

    profile = None if lens is None else LensProfile.read(lens)
    paper = settings.preset == "paper"
    start = None if init == "none" or paper else load_network(init, device, "default")
    if dry_run:
        return _plan(settings, f"{len(files)} stack(s)", device)
    remote.prepare_output(str(out))
    captured = prepare_captured(files, profile, out / "stacks")
    for stack in captured:
        if not stack.metric and is_first_process():
            print(f"{stack.name}: focus distances unknown; trained on in relative mode (ordered depth, no metres)")
    if paper:
        return str(train_paper(captured, out, settings, device=device, resume=resume))
    many = 25 if refine is None else refine
    result = adapt(captured, start, out, settings, device=device, refine_steps=many, resume=resume)
    not_kept = "not better than its start on the withheld frames: not kept, go on with the old weights"
    return f"{result.table()}\n{result.weights or not_kept}"
