"""Jobs on sets of workers, one after another or several at once: each slot takes the next job that
waits, opens workers for it, and keeps them as long as the next job can use them.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from fusegpt_ray.compressing.compression import Compression
from fusegpt_ray.errors import BudgetSpent, PutOff, StorageError, UserError, first_line
from fusegpt_ray.pipeline import open_workers, room_for_sets
from fusegpt_ray.planning.plan import Plan
from fusegpt_ray.run.metrics_log import MetricsLog
from fusegpt_ray.run.outputs import SHARED_FOLDER, TRAINING_FOLDER
from fusegpt_ray.run.shared import Shared
from fusegpt_ray.scheduling.threads import Threads
from fusegpt_ray.scheduling.waiting import Entry, Waiting
from fusegpt_ray.store import storage
from fusegpt_ray.store.manifest import MANIFEST
from fusegpt_ray.store.records import checksum
from fusegpt_ray.targets import Target
from fusegpt_ray.terminal.display import Display
from fusegpt_ray.workers.base import Setup, Workers


@dataclass(eq=False)
class Job:
    """A run, and what became of it."""

    name: str
    plan: Plan
    show: Display
    """Of it alone: see `Display.of_run`, and `Display.beside` where several work."""
    priority: int = 0
    begun: Compression | None = None
    """Its texts are drawn; None again once it has ended."""
    id: str = ""
    """The run's, once its texts are drawn; see `run_id`."""
    working: bool = False
    """It is at work, or was."""
    ended: bool = False
    problem: str = ""
    """Why it failed."""

    def published(self, target: Target) -> dict[str, Any] | None:
        """The manifest of one of its models, if it is there. Only of this very run: another's may
        lie there, which is why the job failed.
        """
        file = storage.join(target.folder, MANIFEST)
        found: dict[str, Any] = storage.read_json(file) if storage.exists(file) else {}
        return found if found and found.get("run") == self.id else None


@dataclass(frozen=True)
class Instructions:
    """How jobs are to be done."""

    folder: str
    """Where they keep what they share."""
    what: str
    """They are called, in the plural."""
    at_once: int | None
    key: str
    """Of `at_once` in the recipe."""
    quota: float | None = None
    """GPUs that all of them together may take."""
    ends_early: bool = True
    """Whether a mistake of the user that is found before anything works ends everything."""
    restart: bool = False
    """Unfinished runs of these names are forgotten."""
    changed: Callable[[Job], None] = lambda job: None
    """Is told of a job that begins to work, or has ended; from several threads."""


@dataclass
class Group:
    """Jobs that can use the same workers."""

    setup: Setup
    shared: Shared
    jobs: Sequence[Job]
    drawing: threading.Lock = field(default_factory=threading.Lock)
    """Its texts are drawn by one set of workers at a time."""


