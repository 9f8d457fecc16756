"""How a run waits for what the cluster lacks, with a cluster and a clock that are made up."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from ray.exceptions import TaskUnschedulableError

from fusegpt_ray.distributed import nodes
from fusegpt_ray.distributed.nodes import wait_for_resources
from fusegpt_ray.errors import UserError
from fusegpt_ray.recipe.cluster_section import Cluster


@dataclass
class FakeRay:
    """A cluster that has `more` from second `when` on, if an autoscaler was asked."""

    has: dict[str, float]
    more: dict[str, float] = field(default_factory=dict)
    when: float = 30
    asked: list[list[dict[str, float]]] = field(default_factory=list)
    now: float = 0.0

    def cluster_resources(self) -> dict[str, float]:
        return self.more if self.more and self.asked and self.now >= self.when else self.has

    def request_resources(self, bundles: list[dict[str, float]]) -> None:
        self.asked.append(bundles)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Any:
    def make(has: dict[str, float], more: dict[str, float] | None = None) -> FakeRay:
        fake = FakeRay(has, more or {})
        monkeypatch.setattr(nodes.ray, "cluster_resources", fake.cluster_resources)
        monkeypatch.setattr(nodes, "request_resources", fake.request_resources)
        monkeypatch.setattr(nodes, "time", fake)
        return fake

    return make


def test_what_is_there_is_not_asked_for(cluster: Any) -> None:
    fake = cluster({"CPU": 4, "GPU": 2})
    wait_for_resources(2, 4, Cluster(), grows=True)
    assert fake.asked == []
    assert fake.now == 0


@pytest.mark.parametrize(
    ("gpus", "bundles"), [(0, []), (2, [{"GPU": 1}] * 2), (1.2, [{"GPU": 1}] * 2)]
)
def test_an_autoscaler_is_asked_until_it_is_there(
    cluster: Any, gpus: float, bundles: list[dict[str, float]]
) -> None:
    fake = cluster({"CPU": 1}, more={"CPU": 8, "GPU": 2})
    wait_for_resources(gpus, 3, Cluster(), grows=True)
    assert fake.asked == [bundles + [{"CPU": 1}] * 3, []], "the demand is taken back at the end"
    assert fake.now == fake.when


def test_only_nodes_with_the_labels_count(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 8 GPUs, 2 are on nodes that are alive and have both labels."""
    want = {"ray.io/accelerator-type": "H100", "pool": "train"}
    told = [
        (True, want | {"zone": "b"}, 2.0),
        (True, {"pool": "train"}, 4.0),
        (True, want | {"pool": "serve"}, 1.0),
        (False, want, 1.0),
    ]
    there = [
        {"NodeID": str(n), "Alive": alive, "Labels": labels, "Resources": {"GPU": gpus, "CPU": 4.0}}
        for n, (alive, labels, gpus) in enumerate(told)
    ]
    fake = cluster({"CPU": 16, "GPU": 8})
    monkeypatch.setattr(nodes.ray, "nodes", lambda: there)
    labelled = Cluster(labels=want, gpus_per_replica=1, wait_minutes=0)
    assert nodes.resources(labelled) == {"GPU": 2.0, "CPU": 4.0}
    assert nodes.alive_nodes(want) == {"0"}
    wait_for_resources(2, 4, labelled, grows=True)
    with pytest.raises(UserError, match=r"cluster\.labels = .*: 3 GPUs are needed, the nodes with"):
        wait_for_resources(3, 3, labelled, grows=True)
    assert fake.asked == []


