"""The mailbox through which the driver and the training workers talk while Ray Train runs them.

The driver posts one task after another. Every worker takes each task and leaves its result. Workers
that Ray Train has started again take the unfinished task once more.
"""

from __future__ import annotations

import asyncio
import pickle
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray

if TYPE_CHECKING:
    from fusegpt_ray.distributed.serve import Job
    from fusegpt_ray.workers.base import News

MAX_FAILURES = 3
"""How often a task is begun again after a worker or node was lost, without having come further.
Every attempt gives the same result, so more attempts would only hide what is wrong."""


@dataclass
class Outcome:
    """What has become of a task."""

    results: list[Any] | None = None
    """By rank, once all workers have left theirs."""
    error: bytes = b""
    """A pickled exception, where the task has failed for good."""
    news: list[News] = field(default_factory=list)


class _Mailbox:
    """All methods run in one event loop, so none interrupts another between two awaits."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.number = 0
        self.task: list[ray.ObjectRef] = []
        self.results: dict[int, Any] = {}
        self.error, self.last_error = b"", b""
        self.attempts, self.furthest = 0, 0
        """`furthest`: the last part of a training that was done."""
        self.first = ""
        """The process that is worker 0 now."""
        self.news: list[News] = []
        self.closed = self.ending = False
        self.changed = asyncio.Condition()

    # --- the driver's side ---

    async def post(self, task: list[ray.ObjectRef]) -> int:
        """Give the workers a task; returns its number."""
        self.number, self.task = self.number + 1, task
        self.results, self.error, self.last_error = {}, b"", b""
        self.attempts, self.furthest = 0, 0
        await self._notify()
        return self.number

    async def outcome(self, seconds: float) -> Outcome:
        """What is new since the last call. Waits at most so long if there is nothing."""
        async with self.changed:
            if not (self._over or self.news):
                with suppress(TimeoutError):
                    await asyncio.wait_for(self.changed.wait(), seconds)
        news, self.news = self.news, []
        done = len(self.results) == self.workers
        results = [self.results[rank] for rank in range(self.workers)] if done else None
        return Outcome(results, self.error, news)

    async def hold(self, job: Job) -> None:
        """Run the Ray Train job to its end."""
        await asyncio.to_thread(job.fit)

    async def end(self) -> None:
        """The workers are to end what they train as soon as they have saved it."""
        self.ending = True
        await self._notify()

    async def close(self) -> None:
        """No more tasks: the workers end."""
        self.closed = True
        await self._notify()

    # --- the workers' side ---

    async def take(
        self, last: int, rank: int, process: str
    ) -> tuple[int, list[ray.ObjectRef]] | None:
        """The first unfinished task after number `last`, once there is one; None when the mailbox
        is closed.

        Args:
            process: names the worker's process. One that was lost may have left a call that still
                waits here, and its successor's attempts are not to be counted twice.
        """
        if rank == 0:
            self.first = process
        async with self.changed:
            while True:
                while not self.closed and (self.number <= last or self._over):
                    await self.changed.wait()
                if self.closed or (rank == 0 and self.first != process):
                    return None
                self.attempts += rank == 0
                if self.attempts <= MAX_FAILURES + 1:
                    return self.number, self.task
                lost = RuntimeError(f"training workers were lost {MAX_FAILURES + 1} times")
                self.error = self.last_error or pickle.dumps(lost)
                self.changed.notify_all()

    async def finish(self, number: int, rank: int, result: Any) -> None:
        """Leave a worker's result. It counts even if the worker is lost afterwards, because every
        attempt has the same result.
        """
        if number == self.number and not self.error:
            self.results[rank] = result
            await self._notify()

    async def fail(self, number: int, error: bytes, final: bool) -> None:
        """Tell what a worker raised. Unless it is final, the task is attempted again."""
        if number == self.number and not self._over:
            self.last_error = error
            if final:
                self.error = error
            else:
                problem = pickle.loads(error)
                again = "this attempt at the group ends"
                self.news.append(f"WARNING: {type(problem).__name__}: {problem}; {again}")
            await self._notify()

    async def told_to_end(self) -> None:
        """Returns once the driver has said so."""
        async with self.changed:
            await self.changed.wait_for(lambda: self.ending or self.closed)

    async def report(self, news: News) -> None:
        if not isinstance(news, str) and news[0] > self.furthest:
            self.attempts, self.furthest = 1, news[0]
        self.news.append(news)
        await self._notify()

    @property
    def _over(self) -> bool:
        return bool(self.error) or len(self.results) == self.workers

    async def _notify(self) -> None:
        async with self.changed:
            self.changed.notify_all()


Mailbox = ray.remote(num_cpus=0, max_concurrency=1000)(_Mailbox)
