"""`--quiet`, which every verb has: errors and the result, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from desk import Desk
from left_behind import aged, half_model

from fusegpt_ray.cli import VERBS, main

Capture = pytest.CaptureFixture[str]


def test_every_verb_has_it_and_json() -> None:
    for verb in (verb for verbs in VERBS.values() for verb in verbs):
        options = {option for parameter in verb.params for option in parameter.opts}
        assert {"--quiet", "--json"} <= options, verb.name


def test_nothing_but_the_result_is_said(
    checkpoint: Callable[[str], Path], tmp_path: Path, capsys: Capture
) -> None:
    """From the first recipe to the last look. A run that died is listed, without advice."""
    desk = Desk.make(tmp_path, checkpoint("llama"))
    recipe, first = desk.write(method="last"), str(tmp_path / "first.yaml")
    report = str(tmp_path / "report.html")
    capsys.readouterr()  # what saving the model said

    def said(*command: str) -> str:
        assert main([*command, "--quiet"]) == 0, command
        stdout, stderr = capsys.readouterr()
        assert stderr == "", command
        return stdout

    assert said("init", str(desk.model), "--output", first) == f"{first}\n"
    assert said("validate", recipe) == ""
    assert "2 blocks go" in said("plan", recipe)
    assert said("compress", recipe) == ""
    model = str(desk.out / "demo-p40")
    (desk.out / "demo-p40" / "notes.txt").write_text("mine")
    assert said("verify", model) == ""
    assert said("report", model, "--output", report) == f"{report}\n"
    assert "demo-p40" in said("status", str(desk.out))
    assert said("clean", str(desk.out)) == ""
    half_model(desk.out, "demo-p60")
    aged(desk.out)
    listed = said("clean", str(desk.out)).splitlines()
    assert [line.split()[:2] for line in listed] == [["would", "remove"]] * 2
    assert "demo-p60" in listed[0] and "demo.run" in listed[1]


def test_mistakes_and_damage_are_said_all_the_same(desk: Desk, capsys: Capture) -> None:
    assert main(["validate", desk.write(sparsity=2), "--quiet"]) == 2
    assert "sparsity" in capsys.readouterr().err
    assert main(["compress", desk.write(method="last"), "--quiet"]) == 0
    (desk.out / "demo-p40" / "config.json").write_text("{}")
    assert main(["verify", str(desk.out / "demo-p40"), "--quiet"]) == 1
    assert "config.json" in capsys.readouterr().out
