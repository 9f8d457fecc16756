"""The tables of `fusegpt tasks` and `fusegpt speed`, in the layout of papers: models as rows. No
torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.text import Text

from fusegpt_ray.terminal.display import byte_count
from fusegpt_ray.terminal.table import Table

Number = Mapping[str, float | None]
TITLES = {"acc": "acc in %", "acc_norm": "acc_norm, else acc, in %"}
"""Accuracies, and what their tables are called."""


def mean(tasks: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """The mean over tasks that have an accuracy: {"acc": {"value", "stderr"}, "acc_norm": …}.

    "acc_norm" is the mean that papers print: of acc_norm where a task has it, else of acc. It is
    left out where no task has one; without any accuracy both are. The standard error takes tasks
    for independent, and is None if one of theirs is.
    """
    found = {}
    for metric in _metrics([{"tasks": tasks}]):
        numbers = [number for task in tasks if (number := _number(task, metric))]
        errors = [number["stderr"] for number in numbers]
        known = [error for error in errors if error is not None]
        found[metric] = {
            "value": sum(number["value"] or 0.0 for number in numbers) / len(numbers),
            "stderr": math.hypot(*known) / len(numbers) if len(known) == len(numbers) else None,
        }
    return found


def _metrics(models: Sequence[Mapping[str, Any]]) -> list[str]:
    """The accuracies that any task has."""
    there = {metric for model in models for task in model["tasks"] for metric in task["metrics"]}
    return [metric for metric in TITLES if metric in there]


def _number(task: Mapping[str, Any], metric: str) -> Number | None:
    """A task's accuracy by this metric, or plain accuracy."""
    metrics = task["metrics"]
    found: Number | None = metrics.get(metric) or metrics.get("acc")
    return found


def of_tasks(result: Mapping[str, Any]) -> Iterator[Table | str]:
    """A table for each kind of accuracy, and one of what is none; `result`: see `tasks.tasks`."""
    models = result["models"]
    for metric in _metrics(models):
        yield _accuracies(models, metric)
    yield from _others(models)
    first = models[0]["tasks"]
    counts = ", ".join(f"{task['task']} {task['samples']}" for task in first)
    if any(task["samples"] < task["of"] for task in first):
        counts += f" (--limit {result['limit']}: not to be compared with published numbers)"
    yield f"samples: {counts}; ±: one standard error; lm-eval {result['versions']['lm_eval']}"


def _accuracies(models: Sequence[Mapping[str, Any]], metric: str) -> Table:
    table = Table(title=TITLES[metric], box=box.SIMPLE_HEAD)
    table.add_column("model")
    there = [task["task"] for task in models[0]["tasks"] if _number(task, metric)]
    for name in (*there, "average"):
        # The long names break where a reader would break them.
        head = name.replace("_", "_\n") if len(name) > 10 else name
        table.add_column(Text(head), justify="right")
    for model in models:
        numbers = [_number(task, metric) for task in model["tasks"] if task["task"] in there]
        cells = [_percent(number) for number in (*numbers, model["mean"][metric])]
        table.add_row(Text(model["name"]), *cells)
    return table


def _percent(number: Number | None) -> str:
    if number is None or number["value"] is None:
        return "–"
    error = number["stderr"]
    return f"{100 * number['value']:.2f}" + ("" if error is None else f"\n±{100 * error:.2f}")


def _others(models: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Numbers of tasks that have no accuracy, in no average."""
    for model in models:
        for task in model["tasks"]:
            for metric, number in task["metrics"].items() if not _number(task, "acc") else ():
                error = "" if number["stderr"] is None else f" ±{number['stderr']:.4g}"
                yield f"{model['name']}, {task['task']}, {metric}: {number['value']:.4g}{error}"


def of_speed(result: Mapping[str, Any]) -> Iterator[Table | str]:
    """The times side by side, and how they came about; `result`: see `speed.speed`."""
    trial, models = result["trial"], result["models"]
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("model")
    table.add_column("")
    for head in ("ms", "tokens/s", "times as fast", "memory"):
        table.add_column(head, justify="right")
    for model in models:
        taken = model["weights_bytes"] if model["peak_bytes"] is None else model["peak_bytes"]
        for what, name, memory in (
            ("prefill", Text(model["name"]), byte_count(taken)),
            ("decode", "", ""),
        ):
            row = model[what]
            ratio = "1" if model is models[0] else _times(row["times_as_fast"])
            cells = f"{1000 * row['seconds']['median']:.4g}", f"{row['tokens_per_second']:.4g}"
            table.add_row(name, what, *cells, ratio, memory)
    yield table
    turns = f"medians of {trial['runs']} turns in which the models follow each other"
    yield f"{turns}; in brackets: the lowest and highest ratio to the first in a turn"
    dtypes = ", ".join(dict.fromkeys(model["dtype"] for model in models))
    size = f"prefill: {trial['batch']} × {trial['prompt']} tokens; decode: a token of each, of"
    size += f" {trial['new']}"
    yield f"{size}; {dtypes}; {result['runner']}; {result['device']}"
    if models[0]["peak_bytes"] is None:
        more = "what the work takes beside them is not counted here"
        yield f"memory: of the weights in the dtype of the arithmetic; {more}"
    else:
        yield "memory: the most that weights and work have taken of the GPU"


def _times(spread: Mapping[str, float]) -> str:
    return f"{spread['median']:.2f} ({spread['low']:.2f}–{spread['high']:.2f})"
