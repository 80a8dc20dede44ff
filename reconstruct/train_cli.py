"""The `daif train` command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from capture.errors import UsageError

if TYPE_CHECKING:
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
    preset: Annotated[str, typer.Option(help="default, or paper for the published network and training.")] = "default",
    init: Annotated[str, typer.Option(help="Start from: default, none, or a weights file.")] = "default",
    config: Annotated[Path | None, typer.Option(help="YAML that overrides the training configuration.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Number of training steps.")] = None,
    refine: Annotated[int, typer.Option(min=0, help="Refinement steps of each stack before distilling.")] = 25,
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
    if preset not in ("default", "paper"):
        raise UsageError(f"--preset is {preset!r}; it must be default or paper")
    if recipe is None and not stacks:
        raise UsageError("name the stacks to train on, or --recipe default to train on simulated ones")
    if recipe not in (None, "default", "refinement"):
        raise UsageError(f"--recipe is {recipe!r}; it must be default or refinement (change it by --config)")
    if recipe is not None and stacks:
        raise UsageError("--recipe trains on simulated stacks; leave the captured ones out")
    if recipe == "refinement":
        if (preset, init) != ("default", "default") or device not in ("auto", "cpu"):
            raise UsageError(
                "--recipe refinement trains a network of its own on CPUs; leave --preset, --init and --device out"
            )
        print(_train_refinement(config, steps, out, pool or out / "pool", dry_run=dry_run))
        return
    from reconstruct.device import pick_device

    files = _files(stacks or [])
    settings = _settings(config, recipe, preset, init, steps, len(files))
    target = pick_device(device)
    if dry_run:
        _print_plan(settings, files, recipe, str(target))
        return
    from reconstruct.train import is_first_process, pretrain

    if recipe is not None:
        said = str(pretrain(settings, out, pool or out / "pool", device=target, resume=resume))
    else:
        said = _train_on_stacks(files, out, settings, init, refine, lens, resume, device)
    if is_first_process():
        print(said)


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
    config: Path | None, recipe: str | None, preset: str, init: str, steps: int | None, stacks: int
) -> TrainConfig:
    from capture.config import load_yaml
    from reconstruct.finetune import FROM_NOTHING, PAPER, finetune_config
    from reconstruct.train import RECIPE, TrainConfig

    if config is not None:
        settings = load_yaml(config, TrainConfig)
    elif recipe is not None:
        settings = RECIPE
    elif preset == "paper":
        settings = PAPER
    else:
        settings = FROM_NOTHING if init == "none" else finetune_config(stacks)
    return settings if steps is None else settings.model_copy(update={"steps": steps})


def _print_plan(settings: TrainConfig, files: list[str], recipe: str | None, device: str) -> None:
    from reconstruct.network import build
    from reconstruct.train import step_memory_bytes

    net = build(settings.preset)
    data = f"recipe {recipe}: {settings.scenes} simulated scenes" if recipe else f"{len(files)} stack(s)"
    print(f"network    {settings.preset}, {sum(p.numel() for p in net.parameters()):,} parameters")
    print(f"data       {data}")
    print(f"steps      {settings.steps} of {settings.batch} crops of {settings.crop_px} px")
    print(f"memory     about {step_memory_bytes(settings) / 2**30:.2f} GiB a step with 5 frames")
    print(f"device     {device}")


def _files(locations: list[str]) -> list[str]:
    from reconstruct import remote

    found: list[str] = []
    for location in locations:
        if remote.is_url(location):
            below = remote.listing(location).items()
            inside = [f"{folder}/{name}" for folder, names in below for name in names if name.endswith(".h5")]
        else:
            path = Path(location)
            inside = sorted(map(str, path.glob("*.h5"))) if path.is_dir() else [location]
        if not inside:
            raise UsageError(f"{location}: no stack (*.h5) in this folder; `daif import` makes one of photographs")
        found += inside
    return found


def _train_on_stacks(
    files: list[str],
    out: Path,
    settings: TrainConfig,
    init: str,
    refine: int,
    lens: Path | None,
    resume: bool,
    device: str,
) -> str:
    """What there is to say of the run when it has ended."""
    from capture.lens import LensProfile
    from reconstruct.dataset import prepare_captured
    from reconstruct.device import pick_device
    from reconstruct.finetune import adapt, train_paper
    from reconstruct.predict import load_network
    from reconstruct.train import is_first_process

    target = pick_device(device)
    profile = None if lens is None else LensProfile.read(lens)
    captured = prepare_captured(files, profile, out / "stacks")
    for stack in captured:
        if not stack.metric and is_first_process():
            print(f"{stack.name}: focus distances unknown; trained on in relative mode (ordered depth, no metres)")
    if settings.preset == "paper":
        return str(train_paper(captured, out, settings, device=target, resume=resume))
    start = None if init == "none" else load_network(init, target, "default")
    result = adapt(captured, start, out, settings, device=target, refine_steps=refine, resume=resume)
    not_kept = "not better than its start on the withheld frames: not kept, go on with the old weights"
    return f"{result.table()}\n{result.weights or not_kept}"
