"""The journal of a run: its records, and damage to them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from desk import Desk
from models import open_stack
from stopped_runs import (  # noqa: F401 - fixtures
    Watching,
    Weights,
    _undisturbed,
    contents,
    flip,
    published,
    recipe,
    rounds,
    run_folder,
    stopped,
)

from fusegpt_ray.errors import UserError
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.pipeline import compress
from fusegpt_ray.run.journal import Done, Journal

# --- the records ---


def test_records_survive_json(desk: Desk) -> None:
    stopped(desk, 3)
    found = rounds(Journal.of(recipe(desk)))
    dense = open_stack(desk.model)
    assert [len(done.stack) for done in found] == [4, 3]
    for done in found:
        record, stack = done.record, done.stack
        assert Stack.from_json(json.loads(json.dumps(stack.to_json()))) == stack
        assert record["removed"] not in stack.kept and stack.trunk == dense.trunk
        assert set(record["group"]) - {record["removed"]} == {
            block.dense for block in stack.blocks if block.terms
        }
        assert (
            record["loss_first"] == record["losses"][0]
            and record["loss_last"] == record["losses"][-1]
        )
    last = {block.dense: block for block in found[-1].stack.blocks}
    terms = [len(block.terms.donors) for block in last.values() if block.terms]
    assert max(terms) == 2, "or no block was fused twice"

    elsewhere = Journal("memory://journal/test.run")
    elsewhere.begin({"a": [1, 2]})
    elsewhere.begin({"a": (1, 2)})  # the same in JSON
    for number, done in enumerate(found, 1):
        elsewhere.commit(number, done)
    assert rounds(elsewhere) == found


def test_the_manifest_holds_the_records(desk: Desk) -> None:
    stopped(desk, 3)
    records = [done.record for done in rounds(Journal.of(recipe(desk)))]
    compress(recipe(desk), Watching())
    manifest = json.loads((desk.out / "demo-p60/fusegpt.json").read_text())
    assert manifest["rounds"][:2] == records and len(manifest["rounds"]) == 3
    assert manifest["removed"] == [record["removed"] for record in manifest["rounds"]]


def test_a_record_is_never_changed(desk: Desk) -> None:
    journal, dense = Journal.of(recipe(desk)), open_stack(desk.model)
    done = Done({"removed": 3}, dense.drop(3), {})
    journal.commit(1, done)
    with pytest.raises(FileExistsError):
        journal.commit(1, Done({"removed": 2}, dense.drop(2), {}))
    assert rounds(journal) == [done]


# --- damage ---


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def last_block(desk: Desk) -> Path:
    """A file of the second round that the next one needs."""
    return max((run_folder(desk) / "blocks/round-002").glob("*.learned.safetensors"))


def last_record(desk: Desk) -> Path:
    return run_folder(desk) / "round-002.json"


@pytest.mark.parametrize("which", [last_block, last_record])
@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
def test_damage_is_told_by_name_and_costs_only_its_own_round(
    which: Callable[[Desk], Path],
    damage: Callable[[Path], None],
    desk: Desk,
    undisturbed: dict[str, Weights],
) -> None:
    stopped(desk, 3)
    file = which(desk)
    damage(file)
    show = Watching()
    compress(recipe(desk), show)
    told = [line for line in show.said if line.startswith("WARNING")]
    if (which, damage) == (last_record, Path.unlink):  # the same as a round that was never finished
        assert told == []
    else:
        assert (
            len(told) == 1
            and str(file) in told[0]
            and "going back to the end of round 1" in told[0]
        )
    assert show.rounds == [2, 3]
    assert published(desk) == undisturbed["at_end"]


def test_a_missing_record_in_the_middle_is_told(
    desk: Desk, undisturbed: dict[str, Weights]
) -> None:
    stopped(desk, 3)
    (run_folder(desk) / "round-001.json").unlink()
    show = Watching()
    compress(recipe(desk), show)
    (told,) = [line for line in show.said if line.startswith("WARNING")]
    assert "round-001.json is missing" in told and "round 0" in told
    assert published(desk) == undisturbed["at_end"]


# --- what is no longer needed ---


def blocks(desk: Desk) -> set[Path]:
    return set((run_folder(desk) / "blocks").rglob("*.safetensors"))


def needed(desk: Desk, *numbers: int) -> set[Path]:
    """The files of the run that the models after these rounds are made of, by their records."""
    files = set[Path]()
    for number in numbers:
        text = (run_folder(desk) / f"round-{number:03d}.json").read_text()
        stack = json.dumps(json.loads(text)["body"]["stack"])
        files |= {file for file in blocks(desk) | every_file(desk) if str(file) in stack}
    return files


def every_file(desk: Desk) -> set[Path]:
    """All that the rounds have written, removed or not."""
    records = [json.loads(file.read_text()) for file in run_folder(desk).glob("round-*.json")]
    return {Path(uri) for record in records for uri in record["body"]["files"]}


class BeforePublishing(Watching):
    """Stopped when all rounds are done."""

    def stage(self, text: str, total: int | None = None) -> None:
        if text.startswith("evaluating and publishing"):
            raise KeyboardInterrupt
        super().stage(text, total)


def all_rounds(desk: Desk, **changes: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        compress(recipe(desk, **changes), BeforePublishing())


@pytest.mark.parametrize("fold", ["at_end", "each_round"])
def test_blocks_of_earlier_rounds_go_unless_a_model_is_made_of_them(
    fold: str, desk: Desk, undisturbed: dict[str, Weights]
) -> None:
    fusion = desk.recipe()["fusion"] | {"fold": fold}
    all_rounds(desk, sparsity=0.6, fusion=fusion)
    assert blocks(desk) == needed(desk, 2, 3) < every_file(desk)
    compress(recipe(desk, sparsity=0.6, fusion=fusion), Watching())
    name = "demo-p60/model.safetensors"
    assert published(desk)[name] == undisturbed[fold][name]

    shutil.rmtree(desk.out)
    all_rounds(desk, fusion=fusion)  # for a model after the first round, too
    assert blocks(desk) == needed(desk, 1, 2, 3)
    compress(recipe(desk, fusion=fusion), Watching())
    assert published(desk) == undisturbed[fold]


def test_what_a_kill_kept_from_going_goes_later(desk: Desk) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "let_go", lambda *_: None)
        all_rounds(desk, sparsity=0.6)
    assert blocks(desk) == every_file(desk) > needed(desk, 2, 3)
    all_rounds(desk, sparsity=0.6)
    assert blocks(desk) == needed(desk, 2, 3)


@pytest.mark.parametrize("depth", [1, 2])
def test_damage_costs_the_last_round_or_as_many_as_need_its_files(
    depth: int, desk: Desk, undisturbed: dict[str, Weights]
) -> None:
    """One record is damaged: back by a round. Two: what the first is made of is no longer there."""
    all_rounds(desk, sparsity=0.6)
    for number in range(3, 3 - depth, -1):
        flip(run_folder(desk) / f"round-{number:03d}.json")
    show = Watching()
    compress(recipe(desk, sparsity=0.6), show)
    assert show.rounds == ([3] if depth == 1 else [1, 2, 3])
    name = "demo-p60/model.safetensors"
    assert published(desk)[name] == undisturbed["at_end"][name]


def test_a_model_asked_for_too_late_costs_no_round(
    desk: Desk, undisturbed: dict[str, Weights]
) -> None:
    """Its blocks are gone. Rounds that are good are not done again without being asked."""
    all_rounds(desk, sparsity=0.6)
    before = blocks(desk), sorted(run_folder(desk).glob("round-*.json"))
    with pytest.raises(UserError, match=r"sparsity.*3 rounds are done.*--restart"):
        compress(recipe(desk), Watching())
    assert (blocks(desk), sorted(run_folder(desk).glob("round-*.json"))) == before
    show = Watching()
    compress(recipe(desk), show, restart=True)
    assert show.rounds == [1, 2, 3] and published(desk) == undisturbed["at_end"]


def test_a_damaged_identity_is_no_reason_to_start_anew(desk: Desk) -> None:
    stopped(desk)
    flip(run_folder(desk) / "identity.json")
    before = contents(desk.out)
    with pytest.raises(UserError, match=r"identity\.json is damaged"):
        compress(recipe(desk), Watching())
    assert contents(desk.out) == before
