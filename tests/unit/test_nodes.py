"""How a run waits for what the cluster lacks, with a cluster and a clock that are made up."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import pytest
from ray.exceptions import TaskUnschedulableError

from fusegpt_ray.distributed import autoscaler, nodes
from fusegpt_ray.distributed.nodes import Ours, wait_for_resources
from fusegpt_ray.distributed.silence import SilentError
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

    def numbers(self) -> tuple[set[int], set[int]]:
        return {len(self.asked[-1])} if self.asked else set(), set()

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Any:
    def make(has: dict[str, float], more: dict[str, float] | None = None) -> FakeRay:
        fake = FakeRay(has, more or {})
        monkeypatch.setattr(nodes.ray, "cluster_resources", fake.cluster_resources)
        monkeypatch.setattr(nodes.ray, "is_initialized", lambda: True)
        monkeypatch.setattr(autoscaler, "request_resources", fake.request_resources)
        monkeypatch.setattr(autoscaler, "_numbers", fake.numbers)
        for module in (nodes, autoscaler):
            monkeypatch.setattr(module, "time", fake)
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


@pytest.mark.parametrize(
    ("labels", "gpus", "most"),
    [
        ({}, 0, 64), ({"pool": "a"}, 0, 6), ({"pool": "none"}, 0, 1),
        ({}, 1, 6), ({}, 0.6, 6), ({"pool": "b"}, 0.6, 4), ({"pool": "b"}, 0.4, 8),
        ({"pool": "b"}, 0.1, 9), ({}, 2, 4), ({"pool": "b"}, 3, 1), ({"pool": "b"}, 8, 1),
    ],
)  # fmt: skip
def test_as_many_processes_as_find_room_may_come_to_one_node(
    labels: dict[str, str], gpus: float, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nodes without GPUs do not count where GPUs are asked for, but CPUs do."""
    has = [({}, 0, 64), ({"pool": "a"}, 8, 6), ({"pool": "b"}, 4, 9)]
    there = [
        {"Alive": True, "Labels": of, "Resources": {"CPU": cpus, **({"GPU": n} if n else {})}}
        for of, n, cpus in has
    ]
    monkeypatch.setattr(nodes.ray, "nodes", lambda: there)
    assert nodes.most_on_a_node(labels, gpus) == most


