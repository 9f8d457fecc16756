"""`fusegpt status` on what real runs leave."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
from desk import Desk
from left_behind import Capture, _out, _stopped_desk, aged, alive, half_model  # noqa: F401 - fixtures

from fusegpt_ray.cli import main
from fusegpt_ray.run.status import status


def test_status_as_json(out: Path, capsys: Capture) -> None:
    half_model(out, "demo-p20")
    aged(out, seconds=7200)
    record = json.loads((out / "demo.run/round-001.json").read_text())["body"]["round"]
    assert main(["status", str(out), "--json"]) == 0
    stdout = capsys.readouterr().out
    result = json.loads(stdout)
    assert stdout.count("\n") == 1 and set(result) == {"uri", "models", "runs", "unfinished"}
    assert result["unfinished"] == ["demo-p20"]
    (model,) = result["models"]
    assert (
        model["name"],
        model["blocks"],
        model["dense_blocks"],
        model["sparsity"],
        model["method"],
    ) == (
        "other-p20",
        4,
        5,
        0.2,
        "mi",
    )
    (run,) = result["runs"]
    seconds = sum(record["seconds"].values())
    assert run["spent"]["seconds"] >= seconds and run["spent"]["gpu_seconds"] == 0
    assert run["heartbeat_age"] == pytest.approx(7200, abs=600)
    assert {
        key: run[key]
        for key in run
        if key not in ("heartbeat_age", "host", "pid", "doing", "spent")
    } == {
        "name": "demo",
        "uri": str(out / "demo.run"),
        "state": "unfinished",
        "ended": "KeyboardInterrupt",
        "rounds": 3,
        "rounds_done": 1,
        "epochs_saved": 0,
        "removed": [record["removed"]],
        "last_loss": record["loss_last"],
        "round_seconds": round(seconds, 1),
        "seconds_left": round(2 * seconds, 1),
    }


def test_a_watch_ends_when_no_run_is_at_work(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """It looks again after each pause, in the second of which the run ends."""
    alive(out)
    paused: list[float] = []

    def pause(seconds: float) -> None:
        paused.append(seconds)
        if len(paused) == 2:
            aged(out, seconds=7200)

    monkeypatch.setattr(time, "sleep", pause)
    assert main(["status", str(out), "--json", "--watch", "--every", "7"]) == 0
    told = [json.loads(line)["runs"][0]["state"] for line in capsys.readouterr().out.splitlines()]
    assert told == ["alive", "alive", "unfinished"] and paused == [7, 7]
    assert main(["status", str(out), "--watch"]) == 0
    assert capsys.readouterr().out.count("other-p20") == 1 and len(paused) == 2
    paused.clear()
    alive(out)
    assert main(["status", str(out), "--watch", "--quiet"]) == 0
    assert capsys.readouterr().out.count("other-p20") == 1 and len(paused) == 2


def test_status_of_one_run_or_model(out: Path) -> None:
    everything = status(str(out))
    assert status(str(out / "other-p20"))["models"] == everything["models"]
    assert status(str(out / "other-p20"))["runs"] == []
    assert status(str(out / "demo.run"))["runs"][0]["removed"] == everything["runs"][0]["removed"]


def test_status_as_tables(
    stopped_desk: Desk, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    manifest = out / "other-p20/fusegpt.json"
    numbers = {"heldout": {"dense": 10.5, "dropped": 12.25, "fused": 11.75, "length": 12}}
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"perplexity": numbers}))
    shutil.copytree(out / "other-p20", out / "broken-p20")
    (out / "broken-p20/fusegpt.json").write_text("{")
    alive(out)
    assert main(["status", str(out)]) == 0
    text = capsys.readouterr().out
    rows = [line.split("│")[1:-1] for line in text.splitlines() if "other-p20" in line]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["other-p20", "4 of 5", "20.0%"],
        ["other-p20", "heldout", "10.50", "12.25", "11.75", "29%"],
    ]
    (run,) = [line for line in text.splitlines() if "demo" in line]
    assert (
        "alive, heard of 1 min" in run and "round 2/3: scoring 4 blocks" in run and "1 of 3" in run
    )
    assert "broken-p20: fusegpt.json is not JSON" in text


def test_nothing_is_cut_in_a_log_of_80_columns(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Names of models and runs, perplexities and the names of stages are wrapped."""
    monkeypatch.setenv("COLUMNS", "80")
    long = "tiny-long-mi-linear-of-a-family-p12.5"
    numbers = {"dense": 34.78, "dropped": 38.58, "repaired": 35.89, "fused": 35.58, "healed": 35.46}
    shutil.copytree(out / "other-p20", out / long)
    manifest = json.loads((out / long / "fusegpt.json").read_text())
    told = json.dumps(manifest | {"perplexity": {"heldout": numbers | {"length": 12}}})
    (out / long / "fusegpt.json").write_text(told)
    shutil.move(out / "demo.run", out / f"{long}.run")
    assert main(["status", str(out)]) == 0
    text = capsys.readouterr().out
    assert "…" not in text and max(map(len, text.splitlines())) <= 80

    for row in ("34.78", "38.58", "35.89", "35.58", "35.46"):
        assert row in text
    assert text.count("repaired") == 1


def test_status_counts_only_records_that_can_be_trusted(out: Path) -> None:
    record = out / "demo.run/round-001.json"
    record.write_bytes(record.read_bytes().replace(b'"removed":', b'"removed":1'))
    (run,) = status(str(out))["runs"]
    assert (run["rounds_done"], run["removed"], run["last_loss"], run["seconds_left"]) == (
        0,
        [],
        None,
        None,
    )


def test_status_of_nothing(tmp_path: Path, capsys: Capture) -> None:
    assert main(["status", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"no models and no runs in {tmp_path}\n"
    (tmp_path / "empty.run").mkdir()
    for uri in (tmp_path / "nowhere", tmp_path / "empty.run", "nosuchprotocol://bucket"):
        assert main(["status", str(uri)]) == 2
        assert str(uri) in capsys.readouterr().err


def test_what_a_protocol_tells_besides_is_no_nonsense(out: Path, capsys: Capture) -> None:
    """Published texts begin with one token in all, and mixtures have parts."""
    file = out / "other-p20/fusegpt.json"
    manifest = json.loads(file.read_text())
    row = {"dense": 30.0, "dropped": 40.0, "windows": 2, "length": 16, "data": "wikitext2"}
    more = {"bos": False, "bos_once": True, "warning": "short", "parts": []}
    file.write_text(json.dumps(manifest | {"perplexity": {"wikitext2": row | more}}))
    (model,) = status(str(out))["models"]
    assert "problem" not in model and model["perplexity"]["wikitext2"]["dropped"] == 40
