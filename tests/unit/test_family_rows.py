"""The rows of a family: their order, their sums, and files that are no list of them."""

from __future__ import annotations

from typing import Any

import pytest

from fusegpt_ray.errors import UserError
from fusegpt_ray.family import board
from fusegpt_ray.store.family import FamilyBoard


def test_what_runs_took_is_counted_once() -> None:
    rows = [{"run": "a", "cost": 1.0}, {"run": "a", "cost": 3.0}, {"run": "b", "cost": 2.0}]
    assert board.total([*rows, {"run": "c", "cost": None}], "cost") == 5.0
    assert board.total([{"run": "c", "cost": None}], "cost") is None


def test_the_least_damaged_comes_first() -> None:
    def row(name: str, sparsity: float | None, *factors: float, status: str = "done") -> Any:
        texts = {f"{n}": {"dense": 2.0, "published": 2.0 * f} for n, f in enumerate(factors)}
        return {"folder": name, "sparsity": sparsity, "perplexity": texts, "status": status}

    rows = [
        row("failed", 0.1, status="failed"), row("worse", 0.2, 1.5, 1.5), row("more", 0.4, 1.1),
        row("better", 0.2, 2.0, 1.05), row("deeper", None, 0.9),
    ]  # fmt: skip
    found = [one["folder"] for one in board.ranked(rows)]
    assert found == ["deeper", "better", "worse", "more", "failed"]


@pytest.mark.parametrize("data", [[], {}, {"rows": [1]}, {"rows": [{}]}, {"format": 2, "rows": []}])
def test_a_list_that_is_none_is_refused(data: Any) -> None:
    with pytest.raises(UserError):
        FamilyBoard.parse(data, "somewhere")
