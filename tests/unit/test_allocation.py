"""How many GPUs a set of workers holds: the same number in the plan, in what is waited for and kept
free, and in what is paid for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import product

import pytest
from desk import Desk

from fusegpt_ray.cli import main
from fusegpt_ray.cost.rates import RATES
from fusegpt_ray.distributed import cluster as module
from fusegpt_ray.distributed import sets
from fusegpt_ray.distributed.cluster import RayWorkers
from fusegpt_ray.distributed.serve import OneGpuError
from fusegpt_ray.model.source import Source
from fusegpt_ray.recipe.cluster_section import Cluster
from fusegpt_ray.workers.base import Setup
from fusegpt_ray.workers.room import Allocation, Need, Room, Way


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
    cluster = Cluster(replicas=replicas, workers=workers)
    assert Allocation.of(cluster, each, trains, way) == Allocation(*held)


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
        found.way = found.way_in([2], 4)
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
    found.way = found.way_in([gpus], cpus)
    assert found.way == way
    parts = {"shared": 0.4, "apart": 1, "turns": 1}
    assert found._worker_gpu == (parts[way] if each else 0)


LAYOUTS = [(1,), (2,), (4,), (1, 1), (1, 2), (4, 4), (1, 3), (1, 1, 1), (3, 2, 1), (1, 1, 1, 1)]


@pytest.mark.parametrize("each", [0.5, 0.3, 0.25, 0.4, 0.7])
def test_replicas_on_parts_of_gpus_leave_whole_ones_to_workers(each: float) -> None:
    """Whichever nodes Ray takes, and in whichever order: held against all that it could do."""
    for nodes, replicas, workers in product(LAYOUTS, range(1, 7), range(1, 4)):
        cluster = Cluster(replicas=replicas, workers=workers, gpus_per_replica=each)
        found = RayWorkers(Setup(None, None, cluster, trains=True))  # type: ignore[arg-type]
        found.gpus = each
        empty = tuple((1.0,) * gpus for gpus in nodes)
        apart = all_find_room(empty, each, replicas, workers)
        way = found.way_in(nodes, 100)
        assert way == ("apart" if apart else "turns"), (nodes, replicas, workers)


@cache
def all_find_room(
    nodes: tuple[tuple[float, ...], ...], each: float, replicas: int, workers: int
) -> bool:
    """Whether nobody is ever left without a GPU, or a part of one, however Ray goes on from what is
    free of each GPU of each node. On a node it takes the fullest GPU that has room.
    """
    for size, left in ((each, (replicas - 1, workers)), (1.0, (replicas, workers - 1))):
        if min(left) < 0:
            continue
        places = 0
        for at, gpus in enumerate(nodes):
            if fitting := [free for free in gpus if free > size - 1e-6]:
                places += 1
                rest = list(gpus)
                rest.remove(min(fitting))
                now = tuple(sorted([*rest, round(min(fitting) - size, 6)]))
                then = tuple(sorted((*nodes[:at], now, *nodes[at + 1 :])))
                if not all_find_room(then, each, *left):
                    return False
        if not places:
            return False
    return True


def test_sets_beside_each_other_leave_whole_gpus_to_workers() -> None:
    """Eight replicas of two sets may begin eight GPUs: then neither set could train."""
    cluster = Cluster(replicas=4, workers=2, gpus_per_replica=0.5)
    both = [Need.of(cluster, True, 0.5, at_once=True)] * 2
    turns = [Need.of(cluster, True, 0.5)] * 2
    for gpus, roomy in ((8, False), (11, False), (12, True)):
        there = Need(gpus, 100)
        assert Room.of(turns, both, turns, None, None, there, there).roomy == roomy


def test_workers_that_meet_on_one_gpu_have_whole_ones_for_the_rest_of_a_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a real cluster: tests/integration/test_own_gpus.py."""
    said: list[str] = []

    class Job:
        def __init__(self, gpu: float) -> None:
            self.gpu = gpu

        def run(self, *_: object) -> list[float]:
            if self.gpu < 1:
                raise OneGpuError("two workers")
            return [self.gpu]

        def close(self, wait: bool) -> None:
            said.append(f"job of {self.gpu} ends")

    class Pool:
        gpus = 0.6

        def __getattr__(self, name: str) -> Callable[[], None]:
            return lambda: said.append(name)

    def start(self: RayWorkers) -> None:
        self._job = self._job or Job(self._worker_gpu)

    free = [0.4, 0.4]
    monkeypatch.setattr(module, "free_gpus", lambda labels: free)
    monkeypatch.setattr(module, "PLACED_SECONDS", 0)
    monkeypatch.setattr(RayWorkers, "_start_training", start)

    def opened() -> RayWorkers:
        cluster = Cluster(replicas=2, workers=2)
        found = RayWorkers(Setup(None, None, cluster, trains=True))  # type: ignore[arg-type]
        found.gpus, found.way, found._pool = 1.0, "shared", Pool()  # type: ignore[assignment]
        return found

    one = opened()
    one.prepare_training()
    assert one._job.gpu == 0.4
    assert one.spmd(print, news=print) == one.spmd(print, news=print) == [1]
    assert said == ["start", "offload", "job of 0.4 ends", "close", "close", "close"]
    assert (one.way, one._pool.gpus, one.gpus_held) == ("turns", 1, 2)
    for rooms, apart in (([1.4, 0.4], False), ([0.0, 1.8], True), ([0.8, 0.0], True)):
        free[:] = rooms
        other = opened()
        other.prepare_training()
        assert (other._job is not None) == apart, rooms
    free[:], said[:] = [0.4, 1.0, 0.4], []
    other = opened()
    assert other.spmd(print, news=print) == [1]
    assert said == ["start", "offload", "close", "close"]


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
