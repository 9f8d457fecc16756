"""A desk whose model is spoilt in some way, as a row of a table of mistakes (see `mistakes.py`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from desk import Desk
from mistakes import Bad, edit

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def model(name: str, spoil: Callable[[Desk], object], value: str, problem: str, fix: str) -> Bad:
    """A model spoilt in some way."""

    def make(desk: Desk) -> None:
        spoil(desk)

    return Bad(name, make, "model.source", value, problem, fix)


def source(name: str, value: str, problem: str, fix: str, shown: str = "") -> Bad:
    def make(desk: Desk) -> list[str]:
        return ["compress", desk.write(model={"source": value})]

    return Bad(name, make, "model.source", shown or value, problem, fix)


def replaced(name: str, make: Callable[[Path], object]) -> Callable[[Desk], object]:
    """Something else is in a file's place."""

    def spoil(desk: Desk) -> None:
        (desk.model / name).unlink(missing_ok=True)
        make(desk.model / name)

    return spoil


def unreadable(name: str) -> Callable[[Desk], object]:
    return lambda desk: (desk.model / name).chmod(0)


def configured(**changes: Any) -> Callable[[Desk], object]:
    """config.json says something else."""
    return lambda desk: edit(desk, "config.json", lambda data: data | changes)


AGAIN, FOLDER = "download the checkpoint again", "folder of a Hugging Face checkpoint"
