"""A comparison that is asked for again, otherwise than before; and what cleaning leaves of one."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from desk import Desk
from stopped_runs import Watching, published
from test_compare import asked, parsed, perplexities

from fusegpt_ray.comparison.cells import Comparison
from fusegpt_ray.comparison.run import compare
from fusegpt_ray.errors import UserError
from fusegpt_ray.run.housekeeping import clean, leftovers


def test_a_finished_cell_stays_where_more_sparsities_are_asked_for(
    desk: Desk, tmp_path: Path
) -> None:
    expected = compare(parsed(desk, "mi", "angular"), Watching())
    together = published(desk)
    desk.out.rename(tmp_path / "together")

    def of(*sparsities: float) -> Comparison:
        section = {"methods": ["mi", "angular"], "sparsities": list(sparsities)}
        return Comparison.parse(asked(desk) | {"compare": section})

    compare(of(0.2), Watching())
    first = (desk.out / "demo-mi-p20/fusegpt.json").read_bytes()
    show = Watching()
    assert perplexities(compare(of(0.2, 0.4), show)) == perplexities(expected)
    assert published(desk) == together
    assert (desk.out / "demo-mi-p20/fusegpt.json").read_bytes() == first
    assert perplexities(compare(of(0.4), Watching())).keys() == {("mi", 0.4), ("angular", 0.4)}
    compare(of(0.2, 0.4), Watching(), restart=True)  # which forgets only what is unfinished
    assert published(desk) == together


def test_a_finished_cell_that_was_measured_otherwise_is_told(desk: Desk) -> None:
    compare(parsed(desk, "mi"), Watching())
    before = published(desk)
    other = asked(desk, ["mi"], evaluation={"more": {"data": str(desk.heldout)}})
    with pytest.raises(UserError, match=r"demo-mi-p20 was measured otherwise.*output\.name"):
        compare(Comparison.parse(other), Watching())
    assert published(desk) == before
    elsewhere = other | {"output": {**other["output"], "name": "again"}}
    result = compare(Comparison.parse(elsewhere), Watching())
    assert {row["text"] for row in result["rows"]} == {"more"}


def test_a_finished_cell_of_other_settings_is_refused(desk: Desk) -> None:
    compare(parsed(desk, "mi"), Watching())
    with pytest.raises(UserError, match="finished model is already at"):
        compare(Comparison.parse(asked(desk, ["mi"], seed=3)), Watching())


def silent(desk: Desk) -> None:
    """Nobody has written anything for long."""
    for path in desk.out.rglob("*"):
        os.utime(path, (time.time() - 10_000,) * 2)


def left(desk: Desk, unfinished: bool = False) -> dict[str, bool]:
    """What `clean` finds, by its path below the output, and whether it may go."""
    return {
        item.uri.removeprefix(f"{desk.out}/"): item.dead
        for item in leftovers(str(desk.out), unfinished=unfinished)
    }


def test_clean_knows_what_an_unfinished_comparison_left(desk: Desk) -> None:
    with pytest.raises(KeyboardInterrupt):
        compare(parsed(desk, "mi"), Watching(stop=2))
    training = desk.out / "compare/demo/blocks/0/blocks/train/state"
    training.parent.mkdir(parents=True)
    training.write_text("Ray Train's")
    shared, blocks = "compare/demo/measured", "compare/demo/blocks"
    kept = {"demo-mi.run": False, shared: False, "compare/demo/table.json": False}
    assert left(desk) == kept | {blocks: False}  # just written
    silent(desk)
    assert left(desk) == kept | {blocks: True}
    assert [item.uri for item in clean(str(desk.out))] == [f"{desk.out}/{blocks}"]
    assert not training.exists()
    result = compare(parsed(desk, "mi"), Watching())  # it goes on
    assert result["failed"] == []


def test_clean_removes_an_unfinished_comparison_if_told(desk: Desk) -> None:
    with pytest.raises(KeyboardInterrupt):
        compare(parsed(desk, "mi"), Watching(stop=2))
    silent(desk)
    gone = {item.uri.removeprefix(f"{desk.out}/") for item in clean(str(desk.out), unfinished=True)}
    assert gone == {"demo-mi.run", "compare/demo/measured", "compare/demo/table.json"}
    assert not [path for path in desk.out.rglob("*") if path.is_file()]


def test_clean_leaves_tables_and_what_is_not_ours(desk: Desk) -> None:
    compare(parsed(desk, "mi"), Watching())
    other = desk.out / "compare/mine/measured"
    other.mkdir(parents=True)
    (other / "notes.txt").write_text("mine")
    silent(desk)
    assert left(desk, unfinished=True) == {}
