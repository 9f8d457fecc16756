"""Model replicas as Ray actors, to which work is handed out share by share.

Notable:
- a share's result does not depend on who computes it, or how often: a lost replica is replaced and its share given out again, and a
  share that takes much longer than others of its cost is given to an idle replica as well; the first result counts;
- replicas live until the engine needs their place for training: in between they keep their process, their trunk and, where these fit
  (see `weights.py`), the blocks' weights.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ray
import torch
from ray.exceptions import OutOfMemoryError, RayActorError

from fusegpt_ray.model.cache import BlockCache
from fusegpt_ray.model.memory import is_out_of_memory, release
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.model.source import Source
from fusegpt_ray.model.stack import Stack

SLOW, SLOW_SECONDS = 2.0, 5.0
"""A share is given out a second time after so many times what it should take by the median of those that are done, but not before
so many seconds."""
SHARES_EACH = 4
MAX_LOST = 3
"""How many replicas may be lost over one share before it is taken for the cause."""


@dataclass(frozen=True)
class Replica:
    """What one replica takes of the cluster, and how it computes."""

    count: int
    cpus: float
    gpus: float
    threads: int
    """Threads of torch on a CPU."""
    dtype: torch.dtype
    """Of the arithmetic."""
    rows: int
    weights: Literal["auto", "resident", "streamed"] = "auto"
    share: float = 1.0
    """Of the free memory where it runs; see `Runner`."""
    cache_gb: float | None = None
    source: Source | None = None
    """Of a hub model, which a node that joins later does not have yet."""

    def runner(self, stack: Stack) -> Runner:
        """On the GPU that Ray gave this process, else on the CPU (Ray does not hide GPUs from who asked for none)."""
        torch.set_num_threads(self.threads)
        if self.source is not None:
            self.source.fetch()
        if self.gpus and not torch.cuda.is_available():
            raise RuntimeError(
                "Ray gave this replica a GPU, and torch cannot use it: check the driver and torch's CUDA build"
            )
        device, cache = torch.device("cuda" if self.gpus else "cpu"), BlockCache.open(self.cache_gb)
        return Runner(stack, device, self.dtype, self.rows, self.weights, self.share, cache)


@ray.remote(max_restarts=0)
class _Replica:
    def __init__(self, dense: Stack, replica: Replica) -> None:
        self.dense, self.replica = dense, replica
        self.runner: Runner | None = None
        self.failed = False

    def run(self, function: Callable[..., Any], rows: int, *arguments: Any) -> Any:
        if self.failed:  # only now nobody holds the frames in which memory ran out
            release()
        self.failed = True
        if self.runner is None:
            self.runner = self.replica.runner(self.dense)
        result = function(self.runner.with_batch_size(rows), *arguments)
        self.failed = False
        return result


@dataclass
class _Call:
    actor: Any
    refs: list[ray.ObjectRef]
    share: int | None
    """Its number; None: nobody waits for it any more."""
    began: float


class Replicas:
    """The replicas of a run. They start when they are first needed."""

    def __init__(self, dense: Stack, replica: Replica) -> None:
        self.dense, self.replica = dense, replica
        self._idle: list[Any] = []
        self._calls: dict[ray.ObjectRef, _Call] = {}
        self._streams: bool | None = None

    @property
    def streams(self) -> bool:
        """Whether replicas read the weights for every walk, so that many windows should walk together. Asked of one of them once."""
        if self._streams is None:
            ((_, self._streams),) = self.map(_streams, [()], self.replica.rows)
        assert self._streams is not None
        return self._streams

    @property
    def pieces(self) -> int:
        """Into how many shares to cut work: more than replicas where that costs nothing, so that quick ones do more than slow ones."""
        return self.replica.count * (1 if self.streams else SHARES_EACH)

    def map(
        self,
        function: Callable[..., Any],
        shares: Sequence[tuple[Any, ...]],
        rows: int,
        costs: Sequence[float] | None = None,
    ) -> Iterator[tuple[int, Any]]:
        """`function(runner, *share)` for each share: (number of the share, result), as they come.

        `rows`: of the runner. `costs`: of the shares, in any unit, where they are not about the same.
        """
        for number, refs in self.map_refs(function, shares, rows, 1, costs):
            yield number, ray.get(refs[0])

    def map_refs(
        self,
        function: Callable[..., Any],
        shares: Sequence[tuple[Any, ...]],
        rows: int,
        returns: int,
        costs: Sequence[float] | None = None,
    ) -> Iterator[tuple[int, list[ray.ObjectRef]]]:
        """As `map`, for a function of so many results, which stay where they are; only the first of them is looked at.

        Raises:
            RayActorError: replicas were lost again and again over the same share.
        """
        waiting, left = deque(range(len(shares))), len(shares)
        costs = costs or [1.0] * len(shares)
        paces: list[float] = []
        """Seconds by cost, of the shares that are done."""
        lost: Counter[int] = Counter()
        for call in (
            self._calls.values()
        ):  # left over from a share that was given out twice, or from an attempt that failed
            call.share = None
        while len(self._idle) + len(self._calls) < self.replica.count:
            self._idle.append(self._start())
        while left:
            while self._idle and (number := self._next(waiting, costs, paces)) is not None:
                actor = self._idle.pop()
                found = actor.run.options(num_returns=returns).remote(
                    function, rows, *shares[number]
                )
                refs = found if returns > 1 else [found]
                self._calls[refs[0]] = _Call(actor, refs, number, time.monotonic())
            for ref in ray.wait(list(self._calls), num_returns=1, timeout=1)[0]:
                call = self._calls.pop(ref)
                try:
                    ray.get(ref)
                except (RayActorError, OutOfMemoryError) as error:
                    self._idle.insert(
                        0, self._start()
                    )  # it is asked last: there may be no place for it
                    if call.share is not None and call.share not in self._shares():
                        lost[call.share] += 1
                        if is_out_of_memory(error) or lost[call.share] > MAX_LOST:
                            raise
                        waiting.appendleft(call.share)
                except Exception:
                    self._idle.append(call.actor)
                    if call.share is not None:  # else nobody waits for it
                        raise
                else:
                    self._idle.append(call.actor)
                    if call.share is not None:
                        for other in self._calls.values():
                            other.share = None if other.share == call.share else other.share
                        left -= 1
                        paces.append((time.monotonic() - call.began) / costs[call.share])
                        yield call.share, call.refs

    def close(self) -> None:
        """End the replicas, at once; the next call starts others."""
        for actor in [*self._idle, *(call.actor for call in self._calls.values())]:
            ray.kill(actor)
        self._idle, self._calls = [], {}

    def _start(self) -> Any:
        options = {"num_cpus": self.replica.cpus, "num_gpus": self.replica.gpus}
        return _Replica.options(**options).remote(self.dense, self.replica)  # type: ignore[attr-defined]

    def _next(
        self, waiting: deque[int], costs: Sequence[float], paces: Sequence[float]
    ) -> int | None:
        """The share to give out: one that waits, else the one that is most overdue where it is."""
        if waiting:
            return waiting.popleft()
        pace = statistics.median(paces) if paces else math.inf
        times, now = Counter(self._shares()), time.monotonic()
        overdue = {
            call.share: now - call.began - max(SLOW * pace * costs[call.share], SLOW_SECONDS)
            for call in self._calls.values()
            if call.share is not None and times[call.share] == 1
        }
        latest = max(overdue, key=lambda share: overdue[share], default=None)
        return latest if latest is not None and overdue[latest] > 0 else None

    def _shares(self) -> list[int | None]:
        return [call.share for call in self._calls.values()]


def _streams(runner: Runner) -> bool:
    return not runner.keeps
