"""Trackers: what is refused, what a failing one costs, each by its own library if it is here."""

from __future__ import annotations

import os
import posixpath
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import pytest
from desk import Desk
from left_behind import Capture, aged, names
from recipes import merged, mistake
from stopped_runs import Watching

from fusegpt_ray.cli import main
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.tracking import trackers
from fusegpt_ray.tracking.apart import Apart
from fusegpt_ray.tracking.follow import Tracking, followed
from fusegpt_ray.tracking.trackers import TRACKERS, About

BROKEN = """
def scalar(tag, value): pass
class EventsWriter:
    def __init__(self, *names): print("hello", flush=True)
    def write_event(self, event): raise RuntimeError("no room\\nat all")
    def flush(self): raise SystemError("closed")
    def close(self): raise SystemError("closed")
Event = dict
"""
STUCK = """
import atexit, subprocess, time
def init(**settings):
    open("started", "w").write(str(subprocess.Popen(["sleep", "600"]).pid))
    class run:
        project = "https://me:p@ss@host/x"
        def log(values, step): time.sleep(600)
    return run
atexit.register(time.sleep, 600)
"""


def library(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str, *modules: str) -> None:
    """A tracker's library that does as it is told, where a run's own process finds it."""
    for module in modules:
        path = folder / module.replace(".", "/")
        path.mkdir(parents=True, exist_ok=True)
        (path / "__init__.py").write_text(text)
    monkeypatch.syspath_prepend(folder)


def follow(track: str, *losses: float, out: Path, **output: Any) -> Watching:
    show = Watching()
    output = {"uri": str(out), "name": "demo", "track": track, **output}
    asked = Recipe.parse(merged({"output": output}))
    with followed(show, asked, "0" * 64, {}, saved=lambda: True):
        show.training(10, round=1)
        for epoch, loss in enumerate(losses, 1):
            show.epoch(epoch, len(losses), loss)
    return show


def test_a_tracker_that_fails_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    modules = ("event_file_writer", "summary", "proto", "proto.event_pb2")
    names = ["tensorboardX", *(f"tensorboardX.{module}" for module in modules)]
    library(tmp_path / "library", monkeypatch, BROKEN, *names)
    show = follow("tensorboard", 0.5, 0.25, out=tmp_path)
    first, *told = [line for line in show.said if "tensorboard" in line]
    assert first == f"tracked by tensorboard: {tmp_path}/demo.tensorboard"
    failed = "WARNING: tensorboard failed (RuntimeError: no room); the run goes on without it"
    assert told == [failed]
    out, err = capfd.readouterr()
    assert "hello" in err and out == "", "stdout is for results"


def gone(pid: int) -> bool:
    """A dead process that nobody has waited for still has a folder there."""
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def eventually(true: Callable[[], Any]) -> None:
    for _ in range(600):
        if true():
            return
        time.sleep(0.1)
    pytest.fail("it did not happen")


def test_a_tracker_that_never_finishes_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all that it started; and what it says of itself is cleaned of passwords."""
    library(tmp_path / "library", monkeypatch, STUCK, "trackio")
    monkeypatch.chdir(tmp_path)
    show = Watching()
    tracking = Tracking("trackio", about(tmp_path), show.say, lambda: True)
    tracking("epoch", {"round": 1, "epoch": 1, "epochs": 1, "loss": 0.5, "tokens_per_second": 1})
    eventually(lambda: show.said)
    tracking.ends(True)
    tracking.wait(0.5)
    told = [line for line in show.said if "trackio" in line]
    assert told == [
        "tracked by trackio: trackio show --project https://***@host/x",
        "WARNING: trackio still sends after 0 s: not waited for",
    ]
    started = int((tmp_path / "started").read_text())
    eventually(lambda: gone(started))
    tracking.wait(60)
    assert [line for line in show.said if "trackio" in line] == told


KILLED = """
import os, signal
from fusegpt_ray.tracking.apart import Apart
from fusegpt_ray.tracking.trackers import About
Apart("trackio").begin(About("demo", "0", "0", {}, ""))
os.kill(os.getpid(), signal.SIGKILL)
"""
NOTED = """
class init:
    project = "here"
    def __init__(self, **settings): pass
    def finish(self): open("finished", "w").close()
