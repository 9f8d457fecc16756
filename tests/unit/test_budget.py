"""A run that stops because it has spent what it may, and the same command with more."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
from desk import Desk
from stopped_runs import (  # noqa: F401 - fixtures
    Watching,
    Weights,
    _undisturbed,
    published,
    recipe,
    run_folder,
)

from fusegpt_ray.cli import main
from fusegpt_ray.errors import BudgetSpent
from fusegpt_ray.pipeline import compress
from fusegpt_ray.recipe.cluster_section import Cluster
from fusegpt_ray.run import budget
from fusegpt_ray.run.budget import Budget
from fusegpt_ray.workers.local import LocalWorkers

HOUR = 3600.0


class Clock:
    """Hours go by where a test says so, beside the seconds that it takes."""

    def __init__(self) -> None:
        self.passed = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.passed


@pytest.fixture(name="clock")
def _clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(budget, "monotonic", clock.monotonic)
    return clock


class TakesAnHour(Watching):
    """An hour goes by where a thing that is shown begins with `text`."""

    def __init__(self, clock: Clock, *texts: str) -> None:
        super().__init__()
        self.clock, self.texts = clock, texts

    def say(self, text: str) -> None:
        super().say(text)
        self.clock.passed += HOUR * text.startswith(self.texts)


def cluster(**keys: Any) -> dict[str, Any]:
    return {"engine": "local", "checkpoint_minutes": 0, **keys}


def spent_after(desk: Desk, clock: Clock, text: str, hours: float = 0.5) -> str:
    """What is said by a run that has spent its budget once `text` has been shown."""
    clock.passed = 0.0
    with pytest.raises(BudgetSpent) as stop:
        compress(recipe(desk, cluster=cluster(max_hours=hours)), TakesAnHour(clock, text))
    assert not list(desk.out.glob("*/fusegpt.json"))
    return str(stop.value)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("round 2/3: scoring", {"sums-002.json", "round-001.json"}),
        ("round 2: fusing", {"scores-002.json", "blocks/round-002/checkpoints/checkpoint.json"}),
        ("  epoch 2/2", {"scores-001.json", "blocks/round-001/checkpoints/checkpoint.json"}),
    ],
)
def test_a_run_stops_at_the_next_thing_saved_and_goes_on_to_the_same_bytes(
    text: str, left: set[str], desk: Desk, clock: Clock, undisturbed: dict[str, Weights]
) -> None:
    folder = run_folder(desk)
    told = spent_after(desk, clock, text)
    assert told.startswith("cluster.max_hours = 0.5 is spent: 1.00 hours by now; what is saved")
    assert all((folder / name).exists() for name in left)
    assert not (folder / "round-002.json").exists()
    show, clock.passed = Watching(), 0.0
    compress(recipe(desk, cluster=cluster(max_hours=2)), show)
    assert published(desk) == undisturbed["at_end"]
    assert any("going on after" in line for line in show.said)
    manifest = json.loads((desk.out / "demo-p60/fusegpt.json").read_text())
    assert manifest["spent"]["seconds"] == pytest.approx(HOUR, abs=120)
    read = sum(one["bytes_read"] + one["states_bytes_read"] for one in manifest["rounds"])
    assert manifest["spent"]["bytes_read"] == read > 0 < manifest["spent"]["bytes_written"]
    assert manifest["spent"]["gpu_seconds"] == 0


def test_the_same_budget_is_refused_before_workers_start(
    desk: Desk, clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spent_after(desk, clock, "round 2/3: scoring")
    with monkeypatch.context() as patch:
        patch.setattr(LocalWorkers, "__enter__", lambda self: pytest.fail("workers started"))
        command = ["compress", desk.write(sparsity=[0.2, 0.6], cluster=cluster(max_hours=1))]
        assert main(command) == 3
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == (
        f"stopped: cluster.max_hours = 1 is spent: 1.00 hours by now; what is saved stays in "
        f"{run_folder(desk)}, and the same command goes on from there with a larger "
        "cluster.max_hours"
    )
    assert main([*command, "--restart"]) == 0, "the run that is forgotten has spent it"


def test_what_earlier_sessions_spent_counts(desk: Desk, clock: Clock) -> None:
    spent_after(desk, clock, "round 2/3: scoring")
    told = spent_after(desk, clock, "round 3/3: scoring", hours=1.5)
    assert "is spent: 2.00 hours by now" in told
    clock.passed = 0.0
    compress(recipe(desk))  # no limit
    manifest = json.loads((desk.out / "demo-p60/fusegpt.json").read_text())
    assert manifest["spent"]["seconds"] == pytest.approx(2 * HOUR, abs=240)


def test_gpus_cost_their_price_for_as_long_as_they_are_held(tmp_path: Path, clock: Clock) -> None:
    """4 GPUs at 2.5 an hour: 10 an hour, beside the 6 GPU-hours of an earlier session."""
    heartbeat = {"time": 1.0, "spent": {"seconds": 3 * HOUR, "gpu_seconds": 6 * HOUR}}
    (tmp_path / "heartbeat.json").write_text(json.dumps(heartbeat))
    rented = Cluster(gpu_hour_price=2.5, max_cost=25)
    found = Budget(rented, str(tmp_path), gpus=4)
    clock.passed += 0.9 * HOUR
    found.check()
    clock.passed += 0.2 * HOUR
    spent = found.spent
    assert spent.pop("money") == pytest.approx(26, abs=0.03)
    assert spent.pop("by_gpu") == {"": spent["gpu_seconds"]}
    hours = {key: value / HOUR for key, value in spent.items()}
    assert hours == pytest.approx({"seconds": 4.1, "gpu_seconds": 10.4}, abs=0.01)
    told = {"hours": 4.1, "gpu_hours": 10.4, "money": 26}  # to Prometheus
    assert found.told == pytest.approx(told, abs=0.01)
    with pytest.raises(BudgetSpent, match=r"cluster\.max_cost = 25 is spent: 26.00 by now"):
        found.check()
    found.forget()
    assert found.spent["seconds"] < 60, "the hours are forgotten"


@pytest.mark.parametrize(
    "told", [None, 3, {"gpu_seconds": 5}, {"seconds": "5"}, {"seconds": -1}, {"seconds": math.nan}]
)
def test_a_heartbeat_that_tells_nothing_sound_counts_nothing(told: object, tmp_path: Path) -> None:
    (tmp_path / "heartbeat.json").write_text(json.dumps({"time": 1.0, "spent": told}))
    assert Budget(Cluster(), str(tmp_path), began=None).spent["seconds"] == 0


def test_a_cost_without_a_price_is_a_mistake(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["validate", desk.write(cluster=cluster(max_cost=10))]) == 2
    assert "cluster.max_cost = 10.0: nobody knows what a GPU costs" in capsys.readouterr().err
