"""What an autoscaler is asked for, with one that is made up: by several at the same time, and in
the course of a family, from a cluster without nodes to one without nodes. A real one:
tests/integration/test_autoscaling.py.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from ray.exceptions import RpcError

from fusegpt_ray.distributed import autoscaler, nodes, sets
from fusegpt_ray.distributed.autoscaler import asking, bundles
from fusegpt_ray.errors import UserError
from fusegpt_ray.recipe.cluster_section import Cluster
from fusegpt_ray.scheduling.waiting import Entry, Waiting
from fusegpt_ray.workers.base import Setup
from fusegpt_ray.workers.room import ResourcePool


@dataclass
class Cloud:
    """A Ray cluster, as this process sees it, with nodes of one GPU and two CPUs. Its autoscaler is
    of version 2: it starts `most` nodes, and none for a request that takes more. One comes in 30
    seconds, and goes when it has been idle for 60.
    """

    most: int = 3
    there: dict[str, float] = field(default_factory=dict)
    """Nodes, and since when they are idle."""
    used: list[str] = field(default_factory=list)
    coming: list[float] = field(default_factory=list)
    now: float = 1000.0
    request: Counter[str] = field(default_factory=Counter)
    said: list[int] = field(default_factory=list)
    """GPUs that it was asked for, one after another."""
    silent: bool = False
    """Whether it does not answer."""
    names: Any = field(default_factory=lambda: map("node {}".format, itertools.count()))

    # --- as Ray has it ---

    def request_resources(
        self, bundles: list[dict[str, float]], bundle_label_selectors: Any = None
    ) -> None:
        if self.silent:
            raise RpcError("the head is not there")
        self.request = Counter(kind for one in bundles for kind in one)
        self.said.append(self.request["GPU"])

    def numbers(self) -> tuple[set[int], set[int]]:
        stands = {self.request.total()} - {0}
        return stands, stands if self._wanted > self.most else set()

    def nodes(self) -> list[dict[str, Any]]:
        has = {"GPU": 1.0, "CPU": 2.0}
        return [{"NodeID": name, "Alive": True, "Resources": has} for name in self.there]

    def cluster_resources(self) -> dict[str, float]:
        return {"GPU": 1.0 * len(self.there), "CPU": 2.0 * len(self.there)}

    def available(self) -> dict[str, dict[str, float]]:
        return {n: {} if n in self.used else {"GPU": 1.0, "CPU": 2.0} for n in self.there}

    # --- time goes by ---

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        for _ in range(round(seconds)):
            self.now += 1
            self._scale()

    @property
    def _wanted(self) -> int:
        return max(self.request["GPU"], math.ceil(self.request["CPU"] / 2))

    def _scale(self) -> None:
        for when in [when for when in self.coming if when <= self.now]:
            self.coming.remove(when)
            self.there[next(self.names)] = self.now
        for name in self.used:
            self.there[name] = self.now
        if self._wanted <= self.most:
            missing = self._wanted - len(self.there) - len(self.coming)
            self.coming += [self.now + 30] * missing
            for name in [n for n, since in self.there.items() if self.now > since + 60]:
                if len(self.there) > self._wanted:
                    del self.there[name]


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Cloud:
    made = Cloud()
    monkeypatch.setattr(nodes.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(nodes.ray, "nodes", made.nodes)
    monkeypatch.setattr(nodes.ray, "cluster_resources", made.cluster_resources)
    monkeypatch.setattr(nodes, "available_resources_per_node", made.available)
    monkeypatch.setattr(autoscaler, "request_resources", made.request_resources)
    monkeypatch.setattr(autoscaler, "_numbers", made.numbers)
    for module in (autoscaler, nodes, sets):
        monkeypatch.setattr(module, "time", made)
    return made


def sets_of(*gpus: int, **keys: Any) -> list[Setup]:
    clusters = [Cluster(replicas=count, gpus_per_replica=1, **keys) for count in gpus]
    return [Setup(None, None, cluster) for cluster in clusters]  # type: ignore[arg-type]


def line(place: ResourcePool, setups: Sequence[Setup]) -> Waiting[str]:
    """As `Slots` makes it."""
    entries = [
        Entry(name, number, need)
        for number, (name, need) in enumerate(zip("abcdef", place.now().needs, strict=False))
    ]
    return Waiting(
        entries,
        place.now,
        lambda some: place.ask([(one.need, setups[one.group].cluster) for one in some]),
    )


# --- one request of several ---


def test_of_several_that_ask_each_finds_what_it_wants_in_all(cloud: Cloud) -> None:
    many, few = bundles(3, 1, Cluster()), bundles(1.5, 2, Cluster())
    with asking() as one:
        one([many])
        with asking() as other:
            other([few])
            assert cloud.request == {"GPU": 3, "CPU": 2}
        assert cloud.request == {"GPU": 3, "CPU": 1}
        one([few, few])
        assert cloud.request == {"GPU": 4, "CPU": 4}
    assert cloud.request.total() == 0 and cloud.said == [3, 3, 3, 4, 0]


def test_a_request_is_sent_again_only_where_another_has_taken_its_place(cloud: Cloud) -> None:
    with asking() as ask:
        for _ in range(9):
            ask([bundles(2, 0, Cluster())])
            cloud.sleep(1)
        assert cloud.said == [2]
        cloud.request = Counter()
        ask([bundles(2, 0, Cluster())])
    assert cloud.said == [2, 2, 0]


def test_a_request_that_is_not_heard_is_sent_again(cloud: Cloud) -> None:
    with asking() as ask:
        cloud.silent = True
        ask([bundles(2, 0, Cluster())])
        assert cloud.said == []
        cloud.silent = False
        cloud.sleep(1)
        ask([bundles(2, 0, Cluster())])
        assert cloud.said == [2]
    assert cloud.said == [2, 0]


def test_of_what_takes_more_nodes_than_there_may_be_the_first_are_asked_for(cloud: Cloud) -> None:
    with asking() as ask:
        for _ in range(60):
            ask([bundles(of, 0, Cluster()) for of in (1, 4, 1, 2)])
            cloud.sleep(1)
        assert cloud.said == [8, 4, 2]
    with asking() as ask:
        ask([bundles(5, 0, Cluster())])
        cloud.sleep(1)
        ask([bundles(5, 0, Cluster())])
        assert cloud.request["GPU"] == 5, "what is needed in any case"


@pytest.mark.parametrize("most", [1, 7, 8, 33, 63, 64])
def test_however_many_there_may_be_all_are_found_soon(cloud: Cloud, most: int) -> None:
    cloud.most = most
    with asking() as ask:
        for second in range(150):
            ask([bundles(1, 0, Cluster())] * 64)
            cloud.sleep(1)
            if second == 10:
                assert most / 2 <= cloud.request["GPU"] <= most
        assert cloud.request["GPU"] == most
        said = len(cloud.said)
        for _ in range(60):
            ask([bundles(1, 0, Cluster())] * 64)
            cloud.sleep(1)
        assert len(cloud.said) == said, "and it stays so"


# --- in the course of a family ---


def test_a_family_on_a_cluster_without_nodes(cloud: Cloud) -> None:
    """Four runs of a GPU each, and three nodes that may join."""
    setups = sets_of(1, 1, 1, 1)
    began = cloud.now
    with sets.joined(setups, None, None, "family.at_once") as place:
        assert cloud.said == [4, 2, 3], "for all four there are not enough"
        assert 30 <= cloud.now - began <= 33 and place.now().sets == 2
        cloud.sleep(30)
        assert place.now().sets == 3
        waiting = line(place, setups)
        first = [waiting.take_now() for _ in range(4)]
        assert [one.job for one in first if one] == ["a", "b", "c"]
        cloud.used = [*cloud.there]
        cloud.sleep(200)
        assert waiting.take_now() is None and cloud.request["GPU"] == 3
        assert first[1]
        waiting.release(first[1])  # one of them ends, and the last one goes
        last = waiting.take_now()
        assert last and last.job == "d"
        assert cloud.request.total() == 0, "none waits"
        for one in (first[0], first[2]):
            assert one
            waiting.release(one)
        cloud.used = cloud.used[:1]
        cloud.sleep(65)
        assert [*cloud.there] == cloud.used, "the others are given back while d works"
        waiting.release(last)
        cloud.used = []
    cloud.sleep(65)
    assert not cloud.there and cloud.said[-1] == 0


def test_a_quota_is_kept_and_others_are_not_taken_for_ours(cloud: Cloud) -> None:
    """One node is another's; of three that may join two are ours."""
    cloud.most = 9
    cloud.there["other"], cloud.used = cloud.now, ["other"]
    setups = sets_of(1, 1, 1, 1)
    with sets.joined(setups, None, 2, "family.at_once") as place:
        assert cloud.said == [3] and cloud.request["CPU"] == 6
        while place.now().sets < 2:
            cloud.sleep(1)
            place.ask([(need, Cluster()) for need in place.now().needs])
        cloud.sleep(100)
        assert len(cloud.there) == 3 and place.now().total.gpus == 2
        cloud.used = []
        cloud.sleep(1)
        assert place.now().total.gpus == 2, "though all three are ours now"
        place.ask([(need, Cluster()) for need in place.now().needs])
        assert cloud.request["GPU"] == 2


