"""Model replicas as Ray actors, to which tasks are handed out.

- A task's result does not depend on who computes it, or how often. A lost replica is replaced and
  its task given to another; a task that takes much longer than others of its cost is given to an
  idle replica as well, and the first result counts. (Not one of infinite cost, which writes.)
- A replica that does not make room for training in time counts as lost (see `silence.py`).
- A GPU that fails leaves a process that no longer can use it: such a replica counts as lost.
- Fewer tasks than replicas are spread over the nodes: a model's shards are written, and read back,
  by the networks and disks of all of them.
- Replicas live as long as the run and keep their process, their trunk and, where these fit (see
  `weights.py`), the blocks' weights. While a training worker uses a replica's GPU, the replica
  keeps all of that in the host's memory.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import ray
import torch
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

from fusegpt_ray.distributed.process import RunnerConfig
from fusegpt_ray.distributed.silence import SilentError, unanswered
from fusegpt_ray.model.device import hardware
from fusegpt_ray.model.memory import device_bytes, empty_cache, is_out_of_memory
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.model.stack import Stack

_LOG = logging.getLogger(__name__)
SLOW, SLOW_SECONDS = 2.0, 5.0
"""A task is given out a second time after so many times the seconds that the median of the finished
ones suggests, but not before so many seconds."""
MAX_LOST = 3
"""After so many replicas were lost over one task, the task is taken for the cause."""


_Arguments = dict[int, Any]
"""Of a task, by their places."""


class _Shared(NamedTuple):
    """What all tasks of a call of `map` have in common. It travels to a node once, not with each
    task: a stack of 80 blocks takes 100 KB.
    """

    function: Callable[..., Any]
    batch_size: int
    arguments: _Arguments
    """Those that are the same object in all tasks."""

    def own(self, task: tuple[Any, ...]) -> _Arguments:
        """What a task has beside."""
        return {at: argument for at, argument in enumerate(task) if at not in self.arguments}


@ray.remote(max_restarts=0)
class _Replica:
    def __init__(self, dense: Stack, config: RunnerConfig, gpus: float) -> None:
        self.dense, self.config, self.gpus = dense, config, gpus
        self.runner: Runner | None = None
        self.failed = False

    def run(self, shared: _Shared, own: _Arguments) -> tuple[str, Any]:
        """Returns the node's id, too."""
        if self.failed:  # only now nobody holds the frames in which memory ran out
            empty_cache()
        self.failed = True
        runner = self._runner()
        runner.reload()
        arguments = shared.arguments | own
        result = shared.function(
            runner.with_batch_size(shared.batch_size), *(arguments[at] for at in sorted(arguments))
        )
        self.failed = False
        return ray.get_runtime_context().get_node_id(), result

    def offload(self) -> None:
        """See `Runner.offload`."""
        if self.runner is not None:
            self.runner.offload()
        empty_cache()

    def _runner(self) -> Runner:
        """On the GPU that Ray gave this process, else on the CPU, whatever torch sees there: a Ray
        that the caller started may show GPUs to processes that asked for none.
        """
        if self.runner is None:
            if self.gpus and not torch.cuda.is_available():
                raise RuntimeError(
                    "Ray gave this replica a GPU, and torch cannot use it: "
                    "check the driver and torch's CUDA build"
                )
            device = torch.device("cuda" if self.gpus else "cpu")
            self.runner = self.config.runner(self.dense, device)
        return self.runner


class _Facts(NamedTuple):
    streams: bool
    hardware: dict[str, str]
    device_bytes: int


@dataclass
class _Call:
    actor: Any
    task: int | None
    """Its number; None where nobody waits for it any more."""
    began: float


