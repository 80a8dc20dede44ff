"""The one place that turns a device's name into a device."""

from __future__ import annotations

import os

import torch

from capture.errors import UsageError


def pick_device(name: str = "auto") -> torch.device:
    """The torch device called `name`: auto, cpu, cuda or cuda:N; "auto" is cuda where there is one, else cpu.

    Raises:
        UsageError: the name is unknown, or this machine lacks the device.
    """
    kind, _, index = name.partition(":")
    if kind == "auto" and not index:
        return _own_gpu() if torch.cuda.is_available() else torch.device("cpu")
    if name == "cpu":
        return torch.device("cpu")
    if kind == "mps":
        raise UsageError(f"--device {name}: Apple's GPUs lack the float64 that daif needs; use --device auto or cpu")
    if kind == "cuda" and (not index or index.isdecimal()) and not name.endswith(":"):
        if not torch.cuda.is_available():
            raise UsageError(f"--device {name}: torch finds no CUDA device on this machine; use --device auto or cpu")
        if not index:
            return _own_gpu()
        if int(index) >= torch.cuda.device_count():
            raise UsageError(
                f"--device {name}: this machine has {torch.cuda.device_count()} CUDA device(s), from cuda:0"
            )
        return torch.device(name)
    raise UsageError(f"--device {name}: expected auto, cpu, cuda or cuda:N")


def own_share() -> tuple[int, int]:
    """(number of this process, how many there are) among those that torchrun started; (0, 1) without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def _own_gpu() -> torch.device:
    """This process's CUDA device: under torchrun one each, else the current one."""
    place = os.environ.get("LOCAL_RANK")
    if place is None:
        return torch.device("cuda")
    if int(place) >= torch.cuda.device_count():
        raise UsageError(
            f"torchrun started more processes than this machine has CUDA devices ({torch.cuda.device_count()}); "
            f"use --nproc-per-node {torch.cuda.device_count()}"
        )
    return torch.device("cuda", int(place))


def has_bf16(device: torch.device) -> bool:
    """Whether `device` has units for bf16; a CPU without them is 12 to 27 times slower with it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    units: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.6 cannot tell
    return device.type == "cpu" and any(units.get(name) for name in ("avx512_bf16", "amx_bf16"))
