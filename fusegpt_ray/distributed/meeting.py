"""Where the training workers wait for each other, and how long: outside of collectives, which
cannot tell a slow worker from a lost one.

- A collective waits `TIMEOUT` seconds for the others. So whatever takes one worker longer than them
  (reading blocks, writing its part of a training checkpoint or of the group) is followed by a
  meeting, and only then by the next collective.
- A worker that waits in a meeting watches the others' heartbeats, which a thread of each sends.
  A process that is stopped, or a machine that is gone, sends none.
- A worker that sends heartbeats while its work hangs is given up, too: after the time in which a
  slow store would have moved the bytes.
"""

from __future__ import annotations

import re
import threading
import time
from concurrent.futures import Future
from types import TracebackType
from typing import Self

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed import distributed_c10d

from fusegpt_ray.store.retry import retry_seconds

TIMEOUT = 600.0
"""Seconds that a worker may be silent, in a collective or between two heartbeats."""
SLOWEST = 1e6
"""Bytes a second of the slowest store that is waited for."""
LONGEST_PAUSE = 0.25


class LostWorkerError(RuntimeError):
    """A worker of the group sends no heartbeat, or does not come to its end."""


def lost_worker(error: Exception, timeout: float) -> LostWorkerError | None:
    """What an exception says of another worker, if it says that it was waited for in vain."""
    if isinstance(error, LostWorkerError):
        return error
    # gloo has no kind of its own for it.
    if isinstance(error, RuntimeError) and re.search(r"(?i)time(d )?out", str(error)):
        return LostWorkerError(f"a training worker has taken no part for {timeout:g} s")
    return None


class Meeting:
    """Of this worker with all others. While the block lasts, a thread sends its heartbeats."""

    def __init__(self, store: Store, rank: int, count: int, timeout: float = TIMEOUT) -> None:
        self._store, self._rank, self._count, self._timeout = store, rank, count, timeout
        self._met = 0
        self._looked = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._live, name="heartbeats", daemon=True)

    @classmethod
    def of_group(cls, timeout: float) -> Self:
        """In the store by which the process group has met."""
        store = PrefixStore("meeting", distributed_c10d._get_default_store())
        return cls(store, dist.get_rank(), dist.get_world_size(), timeout)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join(1.0)  # where the store does not answer, it never ends

    def wait(self, moved: int = 0) -> None:
        """Return once all workers have come here; all of them wait equally often.

        `moved`: bytes that any of them may have to read or write by itself on the way.

        Raises:
            LostWorkerError: one of them did not come.
        """
        self._looked = time.monotonic()
        all_here: Future[None] = Future()
        longest = 2 * self._timeout + retry_seconds() + moved / SLOWEST
        threading.Thread(target=self._watch, args=(all_here, longest), daemon=True).start()
        while True:
            try:
                return all_here.result(self._timeout / 20)
            except TimeoutError:
                if time.monotonic() > self._looked + self._timeout:
                    problem = f"in whose store all meet, is silent for {self._timeout:g} s"
                    raise LostWorkerError(f"training worker 0, {problem}") from None

    def told(self, word: str) -> list[str]:
        """What each worker tells, by rank. They meet for it: see `wait`."""
        self._store.set(f"told/{self._rank}", word)
        self.wait()
        return [self._store.get(f"told/{rank}").decode() for rank in range(self._count)]

    def _watch(self, all_here: Future[None], longest: float) -> None:
        """Ask the store, which may never answer, until all are there."""
        try:
            self._wait(longest)
        except Exception as error:  # for the thread that waits
            all_here.set_exception(error)
        else:
            all_here.set_result(None)

    def _wait(self, longest: float) -> None:
        self._met += 1
        here = f"met/{self._met}"
        self._store.add(f"{here}/{self._rank}", 1)
        self._store.add(here, 1)
        began = looked = time.monotonic()
        beats = dict.fromkeys(range(self._count), (0, began))
        pause = 0.001
        while self._store.add(here, 0) < self._count:
            self._looked = now = time.monotonic()
            if now > looked + self._timeout / 20:
                looked = now
                for rank in [rank for rank in beats if not self._store.add(f"{here}/{rank}", 0)]:
                    beat = self._store.add(f"heartbeat/{rank}", 0)
                    if beat != beats[rank][0]:
                        beats[rank] = beat, now
                    elif now > beats[rank][1] + self._timeout:
                        problem = f"sent no heartbeat for {self._timeout:g} s"
                        raise LostWorkerError(f"training worker {rank} {problem}")
                    if now > began + longest:
                        problem = f"lives, but did not come to the others for {longest:.0f} s"
                        raise LostWorkerError(f"training worker {rank} {problem}")
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _live(self) -> None:
        while True:
            try:
                self._store.add(f"heartbeat/{self._rank}", 1)
            except RuntimeError:  # the store is gone: whoever waits there finds it, too
                return
            if self._stop.wait(self._timeout / 10):
                return
