"""Perplexity over sparsity, as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def png(result: Mapping[str, Any]) -> bytes | None:
    """A line for each method from the dense model on, a field for each model and text; None where
    nothing was measured.

    Args:
        result: see `tables.result`.
    """
    rows = result["rows"]
    if not rows:
        return None
    import altair as alt  # takes a second, and nothing else needs it
    import vl_convert

    keys = ("model", "text", "method")
    points = [
        {**{key: row[key] for key in keys}, "sparsity": x, "perplexity": y}
        for row in rows
        for x, y in ((0.0, row["dense"]), (row["sparsity"], row["perplexity"]))
    ]
    dense = {(row["model"], row["text"]): row["dense"] for row in rows}
    level = [{"model": m, "text": t, "dense": value} for (m, t), value in dense.items()]
    lines = (
        alt.Chart()
        .mark_line(point=True)
        .encode(
            x=alt.X(
                "sparsity:Q", axis=alt.Axis(format="%"), title="share of depth or width removed"
            ),
            y=alt.Y("perplexity:Q", scale=alt.Scale(type="log", zero=False, nice=False)),
            color=alt.Color("method:N", sort=None, legend=alt.Legend(labelLimit=300)),
        )
        .transform_filter("isValid(datum.perplexity)")
    )
    rule = (
        alt.Chart()
        .mark_rule(strokeDash=[4, 4], color="gray")
        .encode(y=alt.Y("dense:Q", title="perplexity"))
        .transform_filter("isValid(datum.dense)")
    )
    chart = (
        alt.layer(lines, rule, data=alt.Data(values=points + level))
        .properties(width=360, height=280)
        .facet(row=alt.Row("model:N", title=None), column=alt.Column("text:N", title=None))
    )
    image: bytes = vl_convert.vegalite_to_png(chart.to_json(), scale=2)
    return image
