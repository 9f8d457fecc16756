"""Two runs in one folder: one that is at work is left alone, one that died is gone on with."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from dataclasses import replace
from typing import Any

import pytest
from desk import Desk
from stopped_runs import (  # noqa: F401 - fixtures
    Watching,
    Weights,
    _undisturbed,
    contents,
    published,
    recipe,
    run_folder,
    stopped,
)

from fusegpt_ray.errors import UserError
from fusegpt_ray.pipeline import compress
from fusegpt_ray.run import lease
from fusegpt_ray.run.lease import Owner, Standing, claim

WAITED_FOR = "a run of this name was alive on"


def owned(desk: Desk, **changes: Any) -> Owner:
    """Another machine's process takes the stopped run's name."""
    facts = {"host": "elsewhere", "machine": "another", "pid": 1} | changes
    owner = replace(Owner.this(), **facts)
    assert claim(str(run_folder(desk)), Standing.look(str(run_folder(desk))), owner)
    return owner


def heartbeat(desk: Desk, owner: Owner) -> None:
    """Its heartbeat."""
    told = {"owner": owner.id, "host": owner.host, "pid": owner.pid, "doing": "round 2/3: scoring"}
    new = run_folder(desk) / "heartbeat.new"
    new.write_text(json.dumps(told | {"time": time.time()}))
    new.replace(run_folder(desk) / "heartbeat.json")  # whole, whoever reads it meanwhile


@pytest.mark.parametrize("restart", [False, True])
def test_a_run_that_is_at_work_elsewhere_is_left_alone(restart: bool, desk: Desk) -> None:
    stopped(desk)
    owner = owned(desk)
    before = contents(run_folder(desk))
    over = threading.Event()

    def go_on() -> None:
        while not over.wait(0.2):
            heartbeat(desk, owner)

    elsewhere = threading.Thread(target=go_on)
    elsewhere.start()
    try:
        told = r"at work on elsewhere \(process 1, since .*\): round 2/3"
        with pytest.raises(UserError, match=told):
            compress(recipe(desk), Watching(), restart=restart)
    finally:
        over.set()
        elsewhere.join()
    after = contents(run_folder(desk))
    assert before.pop("heartbeat.json") != after.pop("heartbeat.json")
    assert before == after


def test_a_run_that_died_elsewhere_is_waited_for_and_gone_on_with(
    desk: Desk, undisturbed: dict[str, Weights], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is waited for whatever time its heartbeat tells: clocks of two machines differ."""
    monkeypatch.setattr(lease, "EXPIRY", 0.5)
    stopped(desk)
    heartbeat(desk, owned(desk))
    show = Watching()
    compress(recipe(desk), show)
    assert any(f"{WAITED_FOR} elsewhere" in line for line in show.said)
    assert published(desk) == undisturbed["at_end"]


def test_a_process_of_this_machine_that_is_gone_is_not_waited_for(desk: Desk) -> None:
    stopped(desk)
    dead = subprocess.Popen(["true"])
    dead.wait()
    here = Owner.this()
    heartbeat(desk, owned(desk, host=here.host, machine=here.machine, pid=dead.pid))
    show = Watching()
    compress(recipe(desk), show)
    assert not any(WAITED_FOR in line for line in show.said)
