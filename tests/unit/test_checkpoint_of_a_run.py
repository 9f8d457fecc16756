"""Training checkpoints in a whole run: it goes on from them, `status` and `clean` know them, and
none outlives its round.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from desk import Desk
from stopped_runs import Watching, contents, flip, published, recipe, run_folder

from fusegpt_ray.cli import main
from fusegpt_ray.pipeline import compress
from fusegpt_ray.run.housekeeping import leftovers
from fusegpt_ray.run.journal import Journal
from fusegpt_ray.run.status import status

EVERY_EPOCH = {"engine": "local", "checkpoint_minutes": 0}
EPOCHS = 2


class Stopping(Watching):
    """The user presses Ctrl-C after the first epoch of round `at`."""

    def __init__(self, at: int = 0) -> None:
        super().__init__()
        self.at, self.epochs = at, list[tuple[int, int]]()

    def epoch(self, number: int, epochs: int, loss: float) -> None:
        super().epoch(number, epochs, loss)
        self.epochs.append((self.rounds[-1], number))
        if self.epochs[-1] == (self.at, 1):
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def undisturbed(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    desk = Desk.make(tmp_path_factory.mktemp("undisturbed"), checkpoint("llama"))
    compress(recipe(desk), Watching())
    return published(desk)


def stopped(desk: Desk, at: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        compress(recipe(desk, cluster=EVERY_EPOCH), Stopping(at))


def go_on(desk: Desk) -> Stopping:
    show = Stopping()
    compress(recipe(desk, cluster=EVERY_EPOCH), show)
    return show


def checkpoints(desk: Desk, number: int) -> Path:
    return run_folder(desk) / f"blocks/round-{number:03d}/checkpoints"


@pytest.mark.parametrize("at", [1, 3])
def test_a_stopped_run_goes_on_within_its_round(
    at: int, desk: Desk, undisturbed: dict[str, bytes]
) -> None:
    stopped(desk, at)
    assert [number for number in (1, 2, 3) if checkpoints(desk, number).exists()] == [at]
    show = go_on(desk)
    assert f"  going on after part 1 of {EPOCHS}" in show.said
    assert show.epochs == [
        (number, epoch) for number in range(at, 4) for epoch in (1, 2) if (number, epoch) != (at, 1)
    ]
    assert published(desk) == undisturbed
    assert not run_folder(desk).exists()


def test_a_kill_just_after_a_commit_leaves_nothing_behind(
    desk: Desk, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "_forget_checkpoints", dies)
        stopped(desk, 0)
    assert (run_folder(desk) / "round-001.json").exists() and checkpoints(desk, 1).exists()
    stopped(desk, 2)
    assert not checkpoints(desk, 1).exists() and checkpoints(desk, 2).exists()
    go_on(desk)
    assert published(desk) == undisturbed


def test_a_training_checkpoint_counts_only_after_the_same_rounds(
    desk: Desk, undisturbed: dict[str, bytes]
) -> None:
    """The first round is damaged and done again: what was learned on top of it is not gone on
    from, though it is whole.
    """
    stopped(desk, 2)
    flip(run_folder(desk) / "round-001.json")
    show = go_on(desk)
    (line,) = [line for line in show.said if "another set-up" in line]
    assert line.startswith("  a training checkpoint of another set-up is left aside (after ")
    assert show.epochs == [(number, epoch) for number in (1, 2, 3) for epoch in (1, 2)]
    assert published(desk) == undisturbed


def test_restart_forgets_them(desk: Desk) -> None:
    stopped(desk, 1)
    show = Stopping()
    compress(recipe(desk, cluster=EVERY_EPOCH), show, restart=True)
    assert show.epochs[:2] == [(1, 1), (1, 2)]


def test_status_and_clean_know_a_run_with_training_checkpoints(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped(desk, 2)
    Journal(str(run_folder(desk))).keep("sums", 2, [])  # as if scoring had been stopped instead
    assert main(["status", str(desk.out), "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert (run["rounds_done"], run["epochs_saved"]) == (1, 1)
    assert (run["state"], run["ended"]) == ("unfinished", "KeyboardInterrupt")
    assert (
        run["doing"].startswith("round 2: fusing blocks ")
        and f"(epoch 1/{EPOCHS}, loss " in run["doing"]
    )
    (alone,), (among,) = (status(str(uri))["runs"] for uri in (run_folder(desk), desk.out))
    assert alone | {"heartbeat_age": 0} == among | {"heartbeat_age": 0}  # a clock in between
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["status", str(desk.out)]) == 0
    assert "1 of 3, epochs saved: 1" in capsys.readouterr().out

    (item,) = leftovers(str(desk.out))
    assert (item.what, item.dead) == ("an unfinished run, can be resumed (rounds done: 1)", False)
    assert (
        item.size
        == sum(map(len, contents(run_folder(desk)).values()))
        > sum(map(len, contents(checkpoints(desk, 2)).values()))
        > 0
    )
    assert main(["clean", str(desk.out), "--yes"]) == 0
    assert checkpoints(desk, 2).exists()
    assert main(["clean", str(desk.out), "--yes", "--unfinished"]) == 0
    assert not run_folder(desk).exists()
