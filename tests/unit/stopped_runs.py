"""Runs of a desk's recipe, stopped where a test wants it, and what they leave."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from desk import Desk

from fusegpt_ray.pipeline import compress
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.run.journal import Done, Journal
from fusegpt_ray.terminal.display import Display

Weights = dict[str, bytes]


class Watching(Display):
    """Keeps what it was told; the user presses Ctrl-C where round `stop` begins."""

    def __init__(self, stop: int = 0) -> None:
        super().__init__()
        self.stop, self.said, self.rounds = stop, list[str](), list[int]()

    def say(self, text: str) -> None:
        self.said.append(text)

    def round_begins(self, number: int, rounds: int, blocks: int) -> None:
        if number == self.stop:
            raise KeyboardInterrupt
        self.rounds.append(number)
        super().round_begins(number, rounds, blocks)


class BeforeItsSecondModel(Watching):
    """The user presses Ctrl-C when one model of two has been published."""

    def stage(self, text: str, total: int | None = None) -> None:
        if text == "evaluating and publishing demo-p60":
            raise KeyboardInterrupt
        super().stage(text, total)


def recipe(desk: Desk, **changes: Any) -> Recipe:
    return Recipe.parse(desk.recipe(**({"sparsity": [0.2, 0.6]} | changes)))


def stopped(desk: Desk, stop: int = 2, **changes: Any) -> None:
    """A run that was stopped where round `stop` began."""
    with pytest.raises(KeyboardInterrupt):
        compress(recipe(desk, **changes), Watching(stop))
    assert not list(desk.out.glob("*/fusegpt.json"))


def run_folder(desk: Desk) -> Path:
    return desk.out / "demo.run"


def rounds(journal: Journal) -> list[Done]:
    """The rounds of a journal in which nothing is damaged."""
    complaints: list[str] = []
    found = journal.rounds([], complaints.append)
    assert complaints == []
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def published(desk: Desk) -> dict[str, bytes]:
    """The weights and configurations of all published models."""
    return {
        name: data
        for name, data in contents(desk.out).items()
        if name.endswith(("/model.safetensors", "/config.json"))
    }


@pytest.fixture(name="undisturbed", scope="module")
def _undisturbed(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Weights]:
    """By way of keeping a fused block's terms: what a run publishes that nobody disturbs."""
    found = {}
    for fold in ("at_end", "each_round"):
        desk = Desk.make(tmp_path_factory.mktemp(fold), checkpoint("llama"))
        fusion = desk.recipe()["fusion"] | {"fold": fold}
        compress(recipe(desk, fusion=fusion), Watching())
        found[fold] = published(desk)
    assert len(found["at_end"]) == 4 and found["at_end"] != found["each_round"]
    return found


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
