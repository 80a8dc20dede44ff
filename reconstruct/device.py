"""The one place that turns a device's name into a device."""

from __future__ import annotations

import torch

from capture.errors import UsageError


def pick_device(name: str = "auto") -> torch.device:
    """The torch device called `name`: auto, cpu, cuda, cuda:N or mps; "auto" takes the fastest one present.

    Raises:
        UsageError: the name is unknown, or this machine lacks the device.
    """
    kind, _, index = name.partition(":")
    if kind == "auto" and not index:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    if name == "mps":
        if not torch.backends.mps.is_available():
            raise UsageError("--device mps: this machine has no Apple GPU that torch can use; use --device cpu")
        return torch.device("mps")
    if kind == "cuda" and (not index or index.isdecimal()) and not name.endswith(":"):
        if not torch.cuda.is_available():
            raise UsageError(f"--device {name}: torch finds no CUDA device on this machine; use --device auto or cpu")
        if index and int(index) >= torch.cuda.device_count():
            raise UsageError(
                f"--device {name}: this machine has {torch.cuda.device_count()} CUDA device(s), from cuda:0"
            )
        return torch.device(name)
    raise UsageError(f"--device {name}: expected auto, cpu, cuda, cuda:N or mps")