"""


def test_a_tracker_is_closed_when_the_run_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library(tmp_path / "library", monkeypatch, NOTED, "trackio")
    path = os.pathsep.join(sys.path)
    subprocess.run(
        [sys.executable, "-c", KILLED],
        env=os.environ | {"PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,  # which ends with the last of the processes
        timeout=120,
    )
    assert (tmp_path / "finished").exists()


def test_the_same_run_elsewhere_is_another_one_for_trackers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = NOTED.replace("pass", 'print(settings["name"], file=open("names", "a"))')
    library(tmp_path / "library", monkeypatch, code, "trackio")
    monkeypatch.chdir(tmp_path)
    for place, name in (("a", "demo"), ("a", "demo"), ("a", "other"), ("b", "demo")):
        follow("trackio", out=tmp_path / place, name=name)
    first, again, *others = (tmp_path / "names").read_text().split()
    assert first == again and re.fullmatch(r"demo-[0-9a-f]{16}", first)
    assert len({name.rsplit("-")[1] for name in (first, *others)}) == 3


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
    ("track", "key", "fix"),
    [
        ("tensorbord", "output.track", "did you mean tensorboard"),
        (["trackio", "ml-flow"], "output.track.1", "did you mean mlflow"),
        ("comet", "output.track", "use one of these"),
        (7, "output.track", "use one of these"),
    ],
)
def test_an_unknown_tracker_is_refused(track: Any, key: str, fix: str) -> None:
    error = mistake(merged({"output": {"track": track}}))
    assert error.key == key and error.fix == fix
    assert "'tensorboard', 'wandb', 'mlflow' or 'trackio'" in error.problem


def test_curves_go_where_no_run_or_model_is_beside_them(tmp_path: Path, capsys: Capture) -> None:
    event = "events.out.tfevents.1700000000.host.7"
    for name in ("demo", "other", "gone", "other-p20", "noted"):
        (tmp_path / f"{name}.tensorboard").mkdir()
        (tmp_path / f"{name}.tensorboard" / event).write_bytes(bytes(700))
    for name in ("demo.run/identity.json", "other-p20/fusegpt.json", "noted.tensorboard/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def said(*options: str) -> str:
        assert main(["clean", str(tmp_path), *options]) == 0
        lines = capsys.readouterr().out.splitlines()
        return "".join(line.partition("  ")[0] for line in lines if ".tensorboard" in line)

    before = names(tmp_path)
    assert said("--yes") == "kept", "it may still be written"
    aged(tmp_path)
    assert said() == "would remove" and names(tmp_path) == before
    assert said("--yes") == "removed" and names(tmp_path) == before - {"gone.tensorboard"}


def about(place: Path) -> About:
    config = {"fusion": {"epochs": 2}, "seed": 0, "evaluation": {"wiki (a)/": {"windows": 7}}}
    return About("demo", "0123456789abcdef", "f" * 64, config, str(place))


def attempts(name: str, place: Path) -> None:
    """A run that is stopped, and goes on, each with a tracker in its own process."""
    for number, well in enumerate((False, True), 1):
        tracker = Apart(name)
        tracker.begin(about(place))
        tracker.log({"round": number, "perplexity/held (a)/dense": 7.5}, number)
        tracker.close(well)
        tracker.wait()


def test_mlflow_goes_on_with_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tmp_path.as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    attempts("mlflow", tmp_path)
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("fusegpt").experiment_id])
    params = {"fusion.epochs": "2", "seed": "0", "evaluation.wiki _a_/.windows": "7"}
    assert run.data.params == params
    assert run.data.metrics == {"round": 2, "perplexity/held _a_/dense": 7.5}
    assert (run.info.status, run.info.run_name) == ("FINISHED", "demo")
    assert run.data.tags["fusegpt.run"] == "f" * 64
    history = client.get_metric_history(run.info.run_id, "round")
    assert [(item.step, item.value) for item in history] == [(1, 1), (2, 2)]


def test_mlflow_without_parameters_still_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tmp_path.as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    # To MLflow these are one, with two values.
    same = replace(about(tmp_path), config={"a (": 1, "a [": 2})
    tracker = Apart("mlflow")
    assert ", without the recipe (" in tracker.begin(same)
    tracker.log({"round": 1}, 1)
    tracker.close(True)
    tracker.wait()
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("fusegpt").experiment_id])
    assert run.data.metrics == {"round": 1} and run.info.status == "FINISHED"


@pytest.mark.parametrize(
    "name",
    ["a/b", "a//b", "/a", "a/", "../a", "a/./b", "..", "", "wiki (test)", "x" * 249 + "/.b/c"],
)
def test_mlflow_takes_every_name(name: str) -> None:
    key = trackers._mlflow_key(name)
    assert key and posixpath.normpath(key) == key and not key.startswith(("/", ".."))
    assert re.fullmatch(r"[\w ./-]{1,250}", key) and (key == name) == (name == "a/b")


def test_wandb_writes_a_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever run is active in this process, it stays as it is."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    own = wandb.init(project="own", settings=wandb.Settings(console="off", silent=True))
    attempts("wandb", tmp_path)
    assert [*tmp_path.glob("wandb/offline-run-*/run-0123456789abcdef.wandb")]
    assert wandb.run is own
    own.log({"still": 1})
    own.finish()


def test_wandb_without_a_login_is_told_and_asks_nothing(tmp_path: Path) -> None:
    """In a process of its own, for it reads its environment once."""
    pytest.importorskip("wandb")
    code = "from fusegpt_ray.tracking.trackers import *; Wandb(About('a', 'b', 'c', {}, ''))"
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capture
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))  # read when it is imported
    trackio = pytest.importorskip("trackio")
    attempts("trackio", tmp_path)
    assert capfd.readouterr().out == "", "stdout is for results"
    (run,) = trackio.Api().runs("fusegpt")
    assert run.name == "demo-0123456789abcdef"
