"""The capture commands of `daif`: import, info, pack, cameras, plan, capture."""

from __future__ import annotations

import typer


def register(app: typer.Typer) -> None:
    """Add this package's commands to `app`."""
