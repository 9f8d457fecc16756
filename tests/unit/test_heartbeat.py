"""The heartbeat of a run: it beats as long as the run lasts, tells how it ended, and never ends it."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from desk import Desk
from left_behind import names
from stopped_runs import Watching, recipe, run_folder

from fusegpt_ray.pipeline import compress
from fusegpt_ray.run.heartbeat import Heartbeat


def read_sign(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "heartbeat.json").read_text())


def test_the_heart_beats_while_the_block_lasts(tmp_path: Path) -> None:
    beats = threading.Semaphore(0)

    def doing() -> str:
        beats.release()
        return "thinking"

    with Heartbeat(str(tmp_path), doing, {"rounds": 3}, every=0.001):
        for _ in range(5):
            assert beats.acquire(timeout=60)
    last = read_sign(tmp_path)
    assert (last["doing"], last["rounds"], last["pid"]) == ("thinking", 3, os.getpid()) and "ended" not in last
    assert not [thread for thread in threading.enumerate() if thread.name == "heartbeat"]


def test_the_last_sign_tells_how_it_ended(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Heartbeat(str(tmp_path), str, {}):
        raise KeyboardInterrupt
    assert read_sign(tmp_path)["ended"] == "KeyboardInterrupt"


def test_a_store_that_fails_does_not_end_the_run(tmp_path: Path) -> None:
    (tmp_path / "heartbeat.json").mkdir()
    beats = threading.Semaphore(0)

    def doing() -> str:
        beats.release()
        return "thinking"

    with Heartbeat(str(tmp_path), doing, {}, every=0.001):
        assert all(beats.acquire(timeout=60) for _ in range(3))
        (tmp_path / "heartbeat.json").rmdir()
        assert all(beats.acquire(timeout=60) for _ in range(3))
    assert read_sign(tmp_path)["doing"] == "thinking"


class Looking(Watching):
    """Looks at the run's last sign of life in every round."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.seen = folder, list[dict[str, Any]]()

    def scored(self, ranking: Any) -> None:
        self.seen.append(read_sign(self.folder))


def test_a_finished_run_leaves_no_sign(desk: Desk) -> None:
    show = Looking(run_folder(desk))
    compress(recipe(desk, method="mi"), show)
    assert len(show.seen) == 3 and names(desk.out) == {"demo-p20", "demo-p60"}
    assert {(sign["rounds"], *sign["models"]) for sign in show.seen} == {(3, "demo-p20", "demo-p60")}
