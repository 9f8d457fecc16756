"""How many GPUs a set of workers holds: the same number in the plan, in what is waited for and kept
free, and in what is paid for.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from desk import Desk

from fusegpt_ray.cli import main
from fusegpt_ray.cost.rates import RATES
from fusegpt_ray.distributed import sets
from fusegpt_ray.distributed.cluster import RayWorkers
from fusegpt_ray.model.source import Source
from fusegpt_ray.recipe.cluster_section import Cluster
from fusegpt_ray.workers.base import Setup
from fusegpt_ray.workers.room import Held, Need, Way


@pytest.mark.parametrize(
    ("replicas", "workers", "each", "trains", "way", "held"),
    [
        (2, 1, 1.0, True, "shared", (2, 1, 2)), (1, 4, 1.0, True, "shared", (4, 4, 4)),
        (2, 1, 1.0, True, "apart", (2, 1, 3)), (2, 4, 1.0, True, "turns", (2, 4, 4)),
        (2, 4, 1.0, False, "apart", (2, 0, 2)), (3, 2, 0.5, True, "apart", (3, 2, 3.5)),
        (3, 2, 0.0, True, "apart", (3, 2, 0)),
    ],
)  # fmt: skip
def test_gpus_of_a_set(
    replicas: int, workers: int, each: float, trains: bool, way: Way, held: tuple[int, int, float]
) -> None:
    assert Held.of(Cluster(replicas=replicas, workers=workers), each, trains, way) == Held(*held)


def test_what_is_kept_free_for_a_set_is_what_it_is_counted_with(desk: Desk) -> None:
    """Beside others, training workers and replicas take turns, unless there is room for both."""
    source = Source.find(str(desk.model), None)
    cluster = Cluster(replicas=2, workers=1, gpus_per_replica=1)
    setup = Setup(source, source.stack(), cluster, trains=True, sets=2, roomy=True)
    assert sets._need(setup) == Need(gpus=2, cpus=3)
    assert sets._need(setup, at_once=True) == Need(gpus=3, cpus=4)
    for changes, gpus in (({}, 3.0), ({"roomy": False}, 2.0), ({"sets": 1}, 2.0)):
        found = RayWorkers(replace(setup, **changes))  # type: ignore[arg-type]
        found.gpus = 1.0
        found.way = found.way_in({"GPU": 2, "CPU": 4})
        assert found.gpus_held == gpus, changes


@pytest.mark.parametrize(
    ("replicas", "workers", "each", "gpus", "cpus", "way"),
    [
        (4, 4, 1.0, 4, 9, "shared"), (1, 4, 1.0, 4, 9, "shared"), (4, 4, 1.0, 4, 8, "turns"),
        (2, 2, 2.0, 6, 5, "apart"), (2, 2, 2.0, 5, 5, "turns"), (2, 2, 2.0, 6, 4, "turns"),
        (2, 2, 0.0, 0, 5, "apart"), (2, 2, 0.0, 0, 4, "turns"),
    ],
)  # fmt: skip
def test_workers_share_gpus_only_with_replicas_that_stay(
    replicas: int, workers: int, each: float, gpus: float, cpus: float, way: Way
) -> None:
    """Where replicas end before training, a part of a GPU could be beside another worker's."""
    cluster = Cluster(replicas=replicas, workers=workers, gpus_per_replica=each)
    found = RayWorkers(Setup(None, None, cluster, trains=True))  # type: ignore[arg-type]
    found.gpus = each
    found.way = found.way_in({"GPU": gpus, "CPU": cpus})
    assert found.way == way
    parts = {"shared": 0.4, "apart": 1, "turns": 1}
    assert found._worker_gpu == (parts[way] if each else 0)


def test_a_plan_counts_the_processes_that_there_will_be(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without training there are no more replicas than were asked for, whatever `workers` says."""
    cluster = {"engine": "ray", "replicas": 2, "workers": 4, "gpu_hour_price": 1}

    def planned(method: str) -> dict[str, float]:
        one_by_one = {"windows": 4, "batch": 1}
        recipe = desk.write(method=method, cluster=cluster, importance=one_by_one)
        assert main(["plan", recipe, "--gpu", "H100", "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        (scoring,) = [row for row in told["stages"] if row["stage"] == "scoring"]
        assert told["price"] == pytest.approx(told["seconds"] / 3600 * told["gpus"])
        alone = scoring["flops"] / RATES["NVIDIA H100"]["scoring"]
        return {"gpus": told["gpus"], "scoring": round(alone / scoring["seconds"])}

    assert planned("mi") == {"gpus": 2, "scoring": 2}
    assert planned("fusegpt") == {"gpus": 4, "scoring": 4}


def test_a_manifest_tells_what_moved(desk: Desk) -> None:
    """Never more than was planned, but for the headers of such small files."""
    assert main(["compress", desk.write(), "--quiet"]) == 0
    manifest = json.loads((desk.out / "demo-p40/fusegpt.json").read_text())
    planned = {row["stage"]: row for row in manifest["planned_bytes"]}
    for stage, moved in manifest["moved"].items():
        assert moved["read"] <= planned[stage]["read"], stage
        assert moved["written"] <= 1.1 * planned[stage]["written"], stage
    wrote = manifest["moved"]["fine-tuning"]["written"]
    assert wrote > 0.5 * planned["fine-tuning"]["written"]
    published = manifest["publishing"]["bytes"]
    assert planned["publishing"]["written"] == pytest.approx(published, rel=0.05)
