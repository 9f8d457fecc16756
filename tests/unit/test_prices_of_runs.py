"""What runs cost by a table of prices: a run that goes on on other GPUs, a family on several kinds,
and a GPU that has no price.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest
from desk import Desk
from stopped_runs import Watching, run_folder
from stopped_runs import recipe as of_desk
from test_budget import HOUR, Clock, TakesAnHour, _clock, cluster  # noqa: F401 - a fixture
from test_gpu_prices import A100, H100, LABEL, TABLE

from fusegpt_ray.cli import main
from fusegpt_ray.compressing import compression
from fusegpt_ray.distributed import cluster as on_ray
from fusegpt_ray.distributed.cluster import RayWorkers
from fusegpt_ray.errors import BudgetSpent, UserError
from fusegpt_ray.model.source import Source
from fusegpt_ray.pipeline import compress
from fusegpt_ray.recipe.cluster_section import Cluster
from fusegpt_ray.recipe.text_sections import Text
from fusegpt_ray.reporting import page
from fusegpt_ray.reporting.facts import facts, of_manifest
from fusegpt_ray.run.budget import Budget
from fusegpt_ray.run.journal import Journal
from fusegpt_ray.workers.base import Setup
from fusegpt_ray.workers.local import LocalWorkers


class Rented:
    """A machine of two GPUs, which a test exchanges for others."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.gpu = clock, H100

    def compress(self, desk: Desk, hour: str = "", **keys: Any) -> Watching:
        """Where what is shown begins with `hour`, one goes by."""
        self.clock.passed = 0.0
        section = cluster(deterministic=False, gpu_hour_price=TABLE, **keys)
        show = TakesAnHour(self.clock, *filter(None, [hour]))
        compress(of_desk(desk, cluster=section), show)
        return show


