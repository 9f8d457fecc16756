"""Output folders that are in the way or may not be written; and where a run says that it failed."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from desk import Desk
from mistakes import Bad, check, table
from stopped_runs import stopped

from fusegpt_ray.cli import main

# --- the output folder ---


def finished_before(desk: Desk) -> None:
    assert main(["compress", desk.write(method="mi")]) == 0


def stopped_before(desk: Desk) -> list[str]:
    """A run that was stopped after its first round; then another rate."""
    stopped(desk, sparsity=0.4)
    return ["compress", desk.write(), "--set", "fusion.learning_rate=0.002"]


def in_the_way(name: str) -> Callable[[Desk], None]:
    def make(desk: Desk) -> None:
        desk.out.mkdir()
        (desk.out / name).write_text("a file of the user's")

    return make


def linked(target: str) -> Callable[[Desk], None]:
    """The output folder is a link."""
    return lambda desk: desk.out.symlink_to(target)


def closed(desk: Desk) -> None:
    """The output folder may be read only."""
    desk.out.mkdir(mode=0o500)


OUTPUTS = [
    Bad("its-own-link", linked("out"), "output.uri", "out'", "cannot be written", "check the path"),
    Bad(
        "a-link-to-a-file",
        linked("heldout.txt"),
        "output.uri",
        "out'",
        "cannot be written",
        "check the path",
    ),
    Bad(
        "a-link-to-a-device",
        linked("/dev/null"),
        "output.uri",
        "out'",
        "cannot be written",
        "check the path",
    ),
    Bad(
        "may-not-be-written",
        closed,
        "output.uri",
        "out'",
        "cannot be written .*ermission",
        "your rights",
    ),
    Bad(
        "finished",
        finished_before,
        "output.name",
        "'demo'",
        "a finished model is already at .*demo-p40",
        "another output.name",
    ),
    Bad(
        "stopped",
        stopped_before,
        "output.name",
        "'demo'",
        r"recipe.fusion.learning_rate = .* 0.002",
        "--restart, which forgets it",
    ),
    Bad(
        "a-file-for-the-model",
        in_the_way("demo-p40"),
        "output.name",
        "'demo'",
        "demo-p40",
        "another",
    ),
    Bad(
        "a-file-for-the-run", in_the_way("demo.run"), "output.name", "'demo'", "demo.run", "another"
    ),
]


@table(OUTPUTS)
def test_outputs(
    bad: Bad, desk: Desk, weight_reads: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    check(bad, desk, weight_reads, capsys)


# --- a run that fails ---


def test_a_run_that_fails_says_where(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    """The same command would fail again, so nothing is said of it; another recipe may follow."""
    assert main(["compress", desk.write(), "--set", "fusion.learning_rate=1e30"]) == 1
    stdout, stderr = capsys.readouterr()
    end = stderr.splitlines()[-2:]
    assert stdout == "" and not list(desk.out.glob("*/fusegpt.json"))
    assert re.fullmatch(
        "failed: FloatingPointError: the training loss became .* lower fusion.learning_rate",
        end[0],
    )
    assert end[1] == f"stopped in round 1 of 2; 0 are finished in {desk.out / 'demo.run'}"
    assert main(["compress", desk.write()]) == 0
