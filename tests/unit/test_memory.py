"""Compressing never holds more of a model than its trunk and one group (and the states, which
are not weights).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cramped import tune
from models import open_stack, token_windows
from watching import Watch, size_of

from fusegpt_ray.fusion import student
from fusegpt_ray.fusion.group_fusion import GroupFusion
from fusegpt_ray.importance.scoring import score
from fusegpt_ray.model import runner, weights
from fusegpt_ray.model.source import Source
from fusegpt_ray.publishing import publish, shrink
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.workers.base import Setup
from fusegpt_ray.workers.local import LocalWorkers

WINDOWS = token_windows(8, 9).numpy()


def test_two_rounds_hold_the_trunk_and_one_group(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint("llama")
    dense = open_stack(folder)
    recipe = Recipe.parse(
        {
            "model": {"source": str(folder)},
            "calibration": {"data": "unused", "windows": 8, "length": 9},
            "importance": {"windows": 8},
            "fusion": {"group_size": 2, "epochs": 1, "batch": 4, "rank": 2, "lora_rank": 2}
            | {"fold": "at_end"},
            "cluster": {"weights": "streamed"},
            "output": {"uri": str(tmp_path), "name": "x"},
        }
    )
    trunk, block = size_of(dense.trunk), size_of(dense.blocks[0].weights)
    watch = Watch()
    for module in (runner, weights, student, shrink):
        monkeypatch.setattr(module, "read_tensors", watch)
    source = Source.find(str(folder), None)
    stack = dense
    with LocalWorkers(Setup.of(recipe, source, dense)) as engine:
        # Round 2's group has one neighbour (block 3) that was fused before: one more donor is held
        # with it.
        for donor, group_blocks in ((2, 3), (1, 4)):
            watch.alive.clear()
            score(engine, stack, WINDOWS, recipe.importance)
            assert trunk < max(watch.alive) <= trunk + block, (
                "scoring holds more than the block in use while it reads the next"
            )
            watch.alive.clear()
            job = GroupFusion(
                stack, dense, donor, recipe.fusion, True, 0, str(tmp_path / f"round-{donor}")
            )
            assert len(job.group) == 3
            stack = stack.drop(donor).swap(tune(engine, job, WINDOWS, recipe).saved.blocks)
            # Read, but not yet copied into the block that it belongs to: what a neighbour had
            # learned.
            learned = (
                max(size_of(terms.learned) for b in job.stack.blocks if (terms := b.terms))
                if donor == 1
                else 0
            )
            assert max(watch.alive) <= trunk + group_blocks * block + learned
            assert max(watch.alive) >= trunk + block, "the watch sees the group"
        watch.alive.clear()
        score(engine, stack, WINDOWS, recipe.importance)
        assert max(watch.alive) <= trunk + block, "nothing of a group stays after its round"
    watch.alive.clear()
    publish.publish(str(tmp_path / "x-p40"), stack, dense, source, 10**9, facts())
    largest = max(
        ref.end - ref.begin for ref in [*dense.trunk.values(), *dense.blocks[0].weights.values()]
    )
    # float32 tensors of the fused blocks are no larger than the dense ones: the checkpoint is
    # float32 too.
    assert max(watch.alive) <= 2 * largest, "publishing holds a tensor while it reads the next"


def facts() -> dict[str, object]:
    return {
        "method": "fusegpt",
        "recipe": {"importance": {"metric": "mi"}},
        "removed": [2, 1],
        "rounds": [],
        "perplexity": {},
    }
