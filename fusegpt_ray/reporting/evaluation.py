"""The report of `fusegpt evaluate`: one page of HTML that needs no network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import altair as alt

from fusegpt_ray.reporting.charts import COLOURS, ROW, Chart, chart
from fusegpt_ray.reporting.measured import difference, perplexity_notes
from fusegpt_ray.reporting.page import filled

Row = Mapping[str, Any]
_END = "length(datum.value) > 22 ? '…' + slice(datum.value, -21) : datum.value"
"""In Vega's language: models often differ at the end of their names alone."""


def html(results: Sequence[Row], versions: Mapping[str, str]) -> str:
    """The whole page.

    Args:
        results: see `pipeline.evaluate`.
        versions: of the program and its libraries.
    """
    beside = any("against" in row for row in results)
    columns = ["text", "model", "perplexity", *(["ratio", "95 % interval", "differs?"] * beside)]
    models, texts = ([*dict.fromkeys(row[key] for row in results)] for key in ("model", "data"))
    return filled(
        "evaluation.html.jinja",
        "Perplexities",
        [*_charts(results, models, texts)],
        [*_headline(results, models, texts)],
        models=models,
        columns=columns,
        rows=[[*_cells(row, beside)] for row in results],
        notes=perplexity_notes(results),
        versions=versions,
    )


def _headline(
    results: Sequence[Row], models: Sequence[str], texts: Sequence[str]
) -> Iterator[tuple[str, str]]:
    if len(models) > 1:
        yield "models", str(len(models))
        for text in texts:
            found = [row for row in results if row["data"] == text]
            best = min(found, key=lambda row: row["perplexity"])
            yield f"lowest on {text}", f"{best['model']}: {best['perplexity']:.4f}"
        return
    for row in results:
        yield f"perplexity on {row['data']}", f"{row['perplexity']:.4f}"


def _cells(row: Row, beside: bool) -> Iterator[str]:
    yield row["data"]
    yield row["model"]
    yield f"{row['perplexity']:.4f}"
    if beside:
        yield from difference(row.get("against"))


def _charts(results: Sequence[Row], models: Sequence[str], texts: Sequence[str]) -> Iterator[Chart]:
    """Of each text, where there are several models."""
    if len(models) < 2:
        return
    for text in texts:
        rows = [(row["model"], row["perplexity"]) for row in results if row["data"] == text]
        line = alt.Chart().mark_rule(strokeDash=[4, 4])
        first = line.encode(x=alt.X("first:Q", title="perplexity"))
        label = alt.Axis(labelExpr=_END)
        level = alt.Scale(zero=False, padding=16)
        points = (
            alt.Chart()
            .mark_point(filled=True, size=90, opacity=1, color=COLOURS[0])
            .encode(
                x=alt.X("perplexity:Q", scale=level, axis=alt.Axis(tickCount=6)),
                y=alt.Y("model:N", sort=None, title=None, axis=label),
            )
        )
        yield chart(
            "perplexity",
            f"Perplexity on {text}",
            "Lower is better; the dashed line is the first model.",
            ("model", "perplexity"),
            rows,
            alt.layer(first, points),
            height=ROW * (len(rows) + 1),
            extra={"first": rows[0][1]},
        )
