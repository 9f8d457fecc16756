"""What a run tells while it works: its metrics.jsonl, the numbers in it, and where they go."""

from __future__ import annotations

import json
import re
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from desk import Desk
from recipes import merged
from stopped_runs import Watching, published, recipe, run_folder, stopped

from fusegpt_ray.errors import StorageError
from fusegpt_ray.pipeline import compress
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.run.budget import SPENT
from fusegpt_ray.run.metrics_log import MetricsLog
from fusegpt_ray.store import storage
from fusegpt_ray.terminal.display import Display
from fusegpt_ray.tracking.follow import followed
from fusegpt_ray.tracking.trackers import About, TensorBoard
from fusegpt_ray.tracking.values import METRICS, Value, measured, step

ROOT = Path(__file__).resolve().parents[2]
Event = dict[str, Any]


def events(file: Path, name: str = "") -> list[Event]:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [line for line in lines if name in ("", line["event"])]


def tracked(desk: Desk, track: list[str] | str = (), **changes: Any) -> Recipe:
    output = {"uri": str(desk.out), "name": "demo", "track": track}
    return recipe(desk, output=output, **changes)


# --- metrics.jsonl ---


@pytest.fixture(scope="module")
def whole(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """A run with all that can be told, drawn by TensorBoard as well."""
    desk = Desk.make(tmp_path_factory.mktemp("whole"), checkpoint("llama"))
    heal = {"batch": 4, "held_out": 4, "looks": 2, "tokens": 96, "repeat": True}
    texts = {"heal": {**heal, "data": str(desk.heldout)}}
    texts["evaluation"] = {"held": {"data": str(desk.heldout)}}
    compress(tracked(desk, "tensorboard", sparsity=0.4, **texts), Watching())
    return desk


def told_of(desk: Desk, name: str = "") -> list[Event]:
    return events(desk.out / "demo-p40/metrics.jsonl", name)


def test_all_that_is_told_is_what_the_manifest_tells(whole: Desk) -> None:
    manifest = json.loads((whole.out / "demo-p40/fusegpt.json").read_text())
    rounds, healing = manifest["rounds"], manifest["healing"]
    assert "metrics.jsonl" in manifest["files"]
    (run,) = told_of(whole, "run")
    assert (run["run"], run["rounds"], run["blocks"]) == (manifest["run"], 2, 5)

    found = told_of(whole, "scores")
    assert [item["scores"] for item in found] == [record["scores"] for record in rounds]
    assert [item["lowest"] for item in found] == manifest["removed"]
    found = told_of(whole, "epoch")
    assert [(item["round"], item["epoch"]) for item in found] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert [item["loss"] for item in found] == [loss for item in rounds for loss in item["losses"]]
    assert all(item["tokens_per_second"] > 0 for item in found)
    found = told_of(whole, "round")
    for key in ("removed", "losses", "seconds", "states_bytes_read"):
        assert [item[key] for item in found] == [record[key] for record in rounds]

    found = told_of(whole, "part")
    assert [item["loss"] for item in found] == healing["losses"]
    assert [item["held_out"] for item in found] == healing["held_out"][1:]
    (healed,) = told_of(whole, "healed")
    assert all(healed[key] == healing[key] for key in ("losses", "held_out", "seconds"))
    dense, last = told_of(whole, "perplexity")
    assert last["perplexity"] == manifest["perplexity"]
    assert dense["perplexity"]["held"]["dense"] == manifest["perplexity"]["held"]["dense"]
    times = [item["time"] for item in told_of(whole)]
    assert times == sorted(times)


KILLED = """
import os, signal, sys, time
from pathlib import Path
from fusegpt_ray.pipeline import compress
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.terminal.display import Display
from fusegpt_ray.run import lease

class Killed(Display):
    def round_begins(self, number, rounds, blocks):
        while number == 2:
            if '"event": "round"' in log.read_text():
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.01)

lease.EVERY = 0.01  # seconds between two heartbeats
log = Path(sys.argv[2])
compress(Recipe.load(sys.argv[1]), Killed())
"""


def test_a_killed_run_goes_on_with_its_metrics(desk: Desk) -> None:
    """Killed in its second round, then stopped in its third, then left to its end."""
    first, second = (run_folder(desk) / f"metrics-00000{number}.jsonl" for number in (1, 2))
    file = desk.write(sparsity=[0.2, 0.6])
    command = [sys.executable, "-c", KILLED, file, str(first)]
    found = subprocess.run(command, capture_output=True, timeout=240)
    assert found.returncode == -signal.SIGKILL, found.stderr.decode()
    assert [item["round"] for item in events(first, "round")] == [1]
    before = first.read_bytes()

    stopped(desk, 3)
    assert events(second)[-1]["error"] == "KeyboardInterrupt"
    before += second.read_bytes()

    compress(recipe(desk), Watching())
    after = desk.out / "demo-p60/metrics.jsonl"
    assert after.read_bytes().startswith(before)
    assert [item["round"] for item in events(after, "round")] == [1, 2, 3]
    assert len({item["run"] for item in events(after, "run")}) == 1
    assert not run_folder(desk).exists()


def test_a_log_that_cannot_be_written_costs_no_run(desk: Desk) -> None:
    (run_folder(desk) / "metrics-000001.jsonl").mkdir(parents=True)
    compress(recipe(desk, method="mi", sparsity=0.2), Watching())
    assert events(desk.out / "demo-p20/metrics.jsonl", "round")


def test_a_log_is_valid_json_and_written_only_when_there_is_news(tmp_path: Path) -> None:
    log, file = MetricsLog(), tmp_path / "metrics-000007.jsonl"
    log.begin(str(tmp_path), 7)
    log("epoch", {"loss": float("nan"), "losses": (1.5, float("inf"))})
    log.write()
    (line,) = events(file)
    assert (line["event"], line["loss"], line["losses"]) == ("epoch", None, [1.5, None])
    file.unlink()
    log.write()
    assert not file.exists(), "nothing is new"
    log("round", {"round": 1})
    log.write()
    assert [item["event"] for item in events(file)] == ["epoch", "round"]


def test_on_a_disk_each_event_is_there_at_once_as_long_as_the_name_is_ours(tmp_path: Path) -> None:
    log, file, others = MetricsLog(), tmp_path / "metrics-000001.jsonl", False

    def fence() -> None:
        if others:
            raise PermissionError("another run's by now")

    log("run", {})
    log.begin(str(tmp_path), 1, fence)
    log("round", {"round": 1})
    assert [item["event"] for item in events(file)] == ["run", "round"]
    with open(file, "ab") as left:
        left.write(b'{"a write that failed half')
    log("round", {"round": 2})
    assert [item.get("round") for item in events(file)] == [None, 1, 2]
    others = True
    log("round", {"round": 3})
    others = False
    log.end()
    log("round", {"round": 4})
    assert [item.get("round") for item in events(file)] == [None, 1, 2]


def test_earlier_events_come_first_or_their_loss_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 3):  # the third is a newer owner's
        (tmp_path / f"metrics-00000{number}.jsonl").write_text(f'{{"event": "of {number}"}}\n')
    said: list[str] = []
    log = MetricsLog()
    log.begin(str(tmp_path), 2)
    log("round", {"round": 1})
    assert log.whole(said.append).startswith(b'{"event": "of 1"}\n{"time": ') and said == []

    def fails(uri: str, limit: int | None = None) -> bytes:
        raise StorageError(uri, "the store is down", "")

    monkeypatch.setattr(storage, "read", fails)
    (line,) = log.whole(said.append).splitlines()
    assert json.loads(line)["event"] == "round"
    assert len(said) == 1 and "the store is down" in said[0]


