"""`fusegpt compare`: many runs that share what they have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from fusegpt_ray.comparison import tables
from fusegpt_ray.comparison.cells import SECTION, Comparison
from fusegpt_ray.errors import StorageError, first_line
from fusegpt_ray.model.companions import REPORT
from fusegpt_ray.publishing.publish import versions
from fusegpt_ray.run.outputs import TRAINING_FOLDER
from fusegpt_ray.scheduling.grid import Run
from fusegpt_ray.scheduling.news import News, as_json
from fusegpt_ray.scheduling.planned import planned
from fusegpt_ray.scheduling.slots import Instructions, Job, Slots
from fusegpt_ray.store import storage
from fusegpt_ray.store.comparison import TABLE
from fusegpt_ray.targets import Target
from fusegpt_ray.terminal.display import Display

PICTURE = "perplexity.png"


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
        jobs = []
        for run in comparison.runs:
            own = show.of_run(run.recipe.output.name)
            jobs.append(Job(f"{run.model}: {run.method}", planned(run, own, restart), own))
        folder, key = comparison.folder, f"{SECTION}.at_once"
        cells = Cells(comparison, jobs)
        news = News(storage.join(folder, TABLE), lambda: cells.result("working"), show)

        def changed(job: Job) -> None:
            news.write()

        asked = Instructions(
            folder, "cells", comparison.at_once, key, restart=restart, changed=changed
        )
        Slots(jobs, asked, show).run()
        storage.remove(storage.join(folder, TRAINING_FOLDER), recursive=True)
        result = cells.result("done")
        for name, data in tables.files(result).items():
            storage.write(storage.join(folder, name), data.encode())
        try:
            for name, drawn in _drawn(comparison, result):
                storage.write(storage.join(folder, name), drawn)
        except Exception as error:  # whatever the charting libraries raise
            if isinstance(error, StorageError):
                raise
            show.say(f"no pictures: they cannot be drawn here ({first_line(error)})")
        storage.write(storage.join(folder, TABLE), as_json(result))
        show.say(f"tables are in {folder}")
    return result


def _drawn(comparison: Comparison, result: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the pictures and the report."""
    from fusegpt_ray.comparison import page, plot  # altair: takes a second

    if image := plot.png(result):
        yield PICTURE, image
    if any(run.recipe.output.report for run in comparison.runs):
        yield REPORT, page.html(result).encode(errors="replace")


class Cells:
    """What became of each cell, while they work and afterwards."""

    def __init__(self, comparison: Comparison, jobs: Sequence[Job]) -> None:
        self.comparison = comparison
        self._jobs = [*zip(comparison.runs, jobs, strict=True)]
        self._manifests: dict[str, dict[str, Any] | None] = {}
        """By the folders of models whose jobs have ended."""

    def result(self, state: Literal["working", "done"]) -> dict[str, Any]:
        """See `tables.result`."""
        models = [
            self._model(run, job, target) for run, job in self._jobs for target in job.plan.targets
        ]
        return tables.result(self.comparison, models, state, versions())

    def _model(self, run: Run, job: Job, target: Target) -> tables.Model:
        folder = target.folder
        if job.ended and folder not in self._manifests:
            self._manifests[folder] = job.published(target)
        assert target.sparsity is not None, "a comparison has no methods that make models deeper"
        return tables.Model(
            run.model,
            run.method,
            target.sparsity,
            folder,
            "ended" if job.ended else "working" if job.working else "waiting",
            self._manifests.get(folder),
            job.problem,
        )
