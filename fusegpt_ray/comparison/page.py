"""The report of a comparison: one page of HTML that needs no network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fusegpt_ray.comparison.plot import charts
from fusegpt_ray.comparison.tables import Row, protocols
from fusegpt_ray.recipe.recipe import percent
from fusegpt_ray.reporting.page import filled, how_made
from fusegpt_ray.store.public import public_of_many
from fusegpt_ray.terminal.display import byte_count, duration


def html(result: Mapping[str, Any]) -> str:
    """The whole page.

    Args:
        result: see `tables.result`.
    """
    result = public_of_many(result)
    rows = result["rows"]
    texts = list(dict.fromkeys(row["text"] for row in rows))
    ended = (*rows, *result["failed"])
    models = list(dict.fromkeys(row["model"] for row in (*ended, *result["unfinished"])))
    which = ["model"] if len(models) > 1 else []  # else the page's head names it
    skipped = 1 - len(which)

    def told(kind: str, about: str) -> list[list[str]]:
        named = ("model", "method")
        return [
            [*(row[key] for key in named), f"{percent(row['sparsity'])} %", row[about]][skipped:]
            for row in result[kind]
        ]

    return filled(
        "comparison.html.jinja",
        result["name"],
        charts(result),
        [*_headline(result)],
        models=models,
        columns=[*which, "method", "removed", "blocks removed", *_per_text(texts), "size", "time"],
        cells=[row[skipped:] for row in _cells(rows, texts)],
        named=[*which, "method", "removed"],
        failed=told("failed", "problem"),
        unfinished=told("unfinished", "status"),
        protocols=protocols(rows),
        **how_made(result),
    )


def _headline(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    rows, failed = result["rows"], len(result["failed"])
    done = len({(row["model"], row["method"], row["sparsity"]) for row in rows})
    left = len(result["unfinished"])
    told = ((done, "done"), (failed, "failed"), (left, "to come"))
    yield "cells", ", ".join(f"{count} {what}" for count, what in told if count or what == "done")
    models = {row["model"] for row in rows}
    for model, text in dict.fromkeys((row["model"], row["text"]) for row in rows):
        of_text = [row for row in rows if (row["model"], row["text"]) == (model, text)]
        where = text + (f", {model}" if len(models) > 1 else "")
        yield f"dense on {where}", f"{of_text[0]['dense']:.2f}"
        most = max(row["sparsity"] for row in of_text)
        best = min(
            (row for row in of_text if row["sparsity"] == most), key=lambda row: row["perplexity"]
        )
        name = f"best at {percent(most)} % on {where}"
        yield name, f"{best['method']}: {best['perplexity']:.2f}"


def _per_text(texts: Sequence[str]) -> list[str]:
    return [column for text in texts for column in (f"perplexity on {text}", "× dense")]


def _cells(rows: Sequence[Row], texts: Sequence[str]) -> Iterator[list[str]]:
    """A row for each dense model and below it one for each cell of it."""
    for model in dict.fromkeys(row["model"] for row in rows):
        of_model = [row for row in rows if row["model"] == model]
        dense = {row["text"]: row["dense"] for row in of_model}
        values = [
            cell
            for text in texts
            for cell in ((f"{dense[text]:.2f}", "1") if text in dense else ("–", "–"))
        ]
        yield [model, "dense", "0 %", "–", *values, "–", "–"]
        for method, sparsity in dict.fromkeys((row["method"], row["sparsity"]) for row in of_model):
            found = {
                row["text"]: row
                for row in of_model
                if (row["method"], row["sparsity"]) == (method, sparsity)
            }
            yield _cell(model, method, sparsity, found, texts)


def _cell(
    model: str, method: str, sparsity: float, found: Mapping[str, Row], texts: Sequence[str]
) -> list[str]:
    one = next(iter(found.values()))
    values = []
    for text in texts:
        row = found.get(text)
        values += (
            [f"{row['perplexity']:.2f}", f"{row['perplexity'] / row['dense']:.3g}"]
            if row
            else ["–", "–"]
        )
    removed = ", ".join(map(str, one["removed"]))
    if width := one["width"]:
        removed = f"hidden size {width['dense']} → {width['kept']}"
    size, time = byte_count(one["bytes"]), duration(one["seconds"])
    return [model, method, f"{percent(sparsity)} %", removed, *values, size, time]
