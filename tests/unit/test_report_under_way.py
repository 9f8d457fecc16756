"""`fusegpt report` of a run that is not finished: from its journal, as far as it has come."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from desk import LENGTH, Desk
from stopped_runs import BeforeItsSecondModel, Watching, recipe, run_folder
from test_healed_runs import SAVED, StoppedInHealing
from test_report import Capture, Page, changes, drawn, made, values

from fusegpt_ray.cli import main
from fusegpt_ray.pipeline import compress
from fusegpt_ray.reporting.facts import facts


class DyingInTraining(Watching):
    """The user presses Ctrl-C after the first epoch of round `stop`."""

    def round_begins(self, number: int, rounds: int, blocks: int) -> None:
        self.rounds.append(number)

    def epoch(self, *_: Any, **__: Any) -> None:
        if self.rounds[-1] == self.stop:
            raise KeyboardInterrupt


def test_a_run_that_is_under_way(desk: Desk, capsys: Capture) -> None:
    """Two rounds are done; of the third the scores are known, and one epoch."""
    with pytest.raises(KeyboardInterrupt):
        compress(recipe(desk, **SAVED), DyingInTraining(3))
    page = made(desk.out, desk.folder / "report.html")  # nothing else is below the output URI
    bodies = [json.loads((run_folder(desk) / f"round-00{n}.json").read_text()) for n in (1, 2)]
    rounds = [body["body"]["round"] for body in bodies]
    scores = values(page, "round", "block", "score", "known", "outcome")
    assert [block for _, block, _, _, outcome in scores if outcome == "removed"] == [
        round["removed"] for round in rounds
    ]
    assert len([block for number, block, *_ in scores if number == 3]) == 3
    losses = values(page, "round", "epoch", "loss")
    assert [loss for number, _, loss in losses if number < 3] == [
        loss for round in rounds for loss in round["losses"]
    ]
    assert [epoch for number, epoch, _ in losses if number == 3] == [1]
    text = Page(page).text
    assert "What was planned, and what it took" in text, "as far as it has come"
    assert "2 of 3 rounds done" in text and "5 → 3" in text and "stopped" in text


@pytest.mark.parametrize("model", ["gpt2", "llava"])
def test_between_two_models(model: str, checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Whatever a configuration calls the depth: GPT-2 says n_layer, LLaVA in a nested section. The
    model that is published already is told, and the dense model's perplexity, and the versions.
    """
    desk = Desk.make(tmp_path, checkpoint(model))
    asked = recipe(desk, method="last", evaluation={"heldout": {"data": str(desk.heldout)}})
    with pytest.raises(KeyboardInterrupt):
        compress(asked, BeforeItsSecondModel())
    page = made(run_folder(desk), tmp_path / "report.html")
    manifest = json.loads((desk.out / "demo-p20" / "fusegpt.json").read_text())
    found = facts(str(run_folder(desk)))
    assert found.dense_blocks == manifest["dense_blocks"] == 5
    assert found.versions == manifest["versions"]
    dense = manifest["perplexity"]["heldout"]["dense"]
    assert found.perplexity["heldout"].by_stage == {"dense": dense}
    text = Page(page).text
    for told in (
        "5 → 2",
        "demo-p20",
        f"dense {dense:.2f} → dropped",
        f"windows of {LENGTH} tokens",
    ):
        assert told in text, told
    assert "demo-p60" not in text


def test_a_damaged_model_beside_a_run(desk: Desk) -> None:
    with pytest.raises(KeyboardInterrupt):
        compress(recipe(desk, method="last"), BeforeItsSecondModel())
    file = desk.out / "demo-p20" / "fusegpt.json"
    manifest = json.loads(file.read_text())
    for data in ({**manifest, "sparsity": "a lot"}, {}):
        file.write_text(json.dumps(data))
        assert facts(str(run_folder(desk))).others == []


def test_a_run_stopped_in_healing(desk: Desk) -> None:
    asked = changes(desk) | SAVED
    with pytest.raises(KeyboardInterrupt):
        compress(recipe(desk, sparsity=0.4, **asked), StoppedInHealing("demo-p40", 1))
    page = made(run_folder(desk), desk.folder / "report.html")
    healing = values(page, "part", "windows", "loss")
    assert [(part, kind) for part, kind, _ in healing] == [
        (1, "training"),
        (0, "held-out"),
        (1, "held-out"),
    ]
    told = facts(str(run_folder(desk)))
    assert told.search and len(told.search.tried) > 1
    taken = {row.stage: seconds for row, seconds in told.worked}
    assert taken["search"] == told.search.seconds > 0 and taken["evaluation"] > 0
    assert "Tournament" in Page(page).text
    for tried in told.search.tried:
        assert ", ".join(map(str, tried.removed)) in page and f"{tried.held_out[-1]:.4g}" in page


class StoppedInTheTournament(Watching):
    """The user presses Ctrl-C when one set of blocks has been healed."""

    def say(self, text: str) -> None:
        super().say(text)
        if "held-out loss" in text:
            raise KeyboardInterrupt


def test_a_run_stopped_in_its_tournament(desk: Desk) -> None:
    with pytest.raises(KeyboardInterrupt):
        compress(recipe(desk, sparsity=0.4, **changes(desk)), StoppedInTheTournament())
    page = made(run_folder(desk), desk.folder / "report.html")
    told = facts(str(run_folder(desk)))
    assert told.search and len(told.search.tried) > 1
    assert sum(bool(tried.held_out) for tried in told.search.tried) == 1
    noted = json.loads((run_folder(desk) / "search-000.json").read_text())["body"]["note"]
    assert 0 < noted["seconds"] == told.search.seconds
    measured = told.stage_seconds["evaluation"]
    assert values(page, "stage", "seconds") == [
        ("tournament", told.search.seconds),
        ("evaluation", measured),
    ]
    assert len(drawn(page)) == 1 and "0 of 2 rounds done" in Page(page).text
    for tried in told.search.tried:
        assert ", ".join(map(str, tried.removed)) in page


def test_a_journal_without_its_beginning(desk: Desk, capsys: Capture) -> None:
    with pytest.raises(KeyboardInterrupt):
        compress(recipe(desk), Watching(2))
    (run_folder(desk) / "identity.json").write_text("{}")
    assert main(["report", str(desk.out)]) == 2
    assert "identity.json is missing or damaged" in capsys.readouterr().err
    assert not (desk.folder / "report.html").exists()
