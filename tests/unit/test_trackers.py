"""Trackers: what is refused, what a failing one costs, each by its own library if it is here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import pytest
from desk import Desk
from left_behind import Capture
from recipes import merged, mistake
from stopped_runs import Watching

from fusegpt_ray.cli import main
from fusegpt_ray.recipe import Recipe
from fusegpt_ray.tracking import trackers
from fusegpt_ray.tracking.follow import followed
from fusegpt_ray.tracking.trackers import TRACKERS, About


class Broken:
    """A library that raises whatever it likes."""

    where = "nowhere"
    logged = 0

    def __init__(self, about: About) -> None:
        self.about = about

    def log(self, values: dict[str, float], step: int) -> None:
        Broken.logged += 1
        raise RuntimeError(f"no room for {values}\nat all")

    def close(self, well: bool) -> None:
        raise SystemError("closed")


def test_a_tracker_that_fails_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRACKERS, "wandb", Broken)
    show, heard = Watching(), list[str]()
    asked = Recipe.parse(merged({"output": {"track": "wandb"}}))
    with followed(show, asked, "0" * 64, {}, lambda event, values: heard.append(event)):
        show.training(10, round=1)
        show.epoch(1, 2, 0.5)
        show.epoch(2, 2, 0.25)
    assert heard == ["run", "epoch", "epoch"] and Broken.logged == 2
    assert show.said[0] == "tracked by wandb: nowhere"
    (told,) = [line for line in show.said if line.startswith("WARNING")]
    assert re.search(r"wandb failed \(RuntimeError: no room for .*'loss/group': 0\.5", told)


@pytest.mark.parametrize("name", TRACKERS)
def test_a_library_that_is_missing_is_told_before_the_work(
    name: str,
    desk: Desk,
    weight_reads: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    (desk.folder / "wandb").mkdir()  # where the library writes, not the library

    def here(package: str) -> Any:
        return PathFinder.find_spec(package, [str(desk.folder)])

    monkeypatch.setattr(trackers, "find_spec", here)
    assert here("wandb") is not None
    output = {"uri": str(desk.out), "name": "demo", "track": [name]}
    assert main(["compress", desk.write(output=output)]) == 2
    said = capsys.readouterr().err
    assert f"output.track = '{name}'" in said and "is not installed" in said
    assert f"pip install 'fusegpt-ray[{name}]'" in said
    assert weight_reads == [] and not desk.out.exists()


@pytest.mark.parametrize(
    ("track", "fix"),
    [
        ("tensorbord", "did you mean tensorboard"),
        (["trackio", "ml-flow"], "did you mean mlflow"),
        ("comet", "change output.track.0"),
        (7, "change output.track.0"),
    ],
)
def test_an_unknown_tracker_is_refused(track: Any, fix: str) -> None:
    error = mistake(merged({"output": {"track": track}}))
    assert error.key.startswith("output.track.") and error.fix == fix
    assert "'tensorboard', 'wandb', 'mlflow' or 'trackio'" in error.problem


def about(place: Path) -> About:
    return About("demo", "0123456789abcdef", {"fusion": {"epochs": 2}, "seed": 0}, str(place))


def attempts(name: str, place: Path) -> None:
    """A run that is stopped, and goes on."""
    for number, well in enumerate((False, True), 1):
        tracker = TRACKERS[name](about(place))
        tracker.log({"round": number, "perplexity/held (a)/dense": 7.5}, number)
        tracker.close(well)


def test_mlflow_goes_on_with_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tmp_path.as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    attempts("mlflow", tmp_path)
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("fusegpt").experiment_id])
    assert run.data.params == {"fusion.epochs": "2", "seed": "0"}
    assert run.data.metrics == {"round": 2, "perplexity/held _a_/dense": 7.5}
    assert (run.info.status, run.info.run_name) == ("FINISHED", "demo")
    history = client.get_metric_history(run.info.run_id, "round")
    assert [(item.step, item.value) for item in history] == [(1, 1), (2, 2)]


def test_wandb_writes_a_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    attempts("wandb", tmp_path)
    assert [*tmp_path.glob("wandb/offline-run-*/run-0123456789abcdef.wandb")]


def test_wandb_without_a_login_is_told_and_asks_nothing(tmp_path: Path) -> None:
    """In a process of its own, for it reads its environment once."""
    pytest.importorskip("wandb")
    code = "import sys; from fusegpt_ray.tracking.trackers import *; Wandb(About('a', 'b', {}, ''))"
    hidden = ("WANDB_MODE", "WANDB_API_KEY")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}
    found = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        timeout=120,
    )
    assert b"not logged in: run `wandb login`, or set WANDB_MODE=offline" in found.stderr


def test_trackio_goes_on_with_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))  # read when it is imported
    trackio = pytest.importorskip("trackio")
    attempts("trackio", tmp_path)
    assert capsys.readouterr().out == "", "stdout is for results"
    (run,) = trackio.Api().runs("fusegpt")
    assert run.name == "demo-0123456789abcdef"
