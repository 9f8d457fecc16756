"""`fusegpt compare`: many runs that share what they have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fusegpt_ray.comparison import tables
from fusegpt_ray.comparison.cells import SECTION, Comparison
from fusegpt_ray.errors import StorageError, first_line
from fusegpt_ray.model.companions import REPORT
from fusegpt_ray.report import Display
from fusegpt_ray.run.outputs import TRAINING_FOLDER
from fusegpt_ray.scheduling.grid import Run
from fusegpt_ray.scheduling.planned import planned
from fusegpt_ray.scheduling.slots import Asked, Job, Slots
from fusegpt_ray.store import storage
from fusegpt_ray.store.manifest import MANIFEST
from fusegpt_ray.targets import Target

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
        plans = [planned(run, show, restart) for run in comparison.runs]
        named = zip(comparison.runs, plans, strict=True)
        jobs = [Job(f"{run.model}: {run.method}", plan) for run, plan in named]
        folder, key = comparison.folder, f"{SECTION}.at_once"
        asked = Asked(folder, "cells", comparison.at_once, key, restart=restart)
        Slots(jobs, asked, show).run()
        storage.remove(storage.join(comparison.folder, TRAINING_FOLDER), recursive=True)
        models = _models(comparison.runs, jobs)
        result = tables.result(comparison, models)
        for name, data in tables.files(result).items():
            storage.write(storage.join(comparison.folder, name), data.encode())
        try:
            for name, drawn in _drawn(comparison, result, models):
                storage.write(storage.join(comparison.folder, name), drawn)
        except Exception as error:  # whatever the charting libraries raise
            if isinstance(error, StorageError):
                raise
            show.say(f"no pictures: they cannot be drawn here ({first_line(error)})")
        show.say(f"tables are in {comparison.folder}")
    return result


def _drawn(
    comparison: Comparison, result: Mapping[str, Any], models: Sequence[tables.Model]
) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the pictures and the report."""
    from fusegpt_ray.comparison import page, plot  # altair: takes a second

    if image := plot.png(result):
        yield PICTURE, image
    if any(run.recipe.output.report for run in comparison.runs):
        made = next((model.manifest for model in models if model.manifest), {})
        versions = made.get("versions", {})
        yield REPORT, page.html(result, comparison.settings, versions).encode(errors="replace")


def _models(runs: Sequence[Run], jobs: Sequence[Job]) -> list[tables.Model]:
    """Every model that was to be published, with its manifest if it was."""
    return [
        tables.Model(
            run.model,
            run.method,
            _sparsity(target),
            target.folder,
            _manifest(job, target.folder),
            job.problem,
        )
        for run, job in zip(runs, jobs, strict=True)
        for target in job.plan.targets
    ]


def _sparsity(target: Target) -> float:
    assert target.sparsity is not None, "a comparison has no methods that make models deeper"
    return target.sparsity


def _manifest(job: Job, folder: str) -> dict[str, Any] | None:
    """Only of this very run: another's model may lie there, which is why the cell failed."""
    file = storage.join(folder, MANIFEST)
    found: dict[str, Any] = storage.read_json(file) if storage.exists(file) else {}
    return found if found and found.get("run") == job.id else None