def test_a_line_that_an_earlier_process_could_not_finish_tears_no_other(tmp_path: Path) -> None:
    """Not even where it is all that there is."""
    (tmp_path / "metrics-000001.jsonl").write_text('{"event": "run"}\n{"event": "rou')
    (tmp_path / "metrics-000002.jsonl").write_text('{"eve')
    log = MetricsLog()
    log.begin(str(tmp_path), 3)
    log("round", {"round": 1})
    told = [json.loads(line)["event"] for line in log.whole(print).splitlines()]
    assert told == ["run", "round"]


# --- numbers ---


def test_a_run_gives_every_number_that_has_a_name(whole: Desk) -> None:
    """From what was read back: the values are JSON."""
    found = [item for line in told_of(whole) for item in measured(line["event"], line)]
    # The last event is told when the model, with its metrics, is finished.
    done = {"removed": 2, "bytes": 700, "seconds": 1.5, "retries": 2}
    found += measured("published", done)
    found += measured(SPENT, {"hours": 2.0, "gpu_hours": 1.0, "money": 3.0})
    assert {item.name for item in found} == METRICS.keys()
    assert all(tuple(item.labels) == METRICS[item.name].labels for item in found)
    assert measured("part", {"loss": float("inf"), "tokens_per_second": 2.0}) == [
        Value("tokens_per_second", 2.0, {"of": "group"})
    ]


def test_epochs_are_counted_through(whole: Desk) -> None:
    assert [step("epoch", item) for item in told_of(whole, "epoch")] == [1, 2, 3, 4]
    assert [step("perplexity", item) for item in told_of(whole, "perplexity")] == [0, 2]