def test_nodes_with_labels_are_asked_for(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster({"CPU": 1})
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(nodes.ray, "nodes", list)
    monkeypatch.setattr(nodes, "request_resources", lambda **request: asked.append(request))
    with pytest.raises(UserError, match="after 1 minutes"):
        wait_for_resources(0, 2, Cluster(labels={"pool": "a"}, wait_minutes=1), grows=True)
    assert asked == [
        {"bundles": [{"CPU": 1}] * 2, "bundle_label_selectors": [{"pool": "a"}] * 2},
        {"bundles": []},
    ]


def test_after_the_wait_it_is_said_how_long_it_was(cluster: Any) -> None:
    fake = cluster({"CPU": 4})
    with pytest.raises(UserError) as caught:
        wait_for_resources(2, 2, Cluster(wait_minutes=1.5, gpus_per_replica=1), grows=True)
    assert caught.value.key == "cluster.gpus_per_replica"
    assert caught.value.value == 1
    assert caught.value.problem == "2 GPUs are needed, the cluster has 0 after 1.5 minutes"
    assert fake.asked[-1] == []
    assert fake.now == 90


@pytest.mark.parametrize(
    ("grows", "minutes"), [(False, 10), (True, 0)], ids=["a Ray of its own", "nothing to wait"]
)
def test_what_can_never_come_is_refused_at_once(cluster: Any, grows: bool, minutes: float) -> None:
    fake = cluster({"CPU": 2}, more={"CPU": 9})
    with pytest.raises(UserError) as caught:
        wait_for_resources(0, 3, Cluster(replicas=3, wait_minutes=minutes), grows)
    assert caught.value.key == "cluster.replicas"
    assert caught.value.value == 3
    assert caught.value.problem == "3 CPUs are needed, the cluster has 2"
    assert fake.asked == []
    assert fake.now == 0


def test_only_nodes_with_some_members_labels_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a real cluster: tests/integration/test_placement.py."""
    there = {"a": 8, "b": 4, "c": 2}
    labels = {"a": {}, "b": {"pool": "old"}, "c": {"pool": "new", "zone": "z"}}
    found = [
        {"NodeID": name, "Alive": True, "Labels": labels[name], "Resources": {"GPU": gpus}}
        for name, gpus in there.items()
    ]
    dead = found[2] | {"NodeID": "d", "Alive": False}
    free = {"a": {"GPU": 5.0}, "b": {"GPU": 3.0, "CPU": 1.0}, "c": {"GPU": 1.0}}
    monkeypatch.setattr(nodes.ray, "nodes", lambda: [*found, dead])
    monkeypatch.setattr(nodes.ray, "cluster_resources", lambda: {"GPU": 14})
    monkeypatch.setattr(nodes, "available_resources_per_node", lambda: free)
    old, new, nowhere = (Cluster(labels={"pool": pool}) for pool in ("old", "new", "none"))
    assert nodes.free_resources([new]) == {"GPU": 1} and nodes.resources(new) == {"GPU": 2}
    assert nodes.free_resources([old, new, new]) == {"GPU": 4, "CPU": 1}
    assert nodes.free_resources([new, Cluster()]) == {"GPU": 9, "CPU": 1}
    assert nodes.resources_of_any([old, new]) == {"GPU": 6}
    assert nodes.resources_of_any([new, Cluster()]) == {"GPU": 14}
    assert nodes.free_resources([nowhere]) == {}


def test_a_node_that_joins_or_leaves_just_now_is_no_reason_to_fail(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For a moment Ray refuses tasks for a node that has joined; for one that has left it goes on
    to do so.
    """
    tries = {name * 56: 0 for name in "abc"}
    where = [
        {"NodeID": node, "Alive": True, "NodeManagerAddress": f"at {node[0]}"} for node in tries
    ]
    monkeypatch.setattr(nodes.ray, "nodes", lambda: where)

    @dataclass
    class Task:
        node: str = ""

        def options(self, num_cpus: int, scheduling_strategy: Any) -> Task:
            return Task(scheduling_strategy.node_id)

        def remote(self, files: list[str], hub: None) -> Task:
            return self

    def get(task: Task) -> bool:
        tries[task.node] += 1
        if task.node[0] == "b":
            where[:] = [one for one in where if one["NodeID"] != task.node]
        if task.node[0] == "b" or tries[task.node] < 3:
            raise TaskUnschedulableError("the node does not exist any more")
        return task.node[0] == "a"

    monkeypatch.setattr(nodes, "_sees", Task())
    monkeypatch.setattr(nodes.ray, "get", get)
    assert nodes.nodes_without(["a file"]) == ["at c"]
    assert [*tries.values()] == [3, 1, 3]
