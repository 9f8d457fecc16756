"""The cells that can use the same workers, one after another or several at once: each slot opens a
set of workers and takes the next cell that waits.
"""

from __future__ import annotations

import ctypes
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import TracebackType
from typing import Self

from fusegpt_ray.comparison.cells import SECTION, Comparison, Run
from fusegpt_ray.compression import Compression
from fusegpt_ray.errors import StorageError, UserError, first_line
from fusegpt_ray.pipeline import open_workers, room_for_sets
from fusegpt_ray.plan import Plan
from fusegpt_ray.report import Display
from fusegpt_ray.run.outputs import SHARED_FOLDER, TRAINING_FOLDER
from fusegpt_ray.run.shared import Shared
from fusegpt_ray.store import storage
from fusegpt_ray.workers.base import Setup, Workers


@dataclass
class Job:
    """A cell, and what became of it."""

    run: Run
    plan: Plan
    begun: Compression | None = None
    """Its texts are drawn."""
    problem: str = ""
    """Why it failed."""

    @property
    def id(self) -> str:
        """The run's; see `run_id`."""
        return self.begun.id if self.begun else ""


class Slots:
    """Carries out jobs."""

    def __init__(
        self,
        jobs: Sequence[Job],
        comparison: Comparison,
        show: Display,
        restart: bool,
        worked: bool,
    ) -> None:
        """`worked`: whether anything has been worked on before, so that the user's mistakes do not
        end the comparison any more.
        """
        self.jobs, self.comparison, self.show, self.restart = jobs, comparison, show, restart
        self.worked = worked
        self._shared = Shared(storage.join(comparison.folder, SHARED_FOLDER))
        self._waiting = deque(jobs)
        self._sets, self._ended, self._telling = 1, 0, threading.Lock()

    @cached_property
    def _setup(self) -> Setup:
        trains = any(job.plan.setup.trains for job in self.jobs)
        return replace(self.jobs[0].plan.setup, trains=trains)

    def run(self) -> None:
        """All jobs; one that fails is told.

        Raises:
            Exception: nothing has been worked on yet, and nothing can be; or the only workers,
                which had done everything, could not be ended.
        """
        try:
            self._run()
        except Exception as error:
            if not self.worked or not self._waiting:
                raise
            while job := self._next():
                self._failed(job, error, self.show)

    def _run(self) -> None:
        asked, key = self.comparison.at_once, f"{SECTION}.at_once"
        with room_for_sets(self._setup, asked, len(self.jobs), key) as self._sets, Threads() as t:
            while self._waiting:
                try:
                    with self._workers(0) as workers:
                        if self._begin(workers):
                            if not t.started and self._sets > 1:
                                self.show.say(f"up to {self._sets} cells at once")
                                t.start(self._further_slot, range(1, self._sets))
                            self._work(workers)
                except Exception as error:
                    # Workers that cannot be started or ended again.
                    if t.started and (t.alive or not self._waiting):
                        self._given_up(error)
                        t.wait()  # if they give up as well, this slot tries again
                        continue
                    if not self.worked or not (job := self._next()):
                        raise
                    self._failed(job, error, self.show)

    def _workers(self, slot: int) -> Workers:
        folder = storage.join(self.comparison.folder, TRAINING_FOLDER, str(slot))
        return open_workers(replace(self._setup, run_folder=folder, sets=self._sets), self.show)

    def _begin(self, workers: Workers) -> bool:
        """Draw the texts of all that wait, by one set of workers. Whether nothing failed: these
        workers may be in any state then.
        """
        self.show.say(workers.description)
        for job in [job for job in [*self._waiting] if not job.begun]:
            try:
                begun = Compression.begin(job.plan, workers, self.show, self._shared)
                begun.check(self.restart)
            except Exception as error:
                if not self.worked and isinstance(error, UserError):
                    raise
                self._waiting.remove(job)
                self._failed(job, error, self.show)
                return False
            job.begun = begun
        return True

    def _further_slot(self, slot: int) -> None:
        try:
            while self._waiting:
                with self._workers(slot) as workers:
                    self._work(workers)
        except Exception as error:
            self._given_up(error)

    def _given_up(self, error: Exception) -> None:
        told = f"{type(error).__name__}: {first_line(error)}"
        self.show.say(f"WARNING: a set of workers is given up, the others go on ({told})")

    def _work(self, workers: Workers) -> None:
        """Do jobs until none waits, or one has failed."""
        while job := self._next():
            assert job.begun is not None
            show = self.show
            if self._sets > 1:
                show = OneOfSeveral(show, f"{job.run.model}: {job.run.method}")
            show.say(f"— {job.run.model}: {job.run.method} —")
            try:
                self.worked = True
                replace(job.begun, workers=workers, show=show).publish_all(self.restart)
            except Exception as error:
                self._failed(job, error, show)
                return
            self._tell()

    def _next(self) -> Job | None:
        try:
            return self._waiting.popleft()
        except IndexError:
            return None

    def _tell(self) -> None:
        """How many have ended, where several work and none has a bar for itself."""
        with self._telling:
            self._ended += 1
            if self._sets > 1:
                self.show.stage("cells that have ended", len(self.jobs))
                self.show.part(self._ended, len(self.jobs))

    def _failed(self, job: Job, error: Exception, show: Display) -> None:
        self.worked = True
        told = getattr(error, "cause", error)  # raised in a Ray task, it is wrapped in Ray's error
        job.problem = str(told)
        if not isinstance(told, UserError | StorageError):
            job.problem = f"{type(told).__name__}: {first_line(told)}"
            show.say("".join(traceback.format_exception(error)))
        show.say("\n".join([f"failed: {job.problem}", *getattr(error, "__notes__", ())]))
        self._tell()


class OneOfSeveral(Display):
    """Of a run beside others: the lines that stay, in the display of all, with its name before
    them. Each run has its own listeners.
    """

    def __init__(self, whole: Display, name: str) -> None:
        super().__init__(whole.console)  # its bar is never started
        self._whole, self._name = whole, name

    def say(self, text: str) -> None:
        self._whole.say(f"[{self._name}] {text}")


class Threads:
    """Threads that are waited for at the end of the block. What ends it by an exception, such as
    Ctrl-C, ends them too, in the same way: each is raised KeyboardInterrupt in.
    """

    def __init__(self) -> None:
        self.started: list[threading.Thread] = []

    def start(self, work: Callable[[int], None], numbers: range) -> None:
        for number in numbers:
            one = threading.Thread(target=_until_stopped, args=(work, number), daemon=True)
            self.started.append(one)
            one.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self.wait()
        except BaseException:
            self._stop()
            raise
        if error is not None:
            self._stop()

    @property
    def alive(self) -> bool:
        """Whether any of them still works."""
        return any(one.is_alive() for one in self.started)

    def wait(self) -> None:
        """Until each has ended."""
        for one in self.started:
            one.join()

    def _stop(self) -> None:
        for one in self.started:
            if one.ident is not None and one.is_alive():
                where, what = ctypes.c_ulong(one.ident), ctypes.py_object(KeyboardInterrupt)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(where, what)
        self.wait()


def _until_stopped(work: Callable[[int], None], number: int) -> None:
    try:
        work(number)
    except KeyboardInterrupt:
        return  # the main thread tells of it
