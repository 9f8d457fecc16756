"""When each of many runs works, foretold: they pass through the line of `waiting.py` as they do in
truth, by a clock that jumps from end to end. No torch.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fusegpt_ray.scheduling.waiting import Entry, Waiting
from fusegpt_ray.workers.room import Room


@dataclass(frozen=True)
class Work:
    """Seconds that a run takes."""

    name: str
    shared: float
    """Up to its last model, where its replicas and training workers live beside each other."""
    turns: float
    """The same where they take turns."""
    publishing: float
    """The rest, on its own workers."""
    put_off: float
    """The same on workers that are opened for it."""


@dataclass
class Span:
    """When a run works, in seconds from the beginning."""

    begins: float = 0.0
    leaves: float = 0.0
    """Its own workers."""
    ends: float = 0.0
    gpu_seconds: float = 0.0
    """For which it holds GPUs."""

    def later(self, seconds: float) -> Span:
        begins, leaves, ends = (time + seconds for time in (self.begins, self.leaves, self.ends))
        return Span(begins, leaves, ends, self.gpu_seconds)


@dataclass
class Schedule:
    """Of many runs."""

    spans: Mapping[str, Span]
    seconds: float
    """Until the last one ends."""
    most_gpus: float
    """That are held at the same time."""


def schedule(entries: Sequence[Entry[Work]], room: Room) -> Schedule:
    """Of runs in the order of a recipe, in this room."""
    return _Clock(Waiting(entries, lambda: room), room).run()


@dataclass
class _Clock:
    waiting: Waiting[Work]
    room: Room
    now: float = 0.0
    sets: list[tuple[float, int, Entry[Work], Entry[Work]]] = field(default_factory=list)
    """Until when each set of workers does something, its number, the job that it was opened for,
    and what it does."""
    opened: int = 0
    spans: dict[str, Span] = field(default_factory=dict)

    def run(self) -> Schedule:
        most = 0.0
        while self.waiting or self.sets:
            while len(self.sets) < self.room.at_once and (entry := self.waiting.take_now()):
                self._do(entry, entry)
            most = max(most, sum(first.need.gpus for *_, first, _ in self.sets))
            self.now, _, first, entry = heapq.heappop(self.sets)
            self._ended(first, entry)
        return Schedule(self.spans, self.now, most)

    def _do(self, first: Entry[Work], entry: Entry[Work]) -> None:
        """On the workers that were opened for the `first`."""
        work = entry.job
        if entry.publishes:
            self._until(self.now + work.put_off, first, entry)
            return
        self.spans[work.name] = Span(begins=self.now)
        alone = self.room.roomy or self.waiting.alone(entry)
        self._until(self.now + (work.shared if alone else work.turns), first, entry)

    def _until(self, time: float, first: Entry[Work], entry: Entry[Work]) -> None:
        self.opened += 1
        self.spans[entry.job.name].gpu_seconds += (time - self.now) * first.need.gpus
        heapq.heappush(self.sets, (time, self.opened, first, entry))

    def _ended(self, first: Entry[Work], entry: Entry[Work]) -> None:
        span, work = self.spans[entry.job.name], entry.job
        if not span.leaves:
            if not self.waiting.put_off(entry):
                span.leaves = self.now + work.publishing
                self._until(span.leaves, first, entry)
                return
            span.leaves = self.now
        span.ends = self.now
        if another := self.waiting.next_like(entry):
            self._do(first, another)
        else:
            self.waiting.release(first)