class Replicas:
    """The replicas of a run. They start when they are first needed, if nobody starts them before,
    and read weights only then.
    """

    def __init__(
        self,
        dense: Stack,
        config: RunnerConfig,
        count: int,
        cpus: float,
        gpus: float,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        """`cpus`, `gpus`: what each takes of the cluster; `labels`: of the nodes that it takes."""
        self.dense, self.config, self.count = dense, config, count
        self.cpus, self.gpus, self.labels = cpus, gpus, dict(labels or {})
        self._idle: list[Any] = []
        self._calls: dict[ray.ObjectRef, _Call] = {}
        self._nodes: dict[Any, str] = {}
        """Of replicas that have done a task."""

    @property
    def streams(self) -> bool:
        """Whether replicas read the weights for every walk."""
        return self._facts.streams

    @property
    def hardware(self) -> dict[str, str]:
        """See `model.device.hardware`."""
        return self._facts.hardware

    @property
    def device_bytes(self) -> int:
        """See `Workers.device_bytes`."""
        return self._facts.device_bytes

    @cached_property
    def _facts(self) -> _Facts:
        """What one of them, which is asked once, tells of itself."""
        ((_, facts),) = self.map(_tell, [()], self.config.batch_size)
        assert isinstance(facts, _Facts)
        return facts

    def map(
        self,
        function: Callable[..., Any],
        tasks: Sequence[tuple[Any, ...]],
        batch_size: int,
        costs: Sequence[float] | None = None,
    ) -> Iterator[tuple[int, Any]]:
        """See `workers.base.Workers.map`.

        Raises:
            RayActorError, torch.AcceleratorError: replicas were lost again and again over the same
                task.
        """
        waiting, left = deque(range(len(tasks))), len(tasks)
        costs = costs or [1.0] * len(tasks)
        paces: list[float] = []
        """Seconds by cost, of the tasks that are done."""
        lost: Counter[int] = Counter()
        columns = enumerate(zip(*tasks, strict=True))
        alike = {at: all_of[0] for at, all_of in columns if all(it is all_of[0] for it in all_of)}
        shared = _Shared(function, batch_size, alike)
        stored = ray.put(shared)
        # What is still running was given out twice, or belongs to an attempt that failed.
        for call in self._calls.values():
            call.task = None
        self.start()
        while left:
            while self._idle and (number := self._next(waiting, costs, paces)) is not None:
                actor = self._take()
                ref = actor.run.remote(stored, shared.own(tasks[number]))
                self._calls[ref] = _Call(actor, number, time.monotonic())
            for ref in ray.wait(list(self._calls), num_returns=1, timeout=1)[0]:
                call = self._calls.pop(ref)
                found = self._outcome(ref, call, waiting, lost)
                if call.task is not None and found is not None:
                    for other in self._calls.values():
                        other.task = None if other.task == call.task else other.task
                    left -= 1
                    paces.append((time.monotonic() - call.began) / costs[call.task])
                    yield call.task, found[0]

    def _outcome(
        self, ref: ray.ObjectRef, call: _Call, waiting: deque[int], lost: Counter[int]
    ) -> tuple[Any] | None:
        """The result of a call that has ended; nothing where its replica was lost."""
        try:
            self._nodes[call.actor], result = ray.get(ref)
        except Exception as error:
            cause = _cause(error)
            if _is_loss(cause):
                ray.kill(call.actor)  # it may be there, on a GPU that failed
                self._nodes.pop(call.actor, None)
                self._idle.insert(0, self._start())  # asked last: there may be no place for it
                if call.task is None or call.task in self._running():
                    return None
                lost[call.task] += 1
                if not is_out_of_memory(cause) and lost[call.task] <= MAX_LOST:
                    waiting.appendleft(call.task)
                    return None
            else:
                self._idle.append(call.actor)
                if call.task is None:  # nobody waits for it
                    return None
            if cause is not error:
                raise cause from error  # as the function raised it, not wrapped in Ray's
            raise
        self._idle.append(call.actor)
        return (result,)

    def start(self) -> None:
        """Have as many as there should be."""
        while len(self._idle) + len(self._calls) < self.count:
            self._idle.append(self._start())

    def offload(self) -> None:
        """Make room on all GPUs, once the replicas have done what they are at, which nobody waits
        for. Those that are lost are replaced.
        """
        actors = [*self._idle, *(call.actor for call in self._calls.values())]
        asked = {actor.offload.remote(): actor for actor in actors}
        silent = unanswered(list(asked))
        for ref, actor in asked.items():
            try:
                if ref in silent:
                    raise self._silent(actor)
                ray.get(ref)
            except Exception as error:
                if not _is_loss(_cause(error)):
                    raise
                if ref in silent:
                    _LOG.warning("%s", error)
                ray.kill(actor)
                self._nodes.pop(actor, None)
                self._idle = [one for one in self._idle if one != actor]
                calls = self._calls.items()
                self._calls = {ref: call for ref, call in calls if call.actor != actor}
        self.start()

    def close(self) -> None:
        """End the replicas at once; the next call starts others."""
        for actor in [*self._idle, *(call.actor for call in self._calls.values())]:
            ray.kill(actor)
        self._idle, self._calls, self._nodes = [], {}, {}

    def _silent(self, actor: Any) -> SilentError:
        where = f" on node {self._nodes[actor]}" if actor in self._nodes else ""
        advice = "another takes its place; if this comes again, check the node's GPUs and folders"
        return SilentError(f"a replica{where}", advice)

    def _take(self) -> Any:
        """An idle one of the node on which the fewest work; of these the one that was asked last.
        Those that have done nothing yet come last: there may be no place for them.
        """
        work = Counter(self._nodes.get(call.actor) for call in self._calls.values())
        nodes = [self._nodes.get(actor) for actor in self._idle]
        last_first = reversed(range(len(nodes)))
        return self._idle.pop(min(last_first, key=lambda at: (nodes[at] is None, work[nodes[at]])))

    def _start(self) -> Any:
        options: dict[str, Any] = {"num_cpus": self.cpus, "num_gpus": self.gpus}
        if self.labels:
            options["label_selector"] = self.labels
        new = _Replica.options(**options)  # type: ignore[attr-defined]
        return new.remote(self.dense, self.config, self.gpus)

    def _next(
        self, waiting: deque[int], costs: Sequence[float], paces: Sequence[float]
    ) -> int | None:
        """The task to give out: one that waits, else the one that is most overdue."""
        if waiting:
            return waiting.popleft()
        pace = statistics.median(paces) if paces else math.inf
        times, now = Counter(self._running()), time.monotonic()
        overdue = {
            call.task: now - call.began - max(SLOW * pace * costs[call.task], SLOW_SECONDS)
            for call in self._calls.values()
            if call.task is not None and times[call.task] == 1 and costs[call.task] < math.inf
        }
        latest = max(overdue, key=lambda task: overdue[task], default=None)
        return latest if latest is not None and overdue[latest] > 0 else None

    def _running(self) -> list[int | None]:
        return [call.task for call in self._calls.values()]


def _cause(error: Exception) -> Exception:
    """What was raised in a replica, if anything was; else what Ray says of it."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
        return error.cause
    return error


def _is_loss(cause: Exception) -> bool:
    """Whether a process has ended, or can use its GPU no more: after an error of CUDA that is not
    about memory, all that it asks of the GPU fails.
    """
    if isinstance(cause, torch.AcceleratorError):
        return not is_out_of_memory(cause)
    return isinstance(cause, RayActorError | OutOfMemoryError | SilentError)


def _tell(runner: Runner) -> _Facts:
    device = runner.device
    share = runner.memory_share if device.type == "cuda" else runner.host_share
    room = device_bytes(device) * share
    return _Facts(not runner.resident, hardware(device, runner.compiled), int(room))