# --- trackers ---


def scalars(folder: Path) -> Iterator[tuple[str, int, float]]:
    """What TensorBoard's files hold: records of a length, a checksum, data and a checksum."""
    from tensorboardX.proto.event_pb2 import Event as Record

    for file in sorted(folder.iterdir()):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            record = Record.FromString(data[at + 12 : at + 12 + size])
            at += 16 + size
            yield from ((item.tag, record.step, item.simple_value) for item in record.summary.value)


def test_tensorboard_draws_the_same_numbers(whole: Desk) -> None:
    pytest.importorskip("tensorboardX")
    found = {(tag, at): value for tag, at, value in scalars(whole.out / "demo.tensorboard")}
    for line in told_of(whole):
        for item in measured(line["event"], line):
            value = found[item.tag, step(line["event"], line)]
            assert value == pytest.approx(item.value, rel=1e-6)
    assert ("perplexity/held/healed", 2) in found and ("loss/demo-p40", 1) in found


def test_each_copy_for_tensorboard_is_whole(tmp_path: Path) -> None:
    """Also after one that failed."""
    pytest.importorskip("tensorboardX")
    tracker = TensorBoard(About("demo", "0", "0", {}, str(tmp_path)))
    folder = tmp_path / "demo.tensorboard"
    for number in (1, 2):
        tracker.log({"round": number, "loss": 0.5}, number)
        found = [(tag, at) for tag, at, _ in scalars(folder)]
        assert found[-2:] == [("round", number), ("loss", number)]
    folder.rename(tmp_path / "before")
    folder.touch()
    with pytest.raises(OSError, match=r"demo\.tensorboard"):
        tracker.log({"round": 3}, 3)
    folder.unlink()
    tracker.close(True)
    assert [at for tag, at, _ in scalars(folder) if tag == "round"] == [1, 2, 3]


def test_tracking_changes_no_byte(desk: Desk, tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    compress(recipe(desk), Watching())
    plain = published(desk)
    desk.out.rename(tmp_path / "plain")
    desk.out.mkdir()
    (desk.out / "demo.tensorboard").touch()  # and it cannot even be written
    show = Watching()
    compress(tracked(desk, ["tensorboard", "tensorboard"]), show)
    assert published(desk) == plain
    (told,) = [line for line in show.said if line.startswith("WARNING")]
    assert told.startswith("WARNING: tensorboard failed (") and "the run goes on" in told


def test_a_run_that_leaves_nothing_leaves_no_curves(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboardX")
    monkeypatch.setattr("fusegpt_ray.tracking.follow.IMPATIENCE", 60.0)
    asked = tracked(desk, "tensorboard", evaluation={"held": {"data": str(desk.heldout)}})
    show, heard = Watching(stop=1), list[str]()
    with pytest.raises(KeyboardInterrupt), show.heard(lambda event, _: heard.append(event)):
        compress(asked, show)
    assert "perplexity" in heard and not [line for line in show.said if "WARNING" in line]
    assert not desk.out.exists()


def test_nobody_hears_after_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    show, heard = Display(), list[Any]()
    asked = Recipe.parse(merged({}))

    def hears(event: str, values: Any) -> None:
        heard.append((event, values))

    with (
        pytest.raises(KeyboardInterrupt),
        followed(show, asked, "0" * 64, {}, hears, saved=lambda: True),
    ):
        raise KeyboardInterrupt
    show.stage("later")
    assert [event for event, _ in heard] == ["run", "ended"]
    assert heard[-1][1] == {"error": "KeyboardInterrupt"}


# --- Ray ---


def test_the_dashboard_draws_what_ray_is_told() -> None:
    """Each metric on a panel, by the name that Prometheus knows it by, and no other."""
    dashboard = json.loads((ROOT / "cluster/grafana.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    ends = {"gauge": "", "counter": "_total"}
    known = {f"ray_fusegpt_{name}{ends[item.kind]}": item for name, item in METRICS.items()}
    drawn = {name for text in asked for name in re.findall(r"ray_fusegpt_\w+", text)}
    assert drawn == known.keys()
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            (name,) = re.findall(r"ray_fusegpt_\w+", target["expr"])
            assert 'run=~"$run"' in target["expr"], "the dashboard's choice of runs"
            labels = {"run", *known[name].labels}
            assert {*re.findall(r"{{(\w+)}}", target["legendFormat"])} <= labels
            grouped = re.search(r"by \(([^)]*)\)", target["expr"])
            assert not grouped or {*grouped[1].split(", ")} <= labels
    (run,) = [item for item in dashboard["templating"]["list"] if item["name"] == "run"]
    assert run["query"] == "label_values(ray_fusegpt_round, run)"
