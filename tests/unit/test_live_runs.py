"""A run in a process of its own, while it lives and after it was killed: what `clean` and `status`
take it for.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from desk import Desk
from left_behind import Capture, aged
from stopped_runs import Watching, contents, recipe, stopped
from test_clean import ALL, verdicts

from fusegpt_ray.cli import main
from fusegpt_ray.pipeline import compress
from fusegpt_ray.run.status import status

KILLED = """
import sys, time
from stopped_runs import Watching
from fusegpt_ray.pipeline import compress
from fusegpt_ray.recipe.recipe import Recipe

class Stuck(Watching):
    def round_begins(self, number, rounds, blocks):
        super().round_begins(number, rounds, blocks)
        if number == 2:
            print("stuck", flush=True)
            time.sleep(600)

compress(Recipe.load(sys.argv[1]), Stuck())
"""


@contextmanager
def at_work(desk: Desk) -> Iterator[subprocess.Popen[str]]:
    """A run in its second round of three; killed at the end of the block."""
    tests = Path(__file__).parents[1]
    path = os.pathsep.join(map(str, [tests / "unit", tests, tests.parent]))
    command = [sys.executable, "-c", KILLED, desk.write(sparsity=[0.2, 0.6])]
    with subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "stuck\n"
            yield process
        finally:
            process.send_signal(signal.SIGKILL)


def test_one_whose_process_lives_here_is_alive_whatever_its_age(
    desk: Desk, capsys: Capture
) -> None:
    """As when it cannot write heartbeats, or the clock was set."""
    with at_work(desk):
        aged(desk.out)
        before = contents(desk.out).keys()
        said = verdicts(desk.out, *ALL, "--age", "1", capsys=capsys)["demo.run"]
        assert said.startswith("kept") and "a live run (" in said
        assert status(str(desk.out))["runs"][0]["state"] == "alive"
        assert contents(desk.out).keys() == before
    aged(desk.out)
    assert status(str(desk.out))["runs"][0]["state"] == "unfinished"


@pytest.mark.parametrize("minutes", ["0.1", "0", "-1", "nan"])
def test_an_age_at_which_live_runs_would_be_dead_is_refused(
    minutes: str, desk: Desk, capsys: Capture
) -> None:
    """Also where no process can be seen, as on another machine."""
    stopped(desk, 2)
    before = contents(desk.out)
    assert main(["clean", str(desk.out), *ALL, "--age", minutes]) == 2
    err = capsys.readouterr().err
    assert f"error: --age = {float(minutes)}: a live run sends a heartbeat only every 20 s" in err
    assert "Fix: give at least 1, in minutes." in err and contents(desk.out) == before


def test_a_killed_run_is_alive_until_nobody_hears_of_it(desk: Desk, capsys: Capture) -> None:
    with at_work(desk) as process:
        pass
    before = contents(desk.out)
    assert verdicts(desk.out, *ALL, capsys=capsys)["demo.run"].startswith("kept")
    (run,) = status(str(desk.out))["runs"]
    assert (run["state"], run["rounds"], run["rounds_done"], run["pid"]) == (
        "alive",
        3,
        1,
        process.pid,
    )
    assert contents(desk.out) == before

    aged(desk.out)
    assert status(str(desk.out))["runs"][0]["state"] == "unfinished"
    assert (
        "can be resumed (rounds done: 1)" in verdicts(desk.out, "--yes", capsys=capsys)["demo.run"]
    )
    show = Watching()
    compress(recipe(desk), show)
    assert show.rounds == [2, 3]
