"""`FUSEGPT_LOG=json`: what a run shows, for those who collect logs."""

from __future__ import annotations

import json

import pytest
from desk import Desk

from fusegpt_ray.cli import main

Capture = pytest.CaptureFixture[str]


def test_a_terminal_gets_the_same_lines(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """A pod may have one, and many an environment says that it has. No bar, and no line fewer."""
    monkeypatch.setenv("FUSEGPT_LOG", "json")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert main(["compress", desk.write()]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    said = [line["message"] for line in lines if line["event"] == "said"]
    assert "evaluating and publishing demo-p40" in said and "  epoch 1/2  loss" in str(said)


def test_everything_is_a_line_of_json_with_its_place(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("FUSEGPT_LOG", "json")
    assert main(["compress", desk.write()]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    keys = {"time", "event", "run", "run_id", "round", "stage"}
    assert all(keys <= line.keys() for line in lines)
    events = [line["event"] for line in lines]
    assert {"drawn", "run", "said", "scores", "epoch", "round", "published"} <= set(events)
    assert [line["round"] for line in lines if line["event"] == "epoch"] == [1, 1, 2, 2]
    assert {line["run"] for line in lines} == {"demo"}
    known, told = (
        events.index("drawn"),
        json.loads(next(desk.out.glob("*/fusegpt.json")).read_text()),
    )
    assert {line["run_id"] for line in lines[:known]} == {""}
    assert {line["run_id"] for line in lines[known:]} == {told["run"]}
    (fusing,) = [line for line in lines if str(line.get("message")).startswith("round 2: fusing")]
    assert (fusing["round"], fusing["stage"]) == (2, fusing["message"])


def test_another_format_is_refused(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("FUSEGPT_LOG", "xml")
    assert main(["compress", desk.write()]) == 2
    assert "FUSEGPT_LOG = 'xml': not a format of logs" in capsys.readouterr().err
    assert not desk.out.exists()
