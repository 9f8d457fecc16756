"""Perplexity over sparsity: as charts of a report, and as one picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import altair as alt
import vl_convert

from fusegpt_ray.reporting.charts import Chart, over_sparsity
from fusegpt_ray.reporting.sparsities import COLUMNS, lines


def charts(result: Mapping[str, Any]) -> list[Chart]:
    """One for each model and text on which something was measured.

    Args:
        result: see `tables.result`.
    """
    made = []
    several = len({row["model"] for row in result["rows"]}) > 1
    for model, text in dict.fromkeys((row["model"], row["text"]) for row in result["rows"]):
        rows = [row for row in result["rows"] if (row["model"], row["text"]) == (model, text)]
        methods = dict.fromkeys(row["method"] for row in rows)
        caption = "Lower is better; the dashed line is the dense model."
        if paper := [method for method in methods if method in result["paper"]]:
            caption += f" The thick line is the paper's recipe ({', '.join(paper)})."
        made.append(
            over_sparsity(
                "perplexity",
                f"Perplexity on {text}" + (f": {model}" if several else ""),
                caption,
                [tuple(row[key] for key in COLUMNS) for row in rows],
                rows[0]["dense"],
                _lines(result, "bottom"),
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
    whole = (
        _lines(result, "right")
        .properties(width=360, height=280, data=alt.Data(values=points))
        .facet(row=alt.Row("model:N", title=None), column=alt.Column("text:N", title=None))
        .configure(background="white")
    )
    image: bytes = vl_convert.vegalite_to_png(whole.to_json(), scale=2)
    return image


def _lines(result: Mapping[str, Any], legends: str) -> alt.LayerChart | alt.FacetChart:
    methods = list(dict.fromkeys(row["method"] for row in result["rows"]))
    return lines(methods, {row["sparsity"] for row in result["rows"]}, result["paper"], legends)
