"""Two runs in one folder: one that is at work is left alone, one that died is gone on with."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
import time
from typing import Any

import pytest
from desk import Desk
from stopped_runs import Watching, Weights, _undisturbed, published, recipe, run_folder, stopped  # noqa: F401 - fixtures

from fusegpt_ray.errors import UserError
from fusegpt_ray.pipeline import compress


def sign(desk: Desk, **changes: Any) -> dict[str, Any]:
    """A sign of life of another machine's process in the run's folder."""
    told = {"time": time.time(), "host": "elsewhere", "pid": 1, "doing": "round 2/3: scoring 4 blocks"} | changes
    new = run_folder(desk) / "heartbeat.new"
    new.write_text(json.dumps(told))
    new.replace(run_folder(desk) / "heartbeat.json")  # whole, whoever reads it meanwhile
    return told


def test_a_run_that_is_at_work_elsewhere_is_left_alone(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusegpt_ray.run.heartbeat.EVERY", 1.5)
    stopped(desk)
    sign(desk)
    over = threading.Event()

    def go_on() -> None:
        while not over.wait(0.2):
            sign(desk)

    elsewhere = threading.Thread(target=go_on)
    elsewhere.start()
    try:
        with pytest.raises(UserError, match=r"at work on elsewhere \(process 1\): round 2/3"):
            compress(recipe(desk), Watching(), restart=True)
    finally:
        over.set()
        elsewhere.join()
    assert (run_folder(desk) / "round-001.json").exists()


def test_a_run_that_died_elsewhere_is_waited_for_and_gone_on_with(
    desk: Desk, undisturbed: dict[str, Weights], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusegpt_ray.run.heartbeat.EVERY", 0.2)
    stopped(desk)
    sign(desk)
    show = Watching()
    compress(recipe(desk), show)
    assert any("was alive on elsewhere" in line for line in show.said)
    assert published(desk) == undisturbed["at_end"]


def test_a_process_of_this_machine_that_is_gone_is_not_waited_for(desk: Desk) -> None:
    stopped(desk)
    dead = subprocess.Popen(["true"])
    dead.wait()
    sign(desk, host=socket.gethostname(), pid=dead.pid)
    show = Watching()
    compress(recipe(desk), show)
    assert not any("alive" in line for line in show.said)
