"""What this process asks an autoscaler for. A cluster has one such request. It says how much there
shall be in all, used or not, and stands until another takes its place; idle nodes that it needs
stay. So what is asked for has to be looked after:

- Other jobs take its place, and so does Ray: since a run has used Ray Data, an actor sends what Ray
  Data and Ray Train ask for, if only nothing, every 20 seconds. Then it is sent again.
- Ray's autoscaler of version 2 does nothing for a request that takes more nodes than it may start,
  and says so. Then less is asked for, and soon as much as there may be.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray._private.worker import global_worker
from ray.autoscaler.sdk import request_resources
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply
from ray.exceptions import RpcError

from fusegpt_ray.recipe.cluster_section import Cluster

Bundles = Counter[tuple[str, tuple[tuple[str, str], ...]]]
"""How many of one GPU or CPU each, by the labels of its node."""
Ask = Callable[[Sequence[Bundles]], None]
AGAIN = 1.0
"""Seconds after which it is worth looking at what became of a request."""
SURE = 20.0
"""Seconds after which an autoscaler would have refused it. It looks at it every five."""


def bundles(gpus: float, cpus: float, cluster: Cluster) -> Bundles:
    """A node with a GPU has CPUs, too, which serve the second kind of bundle."""
    labels = tuple(sorted(cluster.labels.items()))
    return Bundles({("GPU", labels): math.ceil(gpus), ("CPU", labels): math.ceil(cpus)})


@contextmanager
def asking() -> Iterator[Ask]:
    """Yields a function that asks for the first of some bundles in any case, and for as many of the
    others as the autoscaler can have; no longer for those of the call before. It is to be called
    again every second or so, to learn how many these are. With the end of the block nothing is
    asked for any more.

    Where several ask at the same time, there shall be what each of them wants in all.
    """
    who = object()
    try:
        yield lambda parts: _REQUEST.ask(who, parts)
    finally:
        if ray.is_initialized():
            _REQUEST.ask(who, [])


class _Request:
    """That of this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked: dict[object, Sequence[Bundles]] = {}
        self._sent, self._since, self._looked = Bundles(), -math.inf, -math.inf
        self._granted, self._refused = 0.0, math.inf
        """Of how many bundles one was not refused for a while, and one was."""

    def ask(self, who: object, parts: Sequence[Bundles]) -> None:
        with self._lock:
            now, same = time.monotonic(), self._asked.get(who, []) == parts
            if same and now < self._looked + AGAIN:
                return
            self._looked = now
            self._asked[who] = parts
            if not parts:
                del self._asked[who]
            if not self._asked:
                self._granted, self._refused = 0.0, math.inf
                if self._sent:
                    self._send(Bundles(), now)
                return
            stands, refused = _numbers()
            number = self._sent.total()
            if number in refused:
                self._granted, self._refused = min(self._granted, number - 1), number
            elif now >= self._since + SURE:
                self._granted = max(self._granted, number)
            wanted = Bundles()
            for one in self._asked.values():
                wanted |= self._possible(one)
            if wanted != self._sent or wanted.total() not in stands:
                self._send(wanted, now)

    def _possible(self, parts: Sequence[Bundles]) -> Bundles:
        """As many as were not refused; where some were, first half way from what was granted."""
        most = _within(self._refused - 1, parts)
        if self._refused == math.inf or most.total() <= self._granted:
            return most
        half = _within((self._granted + self._refused) / 2, parts)
        return half if half.total() > self._granted else most

    def _send(self, wanted: Bundles, now: float) -> None:
        each = [*wanted.elements()]
        labels = [dict(of) for _, of in each]
        where = {"bundle_label_selectors": labels} if any(labels) else {}
        try:
            request_resources(bundles=[{kind: 1} for kind, _ in each], **where)
        except RpcError:  # the cluster's head starts again, say: next time
            return
        if wanted != self._sent:
            self._sent, self._since = wanted, now


_REQUEST = _Request()


def _within(limit: float, parts: Sequence[Bundles]) -> Bundles:
    """The first one, and of the others those that fit."""
    whole = parts[0]
    for part in parts[1:]:
        if (whole + part).total() <= limit:
            whole = whole + part
    return whole


def _numbers() -> tuple[set[int], set[int]]:
    """Of how many bundles the request is that stands, if any does, and that of which the autoscaler
    says that it cannot have nodes for it.
    """
    try:
        told = GetClusterStatusReply.FromString(global_worker.gcs_client.get_cluster_status())
    except RpcError:
        return set(), set()
    stands = told.cluster_resource_state.cluster_resource_constraints
    refused = told.autoscaling_state.infeasible_cluster_resource_constraints
    return _counts(stands), _counts(refused)


def _counts(requests: Iterable[Any]) -> set[int]:
    return {sum(one.count for one in request.resource_requests) for request in requests}