class Slots:
    """Carries out jobs."""

    def __init__(self, jobs: Sequence[Job], asked: Instructions, show: Display) -> None:
        self.jobs, self.asked, self.show = jobs, asked, show
        self.worked = False
        """Whether anything has been worked on."""
        self._groups: dict[int, Group] = {}
        self._ended, self._telling = 0, threading.Lock()

    def run(self) -> None:
        """All jobs; one that fails is told. Those in one place share it; places follow one another.

        Raises:
            Exception: nothing has been worked on yet, and nothing can be; or the only workers,
                which had done everything, could not be ended.
        """
        by_place: dict[object, list[Job]] = {}
        for job in self.jobs:
            cluster = job.plan.setup.cluster
            by_place.setdefault((cluster.engine, cluster.address), []).append(job)
        for jobs in by_place.values():
            try:
                self._at_one_place(jobs)
            except KeyboardInterrupt as stop:
                done, every = (
                    sum(job.ended and not job.problem for job in self.jobs),
                    len(self.jobs),
                )
                finished = f"{done} of {every} {self.asked.what} are finished and stay so"
                stop.add_note(f"{finished}; the same command goes on with the others.")
                raise
            except Exception as error:
                missing = [job for job in jobs if not job.ended]
                if not self.worked or not missing:
                    raise
                for job in missing:
                    self._failed(job, error)

    def _at_one_place(self, jobs: Sequence[Job]) -> None:
        self._groups, numbers = self._grouped(jobs)
        setups, asked = [self._groups[number].setup for number in numbers], self.asked
        with (
            room_for_sets(setups, asked.at_once, asked.quota, asked.key) as pool,
            Threads() as threads,
        ):
            room, self._threads, self._told = pool.now(), threads, 1
            self._at_once, self._several = room.at_once, room.at_once > 1
            if self._several:
                for job in jobs:
                    job.show = job.show.beside(job.name)
            each = zip(jobs, numbers, room.needs, room.publishers, room.both, strict=True)
            entries = [
                Entry(job, number, need, job.priority, publisher, both)
                for job, number, need, publisher, both in each
            ]
            cluster = {number: group.setup.cluster for number, group in self._groups.items()}
            self._waiting = Waiting(
                entries,
                pool.now,
                lambda some: pool.ask([(one.need, cluster[one.group]) for one in some]),
            )
            if not asked.ends_early:
                self._start_others()
            self._slot(0)
            threads.wait()
            while self._waiting:  # jobs whose workers could not be opened
                self._slot(0, last=True)

    def _grouped(self, jobs: Sequence[Job]) -> tuple[dict[int, Group], list[int]]:
        """The groups, with those that `Waiting.put_off` makes of them, and each job's number of its
        group.
        """
        names = [same_workers(job.plan) for job in jobs]
        order = [*dict.fromkeys(names)]
        groups = []
        for name in order:
            like = [job for job, of in zip(jobs, names, strict=True) if of == name]
            trains = any(job.plan.setup.trains for job in like)
            shared = Shared(storage.join(self.asked.folder, SHARED_FOLDER))
            groups.append(Group(replace(like[0].plan.setup, trains=trains), shared, like))
        numbered = dict(enumerate(groups))
        for number, group in enumerate(groups):
            numbered[-1 - number] = Group(group.setup.publisher, group.shared, group.jobs)
        return numbered, [order.index(name) for name in names]

    def _start_others(self) -> None:
        """As many as sets could ever be open: the line lets them in where there is room."""
        if not self._threads.started:
            self._threads.start(self._slot, range(1, self._at_once))

    def _slot(self, slot: int, last: bool = False) -> None:
        """Do jobs until none waits. The `last` one does those, too, whose workers could not be
        opened.
        """
        while entry := self._waiting.take(last):
            try:
                self._on_workers(slot, entry, last)
            finally:
                self._waiting.release(entry)

    def _on_workers(self, slot: int, first: Entry[Job], last: bool) -> None:
        opened = False
        try:
            with self._workers(slot, first) as workers:
                opened, entry = True, first
                while self._begin(entry, workers) and self._work(entry, workers):
                    if not (another := self._waiting.next_like(entry)):
                        break
                    entry = another
        except Exception as error:
            # Workers that cannot be started or ended again.
            if self.asked.ends_early and not self.worked:
                raise
            if not opened:
                if last or not self._threads.started:
                    self._failed(first.job, error)
                    return
                self._waiting.give_back(first, leave=True)
            elif not self._threads.started and not self._waiting:
                raise
            told = f"{type(error).__name__}: {first_line(error)}"
            self.show.say(f"WARNING: a set of workers is given up, the others go on ({told})")

    def _workers(self, slot: int, entry: Entry[Job]) -> Workers:
        folder = storage.join(self.asked.folder, TRAINING_FOLDER, f"{slot}-{entry.group}")
        sets, roomy = self._waiting.beside(entry)
        with self._telling:
            if sets > 1 and sets != self._told:
                self.show.say(f"up to {sets} {self.asked.what} at once")
                self._told = sets
        setup = self._groups[entry.group].setup
        setup = replace(setup, run_folder=folder, sets=sets, roomy=roomy)
        if setup.cluster.gpus_per_replica is None:
            # As the room was counted with: all GPUs may be gone at the moment.
            known = {"gpus_per_replica": float(entry.need.gpus > 0)}
            setup = replace(setup, cluster=setup.cluster.model_copy(update=known))
        return open_workers(setup, self.show)

    def _begin(self, first: Entry[Job], workers: Workers) -> bool:
        """Draw the texts of this job and of all of its group that wait. Whether nothing failed:
        these workers may be in any state then.
        """
        group = self._groups[first.group]
        with group.drawing:
            entries = [first, *self._waiting.of_group(first.group)]
            entries = [entry for entry in entries if not entry.job.begun]
            if entries:
                self.show.say(workers.description)
            for entry in entries:
                job = entry.job
                try:
                    begun = Compression.begin(job.plan, workers, job.show, group.shared)
                    begun.check(self.asked.restart)
                except Exception as error:
                    if self.asked.ends_early and not self.worked and isinstance(error, UserError):
                        raise
                    if entry is first or self._waiting.remove(entry):
                        self._failed(job, error)
                    if entry is not first and not first.job.ended:
                        self._waiting.give_back(first)
                    return False
                job.begun, job.id = begun, begun.id
        self.worked = True
        self._start_others()
        return True

    def _work(self, entry: Entry[Job], workers: Workers) -> bool:
        """Whether it did not fail."""
        job = entry.job
        assert job.begun is not None
        job.show.say(f"— {job.name} —")
        job.working = True
        self.asked.changed(job)
        puts_off = partial(self._waiting.put_off, entry)
        run = replace(job.begun, workers=workers, show=job.show, puts_off=puts_off)
        if entry.publishes:  # it goes on, as another process would
            run = replace(run, took=0.0, log=MetricsLog())
        try:
            run.publish_all(self.asked.restart and not entry.publishes)
        except PutOff as later:
            job.show.stage(f"{later}")
            return True
        except Exception as error:
            self._failed(job, error)
            return False
        self._end(job)
        return True

    def _end(self, job: Job) -> None:
        """Let go of what nobody needs any more: one process may carry out hundreds. And tell how
        many have ended, where several work and none has a bar for itself.
        """
        job.ended, job.begun = True, None
        for group in self._groups.values():
            if all(other.ended for other in group.jobs):
                group.shared.forget()
        with self._telling:
            self._ended += 1
            if self._several:
                self.show.stage(f"{self.asked.what} that have ended", len(self.jobs))
                self.show.part(self._ended, len(self.jobs))
        self.asked.changed(job)

    def _failed(self, job: Job, error: Exception) -> None:
        self.worked = True
        told = getattr(error, "cause", error)  # raised in a Ray task, it is wrapped in Ray's error
        job.problem = str(told)
        if not isinstance(told, UserError | StorageError | BudgetSpent):
            job.problem = f"{type(told).__name__}: {first_line(told)}"
            job.show.say("".join(traceback.format_exception(error)))
        job.show.say("\n".join([f"failed: {job.problem}", *getattr(error, "__notes__", ())]))
        self._end(job)


def same_workers(planned: Plan) -> str:
    """Runs for which this is the same can use the same workers."""
    setup, recipe = planned.setup, planned.recipe
    return checksum(
        {
            "model": recipe.model.model_dump(mode="json"),
            "cluster": setup.cluster.model_dump(mode="json"),
            "batch": setup.importance.batch,
            "piece_mb": setup.piece_mb,
        }
    )