def test_work_begins_once_the_largest_fits_and_a_lost_node_is_asked_for_again(cloud: Cloud) -> None:
    setups = sets_of(1, 2)
    with sets.joined(setups, None, None, "family.at_once") as place:
        assert cloud.said == [3]
        waiting = line(place, setups)
        one, two = waiting.take_now(), waiting.take_now()
        assert one and two and cloud.said == [3, 0]
        cloud.used = [*cloud.there]
        waiting.give_back(two)  # it lost its workers: a node is gone
        waiting.release(two)
        del cloud.there[cloud.used.pop()]
        cloud.sleep(1)
        assert waiting.take_now() is None and cloud.request["GPU"] == 3
        cloud.sleep(31)
        assert waiting.take_now() == two and cloud.request["GPU"] == 0


def test_a_cluster_that_has_just_enough_for_one_gets_it(cloud: Cloud) -> None:
    """A set beside others is counted with a CPU more, for Ray Data, which is not there."""
    cloud.most = 2
    setups = sets_of(1, 1)
    setups[0] = replace(setups[0], cluster=Cluster(replicas=4, gpus_per_replica=0.5))
    with sets.joined(setups, None, None, "family.at_once") as place:
        assert cloud.request["GPU"] <= 2 and len(cloud.there) == 2 and place.now().sets == 1


