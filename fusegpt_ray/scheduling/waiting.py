"""Which of the jobs that wait is next, where several are done at the same time. No torch."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from fusegpt_ray.workers.room import ANY, Need

T = TypeVar("T")
PATIENCE = 1.0
"""Seconds after which one that waits looks whether it was stopped."""


@dataclass(frozen=True)
class Entry(Generic[T]):
    """A job in the line."""

    job: T
    group: int
    """Jobs of one group can use the same workers."""
    need: Need = Need()  # noqa: RUF009
    """Of these workers."""
    priority: int = 0
    publisher: Need | None = None
    """Of workers on which it may publish later, if others wait for its own; None: it does not."""

    @property
    def publishes(self) -> bool:
        """Whether that is all that is left to do."""
        return self.group < 0


class Waiting(Generic[T]):
    """The line, from several threads. Whoever takes a job has what its workers need of `total`
    until they are released.

    The highest priority goes first, and nothing of a lower one takes what it waits for. Within a
    priority, what fits goes before what does not, groups without workers go first, and then the
    order is that in which jobs were given. A job that needs more than `total` goes when nobody else
    has anything, and nobody else goes as long as it does.
    """

    def __init__(self, entries: Iterable[Entry[T]], total: Need = ANY) -> None:
        self._line = [*entries]
        self._every, self._total = [*self._line], total
        self._taken: list[Entry[T]] = []
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._line)

    def take(self, but: Collection[int] = ()) -> Entry[T] | None:
        """The next one, once it fits; None if none waits but those of the groups `but`."""
        with self._changed:
            while able := [entry for entry in self._line if entry.group not in but]:
                if found := self._fitting(able):
                    self._line.remove(found)
                    self._taken.append(found)
                    return found
                self._changed.wait(PATIENCE)
        return None

    def take_now(self) -> Entry[T] | None:
        """The next one; None if none fits."""
        with self._changed:
            if found := self._fitting(self._line) if self._line else None:
                self._line.remove(found)
                self._taken.append(found)
            return found

    def next_like(self, entry: Entry[T]) -> Entry[T] | None:
        """The next one that can use the same workers, unless others go before it."""
        with self._changed:
            highest = max((other.priority for other in self._line), default=0)
            for other in self._line:
                if (other.group, other.priority) == (entry.group, highest):
                    self._line.remove(other)
                    return other
        return None

    def of_group(self, group: int) -> list[Entry[T]]:
        """Those of it that wait."""
        with self._changed:
            return [entry for entry in self._line if entry.group == group]

    def remove(self, entry: Entry[T]) -> bool:
        """It is not to be done any more; whether it was in the line."""
        with self._changed:
            if there := entry in self._line:
                self._line.remove(entry)
            return there

    def give_back(self, entry: Entry[T]) -> None:
        """It is to be done by another one."""
        with self._changed:
            self._line.insert(0, entry)
            self._changed.notify_all()

    def put_off(self, entry: Entry[T]) -> bool:
        """A job that only has to publish goes to the end of the line, so that its workers are free
        for others; whether any wait for them. Those that publish of one group are a group, too.
        """
        with self._changed:
            need = entry.publisher
            if not self._line or need is None or entry.publishes or entry.need.within(need):
                return False
            self._line.append(Entry(entry.job, -1 - entry.group, need, entry.priority))
            self._changed.notify_all()
            return True

    def release(self, entry: Entry[T]) -> None:
        """The workers that were opened for this one are closed."""
        with self._changed:
            self._taken.remove(entry)
            self._changed.notify_all()

    def alone(self, entry: Entry[T]) -> bool:
        """Whether no other job has room beside it; those that publish do not count."""
        others = (other.need for other in self._every if other is not entry)
        return not any(Need.of_all([entry.need, need]).within(self._total) for need in others)

    def _fitting(self, able: Sequence[Entry[T]]) -> Entry[T] | None:
        at_work = Counter(entry.group for entry in self._taken)
        order = sorted(able, key=lambda entry: (-entry.priority, at_work[entry.group]))
        for entry in order:
            if entry.priority < order[0].priority:
                return None
            if self._fits(entry):
                return entry
        return None

    def _fits(self, entry: Entry[T]) -> bool:
        if not self._taken:
            return True
        return Need.of_all([other.need for other in (*self._taken, entry)]).within(self._total)
