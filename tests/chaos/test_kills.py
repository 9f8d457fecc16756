"""The bounded part of the chaos suite: one kill of each kind (`make chaos` makes many)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from kills import STAGES, Case, Chaos

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]

CASES = [
    *(Case("driver", "local", stage) for stage in (*STAGES[2:-1:3], STAGES[-3])),
    Case("driver", "ray", "  epoch 1/3"),
    Case("scoring worker", "ray", "round 1/1: scoring"),
    Case("training worker", "ray", "round 1: fusing"),
    Case("node", "ray on two nodes", "round 1: fusing"),
]


@pytest.fixture(scope="module")
def chaos_of(material, tmp_path_factory) -> Callable[[bool], Chaos]:
    """Whether on Ray (where a round takes long: one must do) → where runs are made."""

    @cache
    def made(on_ray: bool) -> Chaos:
        recipe = partial(material.recipe, sparsity=0.125) if on_ray else material.recipe
        chaos = Chaos(tmp_path_factory.mktemp("chaos"), recipe)
        chaos.undisturbed("local")
        return chaos

    return made


@pytest.mark.parametrize("number", range(len(CASES)), ids=[str(case) for case in CASES])
def test_a_killed_run_ends_with_the_same_bytes(
    number: int, chaos_of: Callable[[bool], Chaos]
) -> None:
    outcome = chaos_of(CASES[number].engine != "local").run(CASES[number], number)
    assert outcome.finished, outcome.log
    assert outcome.identical, outcome.log
    assert outcome.killed == 1, outcome.log
    if CASES[number].victim == "driver":
        assert outcome.runs == 2
