"""What a model is called on its way, and what of the damage is said to be undone."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
from rich.console import Console

from fusegpt_ray.recipe.specs import METHOD_SPECS
from fusegpt_ray.terminal.display import Display
from fusegpt_ray.text.protocol import STAGES, undone

LENGTH = {"length": 9, "windows": 2}


@pytest.mark.parametrize(
    ("row", "share"),
    [
        ({"dense": 10.0, "dropped": 14.0, "fused": 12.0, "healed": 11.0}, 0.75),
        ({"dense": 10.0, "dropped": 14.0, "replaced": 15.0}, -0.25),
        ({"dense": 10.0, "sliced": 14.0, "healed": 11.0}, 0.75),
        ({"dense": 10.0, "inserted": 12.0, "healed": 9.0}, 1.5),
        ({"dense": 10.0, "inserted": 10.0, "healed": 9.0}, None),
        ({"dense": 10.0, "dropped": 14.0}, None),
        ({"dense": 10.0, "sliced": math.inf, "healed": 11.0}, None),
        ({"dense": 10.0, "dropped": 9.5, "healed": 9.0}, None),
    ],
    ids=str,
)
def test_the_first_step_does_the_damage_and_later_ones_undo_it(
    row: dict[str, float], share: float | None
) -> None:
    assert undone(row | LENGTH) == share


def shown(*rows: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=120)
    Display(console).results((f"model-{n}", {"text": row | LENGTH}) for n, row in enumerate(rows))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_last_table_has_a_column_for_what_was_undone_if_something_was() -> None:
    table = shown({"dense": 10.0, "sliced": 14.0, "healed": 11.0})
    assert "sliced" in table and "damage undone" in table and "75%" in table
    alone = shown({"dense": 10.0, "dropped": 14.0})
    assert "dropped" in alone and "14.00" in alone and "undone" not in alone
    both = shown({"dense": 10.0, "dropped": 14.0}, {"dense": 10.0, "dropped": 14.0, "healed": 12.0})
    assert "50%" in both and "–" in both


def test_only_what_fuses_is_called_fused() -> None:
    for name, spec in METHOD_SPECS.items():
        assert spec.stage in STAGES and (spec.stage == "fused") == spec.fuses, name
