"""Which of the jobs that wait is next, where several are done at the same time. No torch."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from fusegpt_ray.workers.room import Need, Room

T = TypeVar("T")
PATIENCE = 1.0
"""Seconds after which one that waits looks again at the room, and whether it was stopped."""


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
    both: Need | None = None
    """Of workers that need not take turns; None: the same."""

    @property
    def publishes(self) -> bool:
        """Whether that is all that is left to do."""
        return self.group < 0


class Waiting(Generic[T]):
    """The line, from several threads. Whoever takes a job has what its workers need of the room
    until they are released.

    The highest priority goes first, and nothing of a lower one takes what it waits for. Within a
    priority, what fits goes before what does not, groups without workers go first, and then the
    order is that in which jobs were given. A job that needs more than there is goes when nobody
    else has anything, and nobody else goes as long as it does.
    """

    def __init__(
        self,
        entries: Iterable[Entry[T]],
        room: Callable[[], Room],
        ask: Callable[[Sequence[Entry[T]]], None] = lambda entries: None,
    ) -> None:
        """
        Args:
            room: that there is now. Where it has become smaller than what is taken, nobody takes
                more until enough is released.
            ask: is told of all that could be at work now if there were room: those that are, and
                then those that wait; of none, as soon as none waits.
        """
        self._line = [*entries]
        self._every, self._room, self._ask = [*self._line], room, ask
        self._taken: list[tuple[Entry[T], Need]] = []
        self._left = set[int]()
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._line)

    def take(self, last: bool = False) -> Entry[T] | None:
        """The next one, once it fits; None if none waits but those of groups that were left. The
        `last` one that takes is given these, too.
        """
        with self._change():
            while able := self._line if last else self._able():
                if found := self._fitting(able):
                    return self._out(found)
                self._tell()
                self._changed.wait(PATIENCE)
        return None

    def take_now(self) -> Entry[T] | None:
        """The next one; None if none fits."""
        with self._change():
            found = self._fitting(self._line) if self._line else None
            return self._out(found) if found else None

    def next_like(self, entry: Entry[T]) -> Entry[T] | None:
        """The next one that can use the same workers, unless others go before it."""
        with self._change():
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
        with self._change():
            if there := entry in self._line:
                self._line.remove(entry)
            return there

    def give_back(self, entry: Entry[T], leave: bool = False) -> None:
        """It is to be done by another one. `leave`: nobody is to open workers for its group before
        the end.
        """
        with self._change():
            self._line.insert(0, entry)
            if leave:
                self._left.add(entry.group)

    def put_off(self, entry: Entry[T]) -> bool:
        """A job that only has to publish goes to the end of the line, so that its workers are free
        for others; whether any wait for them. Those that publish of one group are a group, too.
        """
        with self._change():
            need = entry.publisher
            if not self._line or need is None or entry.publishes or entry.need.within(need):
                return False
            self._line.append(Entry(entry.job, -1 - entry.group, need, entry.priority))
            return True

    def release(self, entry: Entry[T]) -> None:
        """The workers that were opened for this one are closed."""
        with self._change():
            self._taken.remove(next(one for one in self._taken if one[0] == entry))

    def beside(self, entry: Entry[T]) -> tuple[int, bool]:
        """For how many sets of workers there is room where one is opened for this job, which was
        taken: 1 where it is alone. And whether they need not take turns: it takes more then.
        """
        with self._change():
            room = self._room()
            if self._alone(entry, room):
                return 1, False
            if room.roomy:
                place = self._taken.index((entry, entry.need))
                self._taken[place] = (entry, entry.both or entry.need)
            return room.sets, room.roomy

    def alone(self, entry: Entry[T]) -> bool:
        """Whether no other job has room beside it; those that publish do not count."""
        with self._changed:
            return self._alone(entry, self._room())

    @contextmanager
    def _change(self) -> Iterator[None]:
        with self._changed:
            yield
            self._tell()
            self._changed.notify_all()

    def _tell(self) -> None:
        able = self._able()
        self._ask([*(entry for entry, _ in self._taken), *able] if able else [])

    def _able(self) -> list[Entry[T]]:
        waiting = [entry for entry in self._line if entry.group not in self._left]
        return sorted(waiting, key=lambda entry: -entry.priority)

    def _out(self, entry: Entry[T]) -> Entry[T]:
        self._line.remove(entry)
        self._taken.append((entry, entry.need))
        return entry

    def _alone(self, entry: Entry[T], room: Room) -> bool:
        others = (other.need for other in self._every if other is not entry)
        return not any(Need.of_all([entry.need, need]).within(room.total) for need in others)

    def _fitting(self, able: Sequence[Entry[T]]) -> Entry[T] | None:
        total = self._room().total
        at_work, held = (
            Counter(one.group for one, _ in self._taken),
            [need for _, need in self._taken],
        )
        order = sorted(able, key=lambda entry: (-entry.priority, at_work[entry.group]))
        for entry in order:
            if entry.priority < order[0].priority:
                break
            if Need.of_all([*held, entry.need]).within(total):
                return entry
        return None if self._taken else order[0]
