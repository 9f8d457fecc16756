"""`fusegpt tasks`: several models on tasks of lm-eval, side by side."""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers

from fusegpt_ray.errors import UserError, blaming, reading_users_file
from fusegpt_ray.measuring.checkpoint import KEY, Checkpoint, load, short_names
from fusegpt_ray.measuring.harness import (
    SEEDS,
    TASKS,
    Asked,
    Suite,
    check_installed,
    library,
    seeing,
    wrapped,
)
from fusegpt_ray.measuring.tables import mean
from fusegpt_ray.model.memory import is_out_of_memory
from fusegpt_ray.preparing.preflight import check_writable, image_token
from fusegpt_ray.recipe.cluster_section import Cluster
from fusegpt_ray.run.shared import Shared
from fusegpt_ray.store import storage
from fusegpt_ray.terminal.display import Display
from fusegpt_ray.text.images import check_pillow
from fusegpt_ray.uris import refuse_ambiguous, refuse_secret

CACHE = "--cache"


@dataclass(frozen=True)
class How:
    """What does not belong to the tasks."""

    dtype: str = "auto"
    """Of the arithmetic; auto: as the model is stored."""
    batch: int = 8
    """Sequences that pass the model at once."""
    cache: str | None = None
    """Folder or URI of numbers that were measured before; None: nothing is kept."""


def tasks(
    models: Sequence[str],
    asked: Asked,
    how: How,
    cluster: Cluster,
    display: Display | None = None,
) -> dict[str, Any]:
    """Measure models on tasks: {"models": [{"model", "name", "dtype", "tasks": [see
    `Suite.measure`], "mean": see `tables.mean`} …] in the order given, "seeds", "limit", "batch",
    "versions"}.

    With a cache, each number is kept as soon as it is measured, and is used again as long as the
    model's files, the task's questions and settings, and the versions are the same.

    Raises:
        UserError: a model has no tokenizer or does not load, a task is unknown or its data is out
            of reach, or lm-eval is not installed; nothing is written then. Or lm-eval fails at a
            task, or memory runs out; what was measured before stays in the cache.
    """
    check_installed()
    if how.cache:
        _check_cache(how.cache)
        how = replace(how, cache=storage.absolute(how.cache))
    if asked.folder:
        asked = replace(asked, folder=os.path.abspath(asked.folder))
    with display or Display() as show:
        show.stage("looking at the models")
        checkpoints = [Checkpoint.open(model) for model in models]
        for checkpoint in checkpoints:
            checkpoint.source.tokenizer(KEY)
        show.stage("loading the tasks")
        suite = _suite(asked, checkpoints)
        rows: dict[int, list[dict[str, Any]]] = {}
        names = short_names(checkpoints)
        show.stage(f"models: {len(models)}, tasks: {', '.join(suite.items)}")
        for number, found, remarks in _rows(checkpoints, suite, how, cluster, show):
            rows[number] = found
            for remark in remarks:
                show.say(remark)
            show.part(len(rows), len(models))
    return {
        "models": [
            {
                "model": checkpoint.name,
                "name": names[number],
                "dtype": checkpoint.arithmetic(how.dtype),
                "tasks": rows[number],
                "mean": mean(rows[number]),
            }
            for number, checkpoint in enumerate(checkpoints)
        ],
        "limit": asked.limit,
        "batch": how.batch,
        "seeds": SEEDS,
        "versions": {
            "lm_eval": library(),
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        },
    }


def _suite(asked: Asked, checkpoints: Sequence[Checkpoint]) -> Suite:
    """The tasks, for these models.

    Raises:
        UserError: see `Suite.load`; or a task has images, and a model sees none or has no processor
            that loads.
    """
    suite = Suite.load(asked)
    for task in filter(suite.sees, suite.items):
        check_pillow(TASKS)
        for checkpoint in checkpoints:
            if image_token(checkpoint.source) is None:
                problem = f"it has images, and {checkpoint.name} is a model of text alone"
                raise UserError(TASKS, task, problem, "leave one of them out")
            checkpoint.source.processor(KEY)
    return suite


