"""A run's name has one owner; who lost it writes nothing more; a heartbeat that fails ends nothing.

Real processes race for names in `tests/integration/test_two_runs.py`.
"""

from __future__ import annotations

import json
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from desk import Desk
from left_behind import names
from stopped_runs import Watching, contents, recipe, run_folder

from fusegpt_ray.pipeline import compress
from fusegpt_ray.run import lease
from fusegpt_ray.run.lease import Lease, OwnedByAnother, Owner, Standing, claim
from fusegpt_ray.store import storage


def quiet(_: str) -> None:
    """Nobody listens."""


def read_heartbeat(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "heartbeat.json").read_text())


def elsewhere() -> Owner:
    """A process of another machine."""
    return replace(Owner.this(), host="elsewhere", machine="another", pid=1)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "EVERY", 0.01)
    monkeypatch.setattr(lease, "EXPIRY", 0.2)


# --- one owner ---


def test_a_process_of_this_machine_that_lives_is_not_waited_for(tmp_path: Path) -> None:
    """It is asked for by number and by the time when it began, so the answer comes at once."""
    folder = str(tmp_path / "demo.run")
    parent = replace(Owner.this(), pid=os.getppid(), born=lease._life(os.getppid())[1])
    assert claim(folder, None, parent)
    with pytest.raises(OwnedByAnother, match=rf"at work on .* \(process {os.getppid()}, since "):
        Lease.take(folder, quiet)
    later = replace(parent, born=parent.born - 1)  # another process has its number by now
    assert claim(folder, Standing.look(folder), later)
    Lease.take(folder, quiet)
    assert names(tmp_path / "demo.run") == {f"lease-00000{n}.json" for n in (1, 2, 3)}


def test_who_lost_the_name_stops_and_writes_nothing(tmp_path: Path, hasty: None) -> None:
    folder = tmp_path / "demo.run"
    with Lease.take(str(folder), quiet, lambda: "thinking") as first:
        first.stop()  # as if the machine were too busy
        with Lease.take(str(folder), quiet, lambda: "writing") as second:
            second.stop()  # else its heartbeat may lie there, half written, in one of the looks
            before = contents(folder)
            lost = r"lost its name to one on .*: writing\. Fix: leave it to that run"
            with pytest.raises(OwnedByAnother, match=lost):
                first.fence.check()
            with pytest.raises(OwnedByAnother, match=lost), first.creating():
                raise AssertionError("it is refused before it creates anything")
            first._beat()
            assert {*contents(folder)} == {*before}
            assert read_heartbeat(folder)["owner"] != first.fence.owner
        for file in folder.iterdir():
            file.unlink()
        first._beat()  # nor does a heartbeat bring the folder of a finished run back
        assert not contents(folder)
        with pytest.raises(OwnedByAnother, match=r"demo\.run is gone"):
            first.fence.check()


def test_what_another_run_created_is_told_as_such(tmp_path: Path) -> None:
    folder = str(tmp_path / "demo.run")
    with Lease.take(folder, quiet) as owned:
        storage.create(f"{folder}/round-001.json", b"by a run that had been taken for dead")
        told = r"wrote the same meanwhile .*round-001\.json"
        with pytest.raises(OwnedByAnother, match=told), owned.creating():
            storage.create(f"{folder}/round-001.json", b"by the owner")


def test_a_lease_expires_by_the_clock_of_who_waits(tmp_path: Path, hasty: None) -> None:
    """The heartbeat's time is of a clock that is a day ahead, or of one that is a year behind."""
    for generation, ahead in enumerate((86400.0, -3e7)):
        folder, owner, said = tmp_path / "demo.run", elsewhere(), list[str]()
        assert claim(str(folder), Standing.look(str(folder)), owner)
        told = {"time": lease.time.time() + ahead, "owner": owner.id, "host": "elsewhere", "pid": 1}
        (folder / "heartbeat.json").write_text(json.dumps(told))
        with pytest.raises(KeyboardInterrupt), Lease.take(str(folder), said.append):
            raise KeyboardInterrupt
        (line,) = said
        assert line.startswith("a run of this name was alive on elsewhere (process 1, since ")
        there = Standing.look(str(folder))
        assert there is not None and (there.generation, there.over) == (2 * generation + 2, True)


def test_a_run_of_a_version_without_leases_is_waited_for(tmp_path: Path, hasty: None) -> None:
    folder, said = tmp_path / "demo.run", list[str]()
    folder.mkdir()
    heartbeat = {"time": lease.time.time(), "host": "elsewhere", "pid": 1, "doing": "round 2/3"}
    (folder / "heartbeat.json").write_text(json.dumps(heartbeat))
    Lease.take(str(folder), said.append)
    assert ["was alive on elsewhere (process 1)" in line for line in said] == [True]


# --- heartbeats ---


def test_the_heart_beats_while_the_block_lasts(tmp_path: Path, hasty: None) -> None:
    beats = threading.Semaphore(0)

    def doing() -> str:
        beats.release()
        return "thinking"

    with Lease.take(str(tmp_path), quiet, doing, lambda: {"rounds": 3}):
        for _ in range(5):
            assert beats.acquire(timeout=60)
    last = read_heartbeat(tmp_path)
    assert (last["doing"], last["rounds"], last["pid"]) == ("thinking", 3, os.getpid())
    assert "ended" not in last
    assert not [thread for thread in threading.enumerate() if thread.name == "lease"]


def test_the_last_heartbeat_tells_how_it_ended(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Lease.take(str(tmp_path), quiet):
        raise KeyboardInterrupt
    assert read_heartbeat(tmp_path)["ended"] == "KeyboardInterrupt"
    Lease.take(str(tmp_path), pytest.fail)  # nobody waits for it


def test_a_store_that_fails_does_not_end_the_run(tmp_path: Path, hasty: None) -> None:
    (tmp_path / "heartbeat.json").mkdir()
    beats = threading.Semaphore(0)

    def doing() -> str:
        beats.release()
        return "thinking"

    with Lease.take(str(tmp_path), quiet, doing):
        assert all(beats.acquire(timeout=60) for _ in range(3))
        (tmp_path / "heartbeat.json").rmdir()
        assert all(beats.acquire(timeout=60) for _ in range(3))
    assert read_heartbeat(tmp_path)["doing"] == "thinking"


class Looking(Watching):
    """Looks at the run's last heartbeat in every round."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.seen = folder, list[dict[str, Any]]()

    def round_begins(self, number: int, rounds: int, blocks: int) -> None:
        super().round_begins(number, rounds, blocks)
        self.seen.append(read_heartbeat(self.folder))


def test_a_finished_run_leaves_no_heartbeat(desk: Desk) -> None:
    show = Looking(run_folder(desk))
    compress(recipe(desk, method="mi"), show)
    assert len(show.seen) == 3 and names(desk.out) == {"demo-p20", "demo-p60"}
    facts = {(heartbeat["rounds"], *heartbeat["models"]) for heartbeat in show.seen}
    assert facts == {(3, "demo-p20", "demo-p60")}
