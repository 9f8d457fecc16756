"""Perplexities that a stopped run has measured are not measured again, nor does the dense model
write its samples again.
"""

from __future__ import annotations

import json
import shutil
from typing import Any

import numpy as np
import pytest
from desk import Desk
from stopped_runs import BeforeItsSecondModel, Watching, flip, recipe, run_folder

from fusegpt_ray.measuring import before_after
from fusegpt_ray.measuring.evaluation import perplexity
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.pipeline import compress
from fusegpt_ray.workers.base import Workers


class Measuring:
    """Perplexities, and how many blocks each measured model has."""

    def __init__(self) -> None:
        self.depths: list[int] = []

    def __call__(self, workers: Workers, stack: Stack, windows_WT: np.ndarray) -> float:
        self.depths.append(len(stack))
        return perplexity(workers, stack, windows_WT)


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> Measuring:
    found = Measuring()
    monkeypatch.setattr("fusegpt_ray.measuring.evaluation.perplexity", found)
    return found


@pytest.fixture
def writing(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many blocks each model has that writes samples."""
    found, writes = list[int](), before_after._written

    def written(workers: Workers, ids: Any, inputs: Any, stack: Stack) -> list[str]:
        found.append(len(stack))
        return writes(workers, ids, inputs, stack)

    monkeypatch.setattr(before_after, "_written", written)
    return found


def held_out(desk: Desk, **changes: Any) -> dict[str, Any]:
    return {"evaluation": {"heldout": {"data": str(desk.heldout)} | changes}}


def perplexities(desk: Desk) -> dict[str, Any]:
    return {
        path.parent.name: json.loads(path.read_text())["perplexity"]["heldout"]
        for path in desk.out.glob("*/fusegpt.json")
    }


def test_perplexities_of_dense_blocks_are_measured_once(
    desk: Desk, measuring: Measuring, writing: list[int]
) -> None:
    asks = held_out(desk) | {"output": desk.recipe()["output"] | {"samples": ["w20 w21"]}}
    compress(recipe(desk, **asks), Watching())
    assert measuring.depths == [5, 4, 4, 2, 2], "dense; of each model the fused and the dropped one"
    assert writing == [5, 4, 2]
    expected = perplexities(desk)
    shutil.rmtree(desk.out)

    measuring.depths.clear()
    writing.clear()
    with pytest.raises(KeyboardInterrupt):
        compress(recipe(desk, **asks), Watching(2))
    assert measuring.depths == [5]
    with pytest.raises(KeyboardInterrupt):
        compress(recipe(desk, **asks), BeforeItsSecondModel())
    assert measuring.depths == [5, 4, 4]

    # Killed when the second model's dropped form was measured, and nothing of it published.
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:  # noqa: PT012
        patch.setattr("fusegpt_ray.publishing.publish.model_card", interrupt)
        compress(recipe(desk, **asks), Watching())
    assert measuring.depths == [5, 4, 4, 2, 2]
    compress(recipe(desk, **asks), Watching())
    assert measuring.depths == [5, 4, 4, 2, 2, 2], "only the published weights once more"
    assert writing == [5, 4, 2, 2]
    assert perplexities(desk) == expected and len(expected) == 2


def interrupt(*_: Any) -> str:
    raise KeyboardInterrupt


def test_what_was_measured_counts_only_for_the_same_windows(
    desk: Desk, measuring: Measuring
) -> None:
    with pytest.raises(KeyboardInterrupt):
        compress(recipe(desk, sparsity=0.6, **held_out(desk)), Watching(2))
    compress(recipe(desk, sparsity=0.6, **held_out(desk, windows=3)), Watching())
    assert measuring.depths == [5, 5, 2, 2]
    found = perplexities(desk)
    shutil.rmtree(desk.out)
    compress(recipe(desk, sparsity=0.6, **held_out(desk, windows=3)), Watching())
    assert perplexities(desk) == found


def test_damaged_perplexities_are_told_and_measured_again(desk: Desk, measuring: Measuring) -> None:
    with pytest.raises(KeyboardInterrupt):
        compress(recipe(desk, **held_out(desk)), Watching(2))
    flip(run_folder(desk) / "perplexities-000.json")
    show = Watching()
    compress(recipe(desk, **held_out(desk)), show)
    (told,) = [line for line in show.said if line.startswith("WARNING")]
    assert "perplexities-000.json is damaged" in told
    assert measuring.depths == [5, 5, 4, 4, 2, 2]
