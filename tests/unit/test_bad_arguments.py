"""Arguments of `fusegpt evaluate` that are wrong."""

from __future__ import annotations

import pytest
from desk import LENGTH, Desk, random_text
from mistakes import Bad, check, table


def evaluated(name: str, key: str, value: str, problem: str, fix: str, **changes: str) -> Bad:
    """`fusegpt evaluate` with an argument changed."""

    def make(desk: Desk) -> list[str]:
        arguments = {"model": "model", "data": "heldout.txt", "length": str(LENGTH)} | changes
        return [
            "evaluate",
            arguments.pop("model"),
            *(part for key, value in arguments.items() for part in (f"--{key}", value)),
        ]

    return Bad(name, make, key, value, problem, fix)


EVALUATIONS = [
    evaluated(
        "no-model", "MODEL", "'nowhere'", "no such folder", "existing folder", model="nowhere"
    ),
    evaluated("no-text", "--data", "'no.txt'", "no such file", "path or glob", data="no.txt"),
    evaluated(
        "short-text", "--length", "12", "the text has . tokens", "more text", data="short.txt"
    ),
    evaluated(
        "long-windows",
        "--length",
        "65",
        "longer than the model's 64 positions",
        "at most 64",
        length="65",
    ),
    evaluated("no-length", "--length", "0", "not 2 or more", "give", length="0"),
    evaluated("no-windows", "--windows", "0", "not 1 or more", "give", windows="0"),
    evaluated("no-replicas", "--replicas", "0", "not 1 or more", "give", replicas="0"),
]


@table(EVALUATIONS)
def test_evaluations(
    bad: Bad, desk: Desk, weight_reads: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (desk.folder / "short.txt").write_text(random_text(3, seed=3))
    check(bad, desk, weight_reads, capsys)