def _check_cache(uri: str) -> None:
    """
    Raises:
        UserError: nothing can be kept there, or the URI says what it must not.
    """
    refuse_secret(CACHE, uri)
    refuse_ambiguous(CACHE, uri)
    with reading_users_file(CACHE, uri, "cannot be reached", "check the URI's protocol"):
        storage.filesystem(uri)
    with blaming(CACHE, uri):
        check_writable(CACHE, uri, "tasks.write-test")


def _rows(
    checkpoints: Sequence[Checkpoint], suite: Suite, how: How, cluster: Cluster, show: Display
) -> Iterator[tuple[int, list[dict[str, Any]], list[str]]]:
    """Of each model, as they are done: its number, its numbers, and what is to be said of them.
    What stops it is told what is kept.
    """
    try:
        yield from _each(checkpoints, suite, how, cluster, show)
    except KeyboardInterrupt as stop:
        kept = f"What was measured is in {how.cache}; the same command goes on with the rest."
        stop.add_note(kept if how.cache else f"Nothing is kept without {CACHE}.")
        raise


def _each(
    checkpoints: Sequence[Checkpoint], suite: Suite, how: How, cluster: Cluster, show: Display
) -> Iterator[tuple[int, list[dict[str, Any]], list[str]]]:
    if cluster.engine == "local":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        for number, checkpoint in enumerate(checkpoints):
            show.stage(f"{checkpoint.name} on {device}")
            yield number, *_measure(device, checkpoint, suite, how)
        return
    from fusegpt_ray.distributed.apiece import apiece

    calls = [(checkpoint, suite.asked, how) for checkpoint in checkpoints]
    for number, (found, remarks) in apiece(_measure_there, calls, cluster):
        yield number, found, remarks


def _measure_there(
    device: str, checkpoint: Checkpoint, asked: Asked, how: How
) -> tuple[list[dict[str, Any]], list[str]]:
    """`_measure` in a process of its own: tasks hold code, and are loaded where they are used."""
    return _measure(device, checkpoint, Suite.load(asked), how)


def _measure(
    device: str, checkpoint: Checkpoint, suite: Suite, how: How
) -> tuple[list[dict[str, Any]], list[str]]:
    """One model's numbers on all tasks, and what is to be said of them."""
    kept, remarks = Shared(how.cache), list[str]()
    dtype = checkpoint.arithmetic(how.dtype)
    about: dict[str, Any] = {"dtype": dtype, "transformers": transformers.__version__}
    if how.cache:
        about["files"] = checkpoint.identity()
    with ExitStack() as opening:

        @functools.cache
        def model() -> tuple[Any, str]:
            """Fetched and loaded once a number is not in the cache; and where it lies."""
            folder = opening.enter_context(checkpoint.local())
            return load(checkpoint, folder, dtype, torch.device(device)), folder

        @functools.cache
        def wrapping(sees: bool) -> Any:
            return (seeing if sees else wrapped)(*model(), how.batch)

        def measured(name: str) -> dict[str, Any]:
            asked = wrapping(suite.sees(name))
            fix = "mend the task's files, or leave the task out"
            with reading_users_file(TASKS, name, f"lm-eval fails with {checkpoint.name}", fix):
                try:
                    return suite.measure(name, asked)
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    fix = "give a smaller --batch, --dtype bfloat16 or a larger machine"
                    raise UserError("--batch", how.batch, "memory runs out", fix) from error

        rows = [
            kept.measured(
                "tasks",
                about | suite.identity(name),
                functools.partial(measured, name),
                remarks.append,
            )
            for name in suite.items
        ]
    wrapping.cache_clear()
    model.cache_clear()
    gc.collect()
    if device == "cuda":  # the next model needs the room
        torch.cuda.empty_cache()
    return rows, remarks
