"""All mistakes of a recipe are found at once, and looking for them writes nothing."""

from __future__ import annotations

import pytest
from desk import Desk
from mistakes import tree

from fusegpt_ray.cost.rates import GPUS, MEASURED, RATES, find_gpu, known_gpu
from fusegpt_ray.errors import UserError
from fusegpt_ray.planning.plan import mistakes
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.terminal.display import Display


def test_every_mistake_of_the_keys_is_told(desk: Desk) -> None:
    wrong = desk.recipe(sparsty=0.3, importance={"windows": 0}, seed="one")
    assert {found.key for found in Recipe.mistakes(wrong)} == {
        "sparsty",
        "importance.windows",
        "seed",
    }
    between = desk.recipe(sparsity=2.0, importance={"windows": 99}, search={"candidates": ["mi"]})
    keys = [found.key for found in Recipe.mistakes(between)]
    assert keys == ["sparsity", "importance.windows", "search.candidates", "search"]
    assert Recipe.mistakes(desk.recipe()) == []


def test_every_mistake_of_the_plan_is_told_and_nothing_is_written(desk: Desk) -> None:
    evaluation = {"held": {"data": str(desk.folder / "none.txt")}}
    asked = Recipe.parse(desk.recipe(sparsity=0.9, evaluation=evaluation))
    before = tree(desk.folder)
    keys = [found.key for found in mistakes(asked, Display())]
    assert keys == ["evaluation.held.data", "sparsity"]
    assert mistakes(Recipe.parse(desk.recipe()), Display()) == []
    assert tree(desk.folder) == before


def test_other_gpus_reach_the_same_share_of_their_peak() -> None:
    assert known_gpu("NVIDIA H100 80GB HBM3") == "NVIDIA H100" and known_gpu("A10") is None
    share = GPUS["NVIDIA A100"].peak / GPUS[MEASURED].peak
    assert RATES["NVIDIA A100"]["scoring"] == pytest.approx(share * RATES[MEASURED]["scoring"])
    with pytest.raises(UserError, match="use one of NVIDIA H200"):
        find_gpu("RTX 4090")