def test_nodes_with_labels_are_asked_for(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster({"CPU": 1})
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(nodes.ray, "nodes", list)
    monkeypatch.setattr(autoscaler, "request_resources", lambda **request: asked.append(request))
    monkeypatch.setattr(autoscaler, "_numbers", lambda: ({2}, set()))
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


@dataclass
class Nodes:
    """Whose GPUs are `there`, and of which others use what is not `free`."""

    there: dict[str, float]
    free: dict[str, float]
    labels: dict[str, dict[str, str]] = field(default_factory=dict)
    dead: tuple[str, ...] = ()

    def nodes(self) -> list[dict[str, Any]]:
        return [
            {
                "NodeID": name,
                "Alive": name not in self.dead,
                "Labels": self.labels.get(name, {}),
                "Resources": {"GPU": gpus, "CPU": 1.0},
            }
            for name, gpus in self.there.items()
        ]

    def available(self) -> dict[str, dict[str, float]]:
        """Ray leaves out what is used up."""
        free = {name: {"GPU": gpus, "CPU": 1.0} for name, gpus in self.free.items()}
        return {name: {k: n for k, n in of.items() if n} for name, of in free.items()}

    def gpus(self, ours: Ours) -> tuple[float, float]:
        mine, others = ours.now()
        return mine.gpus, others.gpus


@pytest.fixture
def some(monkeypatch: pytest.MonkeyPatch) -> Any:
    def make(*args: Any) -> Nodes:
        made = Nodes(*args)
        monkeypatch.setattr(nodes.ray, "nodes", made.nodes)
        monkeypatch.setattr(nodes, "available_resources_per_node", made.available)
        return made

    return make


def test_nodes_that_join_are_ours_whatever_we_hold_and_lost_ones_take_others_along(
    some: Any,
) -> None:
    cluster = some({"a": 8, "b": 4}, {"a": 5, "b": 0})
    ours = Ours([Cluster()])
    assert cluster.gpus(ours) == (5, 7)
    cluster.free["a"] = 0  # ours take what was free
    assert cluster.gpus(ours) == (5, 7)
    cluster.there["c"] = 8  # joins, and is not counted by all of Ray at the same moment
    assert cluster.gpus(ours) == (13, 7)
    cluster.free["c"] = 2
    assert cluster.gpus(ours) == (13, 7)
    cluster.dead = ("b",)
    assert cluster.gpus(ours) == (13, 3)
    cluster.dead = ("b", "c")
    assert cluster.gpus(ours) == (5, 3)


def test_what_others_give_back_is_ours_and_what_our_own_do_is_not_counted_twice(some: Any) -> None:
    cluster = some({"a": 8}, {"a": 5})
    ours = Ours([Cluster()])
    cluster.free["a"] = 0
    assert cluster.gpus(ours) == (5, 3)
    cluster.free["a"] = 4  # our replicas have ended, training has not begun
    assert cluster.gpus(ours) == (5, 3)
    cluster.free["a"] = 6  # so others hold 2 at most
    assert cluster.gpus(ours) == (6, 2)
    cluster.free["a"] = 0
    assert cluster.gpus(ours) == (6, 2)


def test_only_nodes_with_some_members_labels_count(some: Any) -> None:
    """On a real cluster: tests/integration/test_placement.py."""
    labels = {"b": {"pool": "old"}, "c": {"pool": "new", "zone": "z"}, "d": {"pool": "new"}}
    some({"a": 8, "b": 4, "c": 2, "d": 2}, {"a": 5, "b": 3, "c": 1, "d": 2}, labels, ("d",))
    old, new, nowhere = (Cluster(labels={"pool": pool}) for pool in ("old", "new", "none"))
    for clusters, gpus in (
        ([new], (1, 1)),
        ([old, new, new], (4, 2)),
        ([new, Cluster()], (9, 5)),
        ([nowhere], (0, 0)),
    ):
        mine, others = Ours(clusters).now()
        assert (mine.gpus, others.gpus) == gpus
    assert nodes.resources(new) == {"GPU": 2, "CPU": 1}


def test_a_node_that_joins_or_leaves_just_now_is_no_reason_to_fail(
    some: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """For a moment Ray refuses tasks for a node that has joined; for one that has left it goes on
    to do so. From one where a shared folder hangs, nothing comes.
    """
    tries = {name * 56: 0 for name in "abcd"}
    found = some(dict.fromkeys(tries, 1), {}).nodes()
    where = [one | {"NodeManagerAddress": f"at {one['NodeID'][0]}"} for one in found]
    monkeypatch.setattr(nodes.ray, "nodes", lambda: where)

    @dataclass
    class Task:
        node: str = ""

        def options(self, num_cpus: int, scheduling_strategy: Any) -> Task:
            return Task(scheduling_strategy.node_id)

        def remote(self, files: list[str], hub: None) -> Task:
            return self

    def answer(task: Task, who: str, advice: str) -> bool:
        tries[task.node] += 1
        if task.node[0] == "d":
            raise SilentError(who, advice)
        if task.node[0] == "b":
            where[:] = [one for one in where if one["NodeID"] != task.node]
        if task.node[0] == "b" or tries[task.node] < 3:
            raise TaskUnschedulableError("the node does not exist any more")
        return task.node[0] == "a"

    monkeypatch.setattr(nodes, "_sees", Task())
    monkeypatch.setattr(nodes, "answer", answer)
    assert nodes.nodes_without(["a file"]) == ["at c", "at d"]
    assert [*tries.values()] == [3, 1, 3, 1]
    assert re.match(r"node d+ has not answered for 600 s.*`ls a file`", caplog.messages[0])
