"""Perplexity over sparsity: as charts of a report, and as one picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import altair as alt
import vl_convert

from fusegpt_ray.reporting.charts import Chart, chart

COLUMNS = ("method", "sparsity", "perplexity")
COLOURS = 10
"""That usual charts have; of more methods two would have the same."""
THIN, THICK = 1.5, 4.0
"""Of a line, and of that of the paper's recipe."""


def charts(result: Mapping[str, Any]) -> list[Chart]:
    """One for each model and text on which something was measured.

    Args:
        result: see `tables.result`.
    """
    made = []
    several = len({row["model"] for row in result["rows"]}) > 1
    for model, text in dict.fromkeys((row["model"], row["text"]) for row in result["rows"]):
        rows = [row for row in result["rows"] if (row["model"], row["text"]) == (model, text)]
        dense = rows[0]["dense"]
        methods = dict.fromkeys(row["method"] for row in rows)
        caption = "Lower is better; the dashed line is the dense model."
        if paper := [method for method in methods if method in result["paper"]]:
            caption += f" The thick line is the paper's recipe ({', '.join(paper)})."
        made.append(
            chart(
                "perplexity",
                f"Perplexity on {text}" + (f": {model}" if several else ""),
                caption,
                COLUMNS,
                [tuple(row[key] for key in COLUMNS) for row in rows],
                _drawn(result, sorted({row["sparsity"] for row in rows}), "bottom"),
                height=300,
                extra={"dense": dense},
                also=[(method, 0.0, dense) for method in methods],
            )
        )
    return made


def png(result: Mapping[str, Any]) -> bytes | None:
    """A line for each method from the dense model on, a field for each model and text; None where
    nothing was measured.

    Args:
        result: see `tables.result`.
    """
    rows = result["rows"]
    if not rows:
        return None
    keys = ("model", "text", "method", "dense")
    points = [
        {**{key: row[key] for key in keys}, "sparsity": x, "perplexity": y}
        for row in rows
        for x, y in ((0.0, row["dense"]), (row["sparsity"], row["perplexity"]))
    ]
    field = _drawn(result, sorted({row["sparsity"] for row in rows}), "right")
    whole = (
        field.properties(width=360, height=280, data=alt.Data(values=points))
        .facet(row=alt.Row("model:N", title=None), column=alt.Column("text:N", title=None))
        .configure(background="white")
    )
    image: bytes = vl_convert.vegalite_to_png(whole.to_json(), scale=2)
    return image


def _drawn(
    result: Mapping[str, Any], sparsities: list[float], legends: Any
) -> alt.LayerChart | alt.FacetChart:
    """Lines of methods and the dense model's level, of data with `COLUMNS` and "dense"."""
    methods = list(dict.fromkeys(row["method"] for row in result["rows"]))
    legend = alt.Legend(
        title=None, orient=legends, columns=2 if legends == "bottom" else 1, labelLimit=150
    )
    shape = alt.Scale(domain=methods)
    colour = alt.Scale(domain=methods, scheme="tableau20") if len(methods) > COLOURS else shape
    thick = alt.FieldOneOfPredicate(field="method", oneOf=list(result["paper"]))
    ticks = [0.0, *sparsities]
    base = (
        alt.Chart()
        .transform_filter("isValid(datum.perplexity)")
        .encode(
            x=alt.X(
                "sparsity:Q",
                axis=alt.Axis(values=ticks, format=".3~%", labelOverlap=True, grid=True),
                scale=alt.Scale(domain=[0, max(ticks)], nice=False, padding=8),
                title="share of depth or width removed",
            ),
            y=alt.Y("perplexity:Q", scale=alt.Scale(type="log", nice=False, padding=8)),
            color=alt.Color("method:N", sort=None, scale=colour, legend=legend),
        )
    )
    lines = base.mark_line().encode(
        strokeWidth=alt.condition(thick, alt.value(THICK), alt.value(THIN))
    )
    tips = [
        alt.Tooltip("method:N"),
        alt.Tooltip("sparsity:Q", format=".3~%"),
        alt.Tooltip("perplexity:Q", format=".4~g"),
    ]
    points = base.mark_point(filled=True, size=55, opacity=1).encode(
        shape=alt.Shape("method:N", sort=None, scale=shape, legend=legend), tooltip=tips
    )
    level = alt.Chart().mark_rule(strokeDash=[4, 4]).transform_filter("isValid(datum.dense)")
    return alt.layer(level.encode(y=alt.Y("dense:Q", title="perplexity")), lines, points)