@pytest.fixture(name="rented")
def _rented(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Rented:
    found = Rented(clock)
    monkeypatch.setattr(LocalWorkers, "gpus_held", 2.0)
    monkeypatch.setattr(LocalWorkers, "hardware", property(lambda self: {"gpu": found.gpu}))
    return found


def about(value: float) -> Any:
    """Beside the hours, which cost 1 or more, go the seconds that a test takes."""
    return pytest.approx(value, abs=0.2)


def test_a_run_that_goes_on_on_other_gpus_pays_for_each_kind(
    desk: Desk, rented: Rented, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two hours of an H100 at 2.5 are 5, two of an A100 at 1 are 2."""
    with pytest.raises(BudgetSpent, match=r"max_cost = 4 is spent: 5\.\d\d by now"):
        rented.compress(desk, "round 2/3: scoring", max_cost=4)
    assert main(["status", str(desk.out), "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert run["spent"]["money"] == about(5)
    assert run["spent"]["by_gpu"] == {H100: run["spent"]["gpu_seconds"]}
    assert facts(str(run_folder(desk))).cost == about(5), "of a run under way"
    rented.gpu = A100
    with pytest.raises(BudgetSpent, match=r"max_cost = 6\.5 is spent: 7\.\d\d by now"):
        rented.compress(desk, "round 3/3: scoring", max_cost=6.5)
    rented.compress(desk, max_cost=100)
    manifest = json.loads((desk.out / "demo-p60/fusegpt.json").read_text())
    spent = manifest["spent"]
    assert {gpu: seconds / HOUR for gpu, seconds in spent["by_gpu"].items()} == {
        H100: about(2), A100: about(2),
    }  # fmt: skip
    assert spent["money"] == about(7) and spent["gpu_seconds"] / HOUR == about(4)
    found = of_manifest("demo", manifest, 10)
    assert found.cost == spent["money"] and found.price_per_second is None
    shown = page.html(found)
    for gpu in (H100, A100):
        assert re.search(rf"GPU hours on {gpu}</dt><dd>2\.\d\d<", shown)
    assert re.search(r"price of these hours</dt><dd>7\.\d\d<", shown)
    assert "price planned" not in shown, "nobody knows which stage ran where"
    known = page.html(found.model_copy(update={"spent": None}))
    assert "price planned" in known and "price of the time taken" in known


def test_a_gpu_without_a_price_is_refused_before_any_work(
    desk: Desk, rented: Rented, monkeypatch: pytest.MonkeyPatch, weight_reads: list[str]
) -> None:
    rented.gpu = "NVIDIA L40S"
    with monkeypatch.context() as patch:
        patch.setattr(compression, "all_windows", lambda *_: pytest.fail("texts are drawn"))
        with pytest.raises(UserError) as found:
            rented.compress(desk, max_cost=10)
    assert found.value.key == "cluster.gpu_hour_price" and found.value.value == TABLE
    assert "has no price of NVIDIA L40S" in found.value.problem
    assert found.value.fix.startswith("add cluster.gpu_hour_price.L40S, or give cluster.max_hours")
    assert weight_reads == [] and not run_folder(desk).exists()
    rented.compress(desk, max_hours=100)  # money is not limited
    spent = json.loads((desk.out / "demo-p60/fusegpt.json").read_text())["spent"]
    assert "money" not in spent and spent["by_gpu"] == {"NVIDIA L40S": spent["gpu_seconds"]}


def test_a_gpu_held_before_without_a_price_is_refused_before_workers_start(
    desk: Desk, rented: Rented, monkeypatch: pytest.MonkeyPatch
) -> None:
    rented.gpu = "NVIDIA L40S"
    with pytest.raises(BudgetSpent, match="max_hours"):
        rented.compress(desk, "round 2/3: scoring", max_hours=0.5)
    rented.gpu = H100
    with monkeypatch.context() as patch:
        patch.setattr(LocalWorkers, "__enter__", lambda self: pytest.fail("workers started"))
        with pytest.raises(UserError, match="no price of NVIDIA L40S"):
            rented.compress(desk, max_cost=100)
    priced = {"gpu_hour_price": TABLE | {"L40S": 0.5}}
    show = Watching()
    compress(of_desk(desk, cluster=cluster(deterministic=False, max_cost=100, **priced)), show)
    assert any("going on after" in line for line in show.said)
    spent = json.loads((desk.out / "demo-p60/fusegpt.json").read_text())["spent"]
    assert spent["money"] == about(2 * 0.5)


def test_what_another_process_spends_while_a_run_waits_for_its_name_counts(
    desk: Desk, rented: Rented, monkeypatch: pytest.MonkeyPatch
) -> None:
    owned, heartbeat = Journal.owned, {"time": 1.0, "spent": {"by_gpu": {A100: 5 * HOUR}}}

    def late(journal: Journal, *arguments: Any) -> Any:
        run_folder(desk).mkdir(parents=True)
        (run_folder(desk) / "heartbeat.json").write_text(json.dumps(heartbeat))
        return owned(journal, *arguments)

    monkeypatch.setattr(Journal, "owned", late)
    rented.compress(desk, max_cost=100)
    spent = json.loads((desk.out / "demo-p60/fusegpt.json").read_text())["spent"]
    assert spent["by_gpu"][A100] == 5 * HOUR and spent["money"] == about(5)


def test_members_of_a_family_cost_what_their_own_gpus_cost(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a third, a heartbeat tells of a GPU that has no price."""

    def gpu(workers: LocalWorkers) -> dict[str, str]:
        return {"gpu": f"NVIDIA {workers.setup.cluster.labels[LABEL]} 80GB"}

    monkeypatch.setattr(LocalWorkers, "gpus_held", 2.0)
    monkeypatch.setattr(LocalWorkers, "hardware", property(gpu))
    members = [
        {"name": name, "cluster": {"labels": {LABEL: kind}}}
        for name, kind in (("one", "H100"), ("two", "A100"), ("three", "A100"))
    ]
    lost = desk.out / "demo-three-mi.run/heartbeat.json"
    lost.parent.mkdir(parents=True)
    lost.write_text(json.dumps({"time": 1.0, "spent": {"by_gpu": {"NVIDIA L4": 5.0}}}))
    keys = cluster(gpu_hour_price={"H100": 2500, "A100": 1000}, max_cost=1e6)
    section = {"members": members, "methods": ["mi"], "sparsities": 0.4}
    assert main(["family", desk.write(cluster=keys, family=section), "--json"]) == 1
    one, two, three = json.loads(capsys.readouterr().out)["rows"]
    assert one["cost"] == pytest.approx(one["gpu_hours"] * 2500, rel=0.01) and one["cost"] > 0
    assert two["cost"] == pytest.approx(two["gpu_hours"] * 1000, rel=0.01) and two["cost"] > 0
    assert three["cost"] is None and "has no price of NVIDIA L4" in three["problem"]
    assert not list(lost.parent.glob("round-*")), "before any work"


@pytest.mark.parametrize(
    ("told", "held"),
    [
        ({"seconds": HOUR, "gpu_seconds": 2 * HOUR}, {A100: 2 * HOUR}),  # of earlier versions
        ({"by_gpu": {"": HOUR, A100: HOUR, H100: HOUR}}, {A100: 2 * HOUR, H100: HOUR}),
        ({"by_gpu": {H100: -1, A100: "3"}, "gpu_seconds": 5}, {}), ({"by_gpu": [3]}, {}),
    ],
)  # fmt: skip
def test_signs_of_life_are_read(told: Any, held: Mapping[str, float], tmp_path: Path) -> None:
    """What names no GPU is of those at hand."""
    (tmp_path / "heartbeat.json").write_text(json.dumps({"time": 1.0, "spent": told}))
    found = Budget(Cluster(gpu_hour_price=TABLE), str(tmp_path), gpu=A100, began=None)
    assert found.spent["by_gpu"] == held
    assert found.spent["gpu_seconds"] == sum(held.values())
    money = sum(seconds / HOUR * (1 if gpu == A100 else 2.5) for gpu, seconds in held.items())
    assert found.told.get("money", 0) == pytest.approx(money)


def test_manifests_tell_what_they_told() -> None:
    """Of one that names no GPU in `spent`, all seconds are of the GPU that it ran on."""
    told = {
        "source": {"name": "dense"}, "method": "mi", "rounds": [], "gpu": A100, "gpus": 2.0,
        "recipe": {"cluster": {"gpu_hour_price": TABLE}},
        "spent": {"seconds": HOUR, "gpu_seconds": 2 * HOUR},
    }  # fmt: skip
    found = of_manifest("demo", told, 10)
    assert found.cost == 2 and found.price_per_second == pytest.approx(2 / HOUR)
    unpriced = {**told, "recipe": {"cluster": {"gpu_hour_price": {"H100": 2.5}}}}
    found = of_manifest("demo", unpriced, 10)
    assert found.cost is None and found.price_per_second is None
    unpriced["spent"] = {**cast("dict[str, Any]", told["spent"]), "money": 9.0}
    assert of_manifest("demo", unpriced, 10).cost == 9


@pytest.mark.parametrize(("cpus", "closed"), [(2, True), (3, False)])
def test_replicas_that_were_asked_leave_a_cpu_to_ray_data(
    cpus: int, closed: bool, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else texts would never be read."""

    class Pool:
        closed = False

        def close(self) -> None:
            self.closed = True

    source = Source.find(str(desk.model), None)
    workers = RayWorkers(Setup(source, source.stack(), Cluster(replicas=2)))
    pool = Pool()
    workers._pool = pool  # type: ignore[assignment]
    monkeypatch.setattr(on_ray, "resources", lambda cluster: {"CPU": cpus})
    workers.tokens(Text(data=str(desk.heldout)), "calibration.data")
    assert pool.closed == closed
