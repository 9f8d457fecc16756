"""How perplexity over sparsity is drawn: of the models of a run, and of those of a comparison."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import altair as alt

COLUMNS = ("method", "sparsity", "perplexity")
COLOURS = 10
"""That usual charts have; of more methods two would have the same."""
THIN, THICK = 1.5, 4.0
"""Of a line, and of one that matters more."""


def lines(
    methods: Sequence[str],
    sparsities: Collection[float],
    thick: Collection[str],
    legends: Any,
) -> alt.LayerChart | alt.FacetChart:
    """A line for each method, and the dense model's level, of data with `COLUMNS` and "dense".

    Args:
        methods: in the order of the legend.
        sparsities: without the dense model's 0.
        thick: the methods whose lines matter more.
        legends: where the legend stands.
    """
    legend = alt.Legend(
        title=None, orient=legends, columns=1 if legends == "right" else 2, labelLimit=150
    )
    scale = alt.Scale(domain=list(methods))
    many = len(methods) > COLOURS
    colours = alt.Scale(domain=list(methods), scheme="tableau20") if many else scale
    heavy = alt.FieldOneOfPredicate(field="method", oneOf=list(thick))
    ticks = [0.0, *sorted(sparsities)]
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
            color=alt.Color("method:N", sort=None, scale=colours, legend=legend),
        )
    )
    drawn = base.mark_line().encode(
        strokeWidth=alt.condition(heavy, alt.value(THICK), alt.value(THIN))
    )
    tips = [
        alt.Tooltip("method:N"),
        alt.Tooltip("sparsity:Q", format=".3~%"),
        alt.Tooltip("perplexity:Q", format=".4~g"),
    ]
    points = base.mark_point(filled=True, size=55, opacity=1).encode(
        shape=alt.Shape("method:N", sort=None, scale=scale, legend=legend), tooltip=tips
    )
    level = alt.Chart().mark_rule(strokeDash=[4, 4]).transform_filter("isValid(datum.dense)")
    return alt.layer(level.encode(y=alt.Y("dense:Q", title="perplexity")), drawn, points)