def test_what_never_comes_is_told_and_no_longer_asked_for(cloud: Cloud) -> None:
    with (
        pytest.raises(UserError, match="4 GPUs are needed, the cluster has 0 after 5 minutes"),
        sets.joined(sets_of(1, 4, wait_minutes=5), None, None, "family.at_once"),
    ):
        pass
    assert cloud.said[0] == 5 and cloud.said[-1] == 0 and not cloud.there


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ZeroDivisionError])
def test_nothing_is_asked_for_once_a_family_is_stopped(
    cloud: Cloud, stop: type[BaseException]
) -> None:
    setups = sets_of(1, 1)

    def stopped() -> None:
        with sets.joined(setups, None, None, "family.at_once") as place:
            line(place, setups).take_now()
            assert cloud.request["GPU"] == 2
            raise stop

    with pytest.raises(stop):
        stopped()
    assert cloud.request.total() == 0


def test_nothing_is_asked_for_where_nobody_is_to_wait(cloud: Cloud) -> None:
    cloud.there["a"] = cloud.now
    setups = sets_of(1, 1, wait_minutes=0)
    with sets.joined(setups, None, None, "family.at_once") as place:
        line(place, setups).take_now()
        assert cloud.said == [] and place.now().sets == 1


def test_as_many_as_are_to_work_at_once_are_asked_for(cloud: Cloud) -> None:
    cloud.most = 9
    setups = sets_of(2, 1, 3, 1)
    with sets.joined(setups, 2, None, "family.at_once") as place:
        assert cloud.said == [3, 5, 3], "the first two, and until they are there the largest two"
        waiting = line(place, setups)
        assert waiting.take_now() and waiting.take_now() and cloud.request["GPU"] == 3
