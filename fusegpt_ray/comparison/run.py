"""`fusegpt compare`: many runs, one after another, that share what they have in common."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from fusegpt_ray.comparison import plot, tables
from fusegpt_ray.comparison.cells import Comparison, Run
from fusegpt_ray.compression import Compression
from fusegpt_ray.errors import StorageError, UserError, first_line
from fusegpt_ray.pipeline import open_workers
from fusegpt_ray.plan import Plan, plan
from fusegpt_ray.report import Display
from fusegpt_ray.run.shared import Shared
from fusegpt_ray.store import storage
from fusegpt_ray.store.manifest import MANIFEST
from fusegpt_ray.store.records import checksum
from fusegpt_ray.targets import Target
from fusegpt_ray.uris import shown


@dataclass
class _Job:
    run: Run
    plan: Plan
    id: str = ""
    """The run's; see `run_id`."""
    problem: str = ""
    """Why it failed."""
    done: bool = False


def compare(
    comparison: Comparison, display: Display | None = None, restart: bool = False
) -> dict[str, Any]:
    """Carry out all runs, and write their tables into `comparison.folder`; returns what is in
    table.json (see `tables.result`).

    A run that fails is told and the others go on. Given again, only what is missing is done; with
    `restart`, unfinished runs of these names are forgotten.

    Raises:
        UserError: a run cannot be carried out, as far as this is known before any of them works.
    """
    with display or Display() as show:
        jobs = [_Job(run, _planned(run, show, restart)) for run in comparison.runs]
        worked = False
        for _, group in groupby(jobs, key=lambda job: _same_workers(job.plan)):
            left = [*group]
            while left:
                # Anew for new workers: what was drawn may lie in the memory of the old ones.
                shared = Shared(storage.join(comparison.folder, "measured"))
                try:
                    worked = _work(left, comparison, shared, worked, show, restart)
                except Exception as error:
                    # Workers that cannot be started or ended again.
                    waiting = [job for job in left if not (job.done or job.problem)]
                    if not worked or not waiting:
                        raise
                    _failed(waiting[0], error, show)
                left = [job for job in left if not (job.done or job.problem)]
        storage.remove(storage.join(comparison.folder, "blocks"), recursive=True)  # of Ray Train
        result = tables.result(comparison, _models(jobs))
        for name, data in tables.files(result).items():
            storage.write(storage.join(comparison.folder, name), data.encode())
        if image := plot.png(result):
            storage.write(storage.join(comparison.folder, "perplexity.png"), image)
        show.say(f"tables are in {comparison.folder}")
    return result


def _planned(run: Run, show: Display, restart: bool) -> Plan:
    try:
        return plan(run.recipe, show, restart)
    except UserError as error:
        problem = f"{error.problem} (in the cell {shown(run.method)})"
        raise UserError(error.key, error.value, problem, error.fix) from error


def _work(
    jobs: Sequence[_Job],
    comparison: Comparison,
    shared: Shared,
    worked: bool,
    show: Display,
    restart: bool,
) -> bool:
    """Do these on one set of workers, up to the first that fails: it may leave workers in any
    state. Whether anything has been worked on by now.
    """
    setup = replace(
        jobs[0].plan.setup,
        trains=any(job.plan.setup.trains for job in jobs),
        run_folder=comparison.folder,
    )
    with open_workers(setup, show) as workers:
        show.say(workers.description)
        begun = []
        for job in jobs:
            try:
                run = Compression.begin(job.plan, workers, show, shared)
                job.id = run.id
                run.check(restart)
            except Exception as error:
                if not worked and isinstance(error, UserError):
                    raise
                return _failed(job, error, show)
            begun.append(run)
        for job, run in zip(jobs, begun, strict=True):
            show.say(f"— {job.run.model}: {job.run.method} —")
            try:
                run.publish_all(restart)
            except Exception as error:
                return _failed(job, error, show)
            job.done = True
    return True


def _failed(job: _Job, error: Exception, show: Display) -> bool:
    told = getattr(error, "cause", error)  # raised in a Ray task, it is wrapped in Ray's error
    job.problem = str(told)
    if not isinstance(told, UserError | StorageError):
        job.problem = f"{type(told).__name__}: {first_line(told)}"
        show.say("".join(traceback.format_exception(error)))
    show.say("\n".join([f"failed: {job.problem}", *getattr(error, "__notes__", ())]))
    return True


def _same_workers(planned: Plan) -> str:
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


def _models(jobs: Sequence[_Job]) -> list[tables.Model]:
    """Every model that was to be published, with its manifest if it was."""
    return [
        tables.Model(
            job.run.model,
            job.run.method,
            _sparsity(target),
            target.folder,
            _manifest(job, target.folder),
            job.problem,
        )
        for job in jobs
        for target in job.plan.targets
    ]


def _sparsity(target: Target) -> float:
    assert target.sparsity is not None, "a comparison has no methods that make models deeper"
    return target.sparsity


def _manifest(job: _Job, folder: str) -> dict[str, Any] | None:
    """Only of this very run: another's model may lie there, which is why the cell failed."""
    file = storage.join(folder, MANIFEST)
    found: dict[str, Any] = storage.read_json(file) if storage.exists(file) else {}
    return found if found and found.get("run") == job.id else None
