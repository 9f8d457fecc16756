"""A run that stops, for whatever reason, and the same command again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from desk import Desk
from faults import full_disk
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

from fusegpt_ray.cli import main
from fusegpt_ray.errors import UserError
from fusegpt_ray.methods import METHODS
from fusegpt_ray.methods.choosing import by_metric
from fusegpt_ray.pipeline import compress
from fusegpt_ray.run.identity import identity, model_identity
from fusegpt_ray.run.journal import Done, Journal

# --- going on ---


@pytest.mark.parametrize(("stop", "fold"), [(2, "at_end"), (3, "at_end"), (3, "each_round")])
def test_a_stopped_run_goes_on_and_ends_with_the_same_bytes(
    stop: int, fold: str, desk: Desk, undisturbed: dict[str, Weights]
) -> None:
    fusion = desk.recipe()["fusion"] | {"fold": fold}
    stopped(desk, stop, fusion=fusion)
    before = contents(run_folder(desk))
    assert sorted(name for name in before if name.startswith("round-")) == [
        f"round-{n:03d}.json" for n in range(1, stop)
    ]
    show = Watching()
    compress(recipe(desk, fusion=fusion), show)

    assert show.rounds == list(range(stop, 4))
    assert f"going on after round {stop - 1} of 3 (found in {run_folder(desk)})" in show.said
    assert published(desk) == undisturbed[fold]
    assert not run_folder(desk).exists()


def test_a_failed_run_goes_on_by_the_same_command(
    desk: Desk, undisturbed: dict[str, Weights], capsys: pytest.CaptureFixture[str]
) -> None:
    obstacle = run_folder(desk) / "blocks/round-002"
    obstacle.parent.mkdir(parents=True)
    obstacle.write_text("where the second round wants its folder")
    command = ["compress", desk.write(sparsity=[0.2, 0.6])]
    assert main(command) == 1
    end = capsys.readouterr().err.splitlines()[-2:]
    assert end[0] == f"stopped in round 2 of 3; 1 are finished in {run_folder(desk)}"
    assert end[1] == "The same command goes on from what is saved."

    obstacle.unlink()
    assert main(command) == 0
    assert "going on after round 1 of 3" in capsys.readouterr().err
    assert published(desk) == undisturbed["at_end"]


def test_ctrl_c_exits_130_and_says_how_to_go_on(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fusegpt_ray.pipeline.Display", lambda: Watching(stop=2))
    assert main(["compress", desk.write()]) == 130
    assert capsys.readouterr().err == "stopped; the same command goes on from what is saved\n"


def test_what_a_stopped_round_left_is_not_trusted(
    desk: Desk, undisturbed: dict[str, Weights]
) -> None:
    """Blocks without the record of their round are written again."""
    stopped(desk, 3)
    (run_folder(desk) / "round-002.json").unlink()
    half = sorted((run_folder(desk) / "blocks/round-002").iterdir())
    for file in half:
        file.write_bytes(file.read_bytes()[:100])
    assert half
    compress(recipe(desk), Watching())
    assert published(desk) == undisturbed["at_end"]


def test_a_record_cut_off_by_a_full_disk_is_no_record(desk: Desk) -> None:
    """Whatever ends the writing of a record in its middle must not stand in the way of the next
    attempt.
    """
    journal, dense = Journal.of(recipe(desk)), open_stack(desk.model)
    this = identity(recipe(desk), "0" * 64, model_identity(dense), torch.float32, {})
    with pytest.raises(OSError, match="too large"), full_disk(100):
        journal.begin(this)
    journal.begin(this)
    done = Done({"removed": 3}, dense.drop(3), {})
    with pytest.raises(OSError, match="too large"), full_disk(100):
        journal.commit(1, done)
    assert rounds(journal) == []
    journal.commit(1, done)
    assert rounds(journal) == [done]
    assert not [path for path in run_folder(desk).iterdir() if path.name.startswith(".")]


# --- within a round, and anew ---


class DyingInTraining(Watching):
    """Killed after the first epoch of round `stop`."""

    def epoch(self, number: int, epochs: int, loss: float) -> None:
        if self.rounds[-1] == self.stop:
            raise KeyboardInterrupt

    def round_begins(self, number: int, rounds: int, blocks: int) -> None:
        self.rounds.append(number)


class Counting:
    """Scores, and counts how often."""

    scored = 0

    def __call__(self, *arguments: Any) -> Any:
        self.scored += 1
        return by_metric(*arguments)


def test_scores_are_not_done_again(
    desk: Desk, undisturbed: dict[str, Weights], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        compress(recipe(desk), DyingInTraining(2))
    counting = Counting()
    counted = replace(METHODS["fusegpt"], choose=counting)
    monkeypatch.setitem(METHODS, "fusegpt", counted)
    compress(recipe(desk), Watching())
    assert counting.scored == 1, "of rounds 2 and 3, only round 3 was still to be scored"
    assert published(desk) == undisturbed["at_end"]


def test_damaged_scores_are_told_and_done_again(
    desk: Desk, undisturbed: dict[str, Weights]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        compress(recipe(desk), DyingInTraining(2))
    flip(run_folder(desk) / "scores-002.json")
    show = Watching()
    compress(recipe(desk), show)
    (told,) = [line for line in show.said if line.startswith("WARNING")]
    assert "scores-002.json is damaged" in told
    assert published(desk) == undisturbed["at_end"]


def test_restart_forgets_the_unfinished_run(desk: Desk, undisturbed: dict[str, Weights]) -> None:
    stopped(desk, 3, seed=1)
    show = Watching()
    compress(recipe(desk), show, restart=True)
    assert show.rounds == [1, 2, 3]
    assert published(desk) == undisturbed["at_end"]


def test_restart_leaves_finished_models_alone(desk: Desk) -> None:
    compress(recipe(desk, sparsity=0.2), Watching())
    before = contents(desk.out)
    with pytest.raises(UserError, match="a finished model is already at"):
        compress(recipe(desk), Watching(), restart=True)
    assert contents(desk.out) == before
