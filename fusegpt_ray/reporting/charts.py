"""The charts of a report: Vega-Lite by way of altair, each with the numbers that it shows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from fusegpt_ray.recipe.specs import METHOD_SPECS
from fusegpt_ray.reporting import sparsities
from fusegpt_ray.reporting.facts import Facts
from fusegpt_ray.reporting.shapes import Other, Round

Cell = int | float | str | None
COLOURS = ["#3b82f6", "#e8730c"]
"""Two that are told apart on white and on black, and by the colour-blind."""
ROW = 24
"""Pixels of a row of the heat map, or of a bar."""


@dataclass(frozen=True)
class Chart:
    name: str
    """For programs; unique, but that of what there is one of for each text."""
    title: str
    caption: str
    """One sentence: what is to be seen."""
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    """All that is drawn, as numbers."""
    spec: dict[str, Any]
    """For vega-embed; colours of text and lines are left to the page."""


def charts(facts: Facts) -> list[Chart]:
    """Those that there is something to draw of."""
    made = [
        *_sparsities(facts),
        *_perplexities(facts),
        _scores(facts),
        _groups(facts),
        _healing(facts),
        _seconds(facts),
    ]
    return [chart for chart in made if chart]


def _perplexities(facts: Facts) -> Iterator[Chart]:
    for text, row in facts.perplexity.items():
        stages = [*row.by_stage.items()]
        if len(stages) == 1:  # so far, the dense model's alone
            continue
        base = alt.Chart().encode(
            x=alt.X("stage:N", sort=None, title=None, axis=alt.Axis(labelAngle=0)),
            y=alt.Y("perplexity:Q", scale=alt.Scale(zero=False, padding=16)),
        )
        value = alt.Text("perplexity:Q", format=".2f")
        level = alt.Y("dense:Q", title="perplexity")
        dense = alt.Chart().mark_rule(strokeDash=[4, 4]).encode(y=level)
        yield chart(
            "perplexity",
            f"Perplexity on {text}",
            "Lower is better; the dashed line is the dense model.",
            ("stage", "perplexity"),
            stages,
            alt.layer(
                dense,
                base.mark_line(
                    color=COLOURS[0], point=alt.OverlayMarkDef(size=60, color=COLOURS[0])
                ),
                base.mark_text(dy=-14).encode(text=value),
            ),
            extra={"dense": row.dense},
        )


def _sparsities(facts: Facts) -> Iterator[Chart]:
    """Of all models of the run that are there, where these are several."""
    models: list[Facts | Other] = [facts, *facts.others]
    models.sort(key=lambda model: model.sparsity or 0.0)
    shares = {model.sparsity for model in models if model.sparsity}
    if len(shares) < 2:
        return
    for text, row in facts.perplexity.items():
        lines: dict[str, list[tuple[Cell, ...]]] = {facts.method: [], DROPPED: []}
        for model in models:
            if not model.sparsity or text not in model.perplexity:
                continue
            *_, (stage, value) = (stages := model.perplexity[text].by_stage).items()
            lines[facts.method].append((facts.method, model.sparsity, value))
            if DROPPED in stages and stage != DROPPED:
                lines[DROPPED].append((DROPPED, model.sparsity, stages[DROPPED]))
        if [row[1:] for row in lines[DROPPED]] == [row[1:] for row in lines[facts.method]]:
            del lines[DROPPED]
        rows = [row for line in lines.values() for row in line]
        methods = [method for method, line in lines.items() if line]
        beside = " The thin line is that of the same blocks removed, nothing trained."
        yield over_sparsity(
            "sparsities",
            f"Perplexity on {text} over sparsity",
            "Lower is better; the dashed line is the dense model." + beside * (DROPPED in methods),
            rows,
            row.dense,
            sparsities.lines(methods, shares, [facts.method], "bottom"),
        )


DROPPED = "dropped"
"""What `text.protocol.STAGES` calls the same blocks removed and nothing trained."""


def over_sparsity(
    name: str,
    title: str,
    caption: str,
    rows: Sequence[Sequence[Cell]],
    dense: float,
    drawn: alt.LayerChart | alt.FacetChart,
) -> Chart:
    """Of rows of `sparsities.COLUMNS`; every method begins at the dense model.

    Args:
        drawn: see `sparsities.lines`.
    """
    return chart(
        name,
        title,
        caption,
        sparsities.COLUMNS,
        rows,
        drawn,
        height=300,
        extra={"dense": dense},
        also=[(method, 0.0, dense) for method in dict.fromkeys(row[0] for row in rows)],
    )


def _scores(facts: Facts) -> Chart | None:
    """A row for each round, a column for each block that was still there."""
    rows = [row for number, round in enumerate(facts.rounds, 1) for row in _round(number, round)]
    if not rows:
        return None
    positive = all(isinstance(row[2], float) and row[2] > 0 for row in rows)
    how, estimated = facts.chosen_by, any(round.stopped for round in facts.rounds)
    base = alt.Chart().encode(
        x=alt.X("block:O", axis=alt.Axis(labelAngle=0, labelOverlap=True, labelSeparation=4)),
        y=alt.Y("round:O"),
    )
    score = alt.Color(
        "score:Q",
        title=None,
        scale=alt.Scale(type="log" if positive else "linear", scheme="viridis"),
        legend=alt.Legend(orient="top", gradientLength=200, format=".2~g", values=_ends(rows)),
    )
    tips = [alt.Tooltip(f"{key}:{kind}") for key, kind in zip(_SCORED, "OOQNN", strict=True)]
    removed = (
        base.mark_point(shape="cross", size=110, filled=True, fill="white", stroke="black")
        .transform_filter("datum.outcome == 'removed'")
        .encode(tooltip=tips)
    )
    return chart(
        "scores",
        f"{how[0].upper()}{how[1:]} of each block, round by round",
        "Each round removes the block marked with a cross, the one with the lowest score"
        + "; scores of blocks that could no longer be the lowest were left as estimates" * estimated
        + ".",
        _SCORED,
        rows,
        alt.layer(base.mark_rect().encode(color=score, tooltip=tips), removed),
        height=ROW * max(3, len({row[0] for row in rows})),
    )


def _ends(rows: Sequence[Sequence[Cell]]) -> list[float]:
    """The lowest and the highest score: ticks between them would overlap on a narrow scale."""
    scores = [row[2] for row in rows if isinstance(row[2], float) and math.isfinite(row[2])]
    return [min(scores), max(scores)] if scores else []


_SCORED = ("round", "block", "score", "known", "outcome")


def _round(number: int, round: Round) -> Iterator[tuple[Cell, ...]]:
    known = {block: (score, "exactly") for block, score in round.scores.items()}
    known |= {block: (found.mean, "as an estimate") for block, found in round.stopped.items()}
    for block, (score, how) in sorted(known.items()):
        yield number, block, score, how, "removed" if block == round.removed else "stays"


def _groups(facts: Facts) -> Chart | None:
    """Over epochs; or over rounds, where each had one epoch."""
    rows = [
        (number, epoch, loss)
        for number, round in enumerate(facts.rounds, 1)
        for epoch, loss in enumerate(round.losses, 1)
    ]
    if not rows:
        return None
    several = any(epoch > 1 for _, epoch, _ in rows)
    line = (
        alt.Chart()
        .mark_line(color=COLOURS[0], point=True)
        .encode(
            x=_steps("epoch" if several else "round"),
            y=alt.Y("loss:Q", scale=_losses(row[2] for row in rows)),
        )
    )
    if several:
        last = rows[-1][0]
        some = [*range(1, last + 1, max(1, last // 5))]
        legend = alt.Legend(orient="top", gradientLength=200, format="d", values=some)
        scale = alt.Scale(range=COLOURS)
        line = line.encode(color=alt.Color("round:Q", scale=scale, legend=legend), detail="round:N")
    title, what = (
        "Loss of each group",
        "the blocks around the removed one while they were trained, ",
    )
    what += "a line for each round." if several else "a point for each round."
    if (spec := METHOD_SPECS.get(facts.method)) and spec.light:
        title, what = "Loss of the light block", "the block in place of the run, epoch by epoch."
    return chart(
        "groups",
        title,
        f"Mean loss of {what}",
        ("round", "epoch", "loss"),
        rows,
        line,
    )


_LOSSES = {
    "kl": "KL divergence from the dense model, in nats a token, and what heal.hidden adds",
    "tokens": "cross-entropy of the next token, in nats",
}


def _healing(facts: Facts) -> Chart | None:
    if not facts.healing:
        return None
    kinds = {"training": (1, facts.healing.losses), "held-out": (0, facts.healing.held_out)}
    rows = [
        (part, kind, loss)
        for kind, (first, losses) in kinds.items()
        for part, loss in enumerate(losses, first)
    ]
    if not rows:
        return None
    line = (
        alt.Chart()
        .mark_line(point=True)
        .encode(
            x=_steps("part"),
            y=alt.Y("loss:Q", scale=alt.Scale(zero=False)),
            color=alt.Color(
                "windows:N",
                sort=None,
                title=None,
                scale=alt.Scale(domain=[*kinds], range=COLOURS[::-1]),
                legend=alt.Legend(orient="top"),
            ),
        )
    )
    return chart(
        "healing",
        "Healing",
        f"Loss ({_LOSSES[facts.healing_loss]}) over the parts of the training; the state with the"
        " lowest held-out loss is kept.",
        ("part", "windows", "loss"),
        rows,
        line,
    )


def _seconds(facts: Facts) -> Chart | None:
    rows = [*facts.seconds.items(), *facts.measuring.items()]
    if not rows:
        return None
    bars = (
        alt.Chart()
        .mark_bar(color=COLOURS[0])
        .encode(
            x=alt.X("seconds:Q"),
            y=alt.Y("stage:N", sort=None, title=None, axis=alt.Axis(labelLimit=150)),
        )
    )
    return chart(
        "seconds",
        "Seconds by stage",
        "All rounds together, as the run itself took the time; opening the model and reading texts"
        " are not among them.",
        ("stage", "seconds"),
        rows,
        bars,
        height=ROW * len(rows),
    )


def _steps(name: str) -> alt.X:
    """An axis of whole numbers, some left out where there is no room."""
    axis = alt.Axis(labelAngle=0, labelOverlap=True, labelSeparation=4, grid=True)
    return alt.X(f"{name}:O", axis=axis)


def _losses(values: Iterable[float]) -> alt.Scale:
    """Losses of several rounds differ by magnitudes."""
    if all(value > 0 for value in values):
        return alt.Scale(type="log", nice=False, padding=12)
    return alt.Scale(zero=False)


def chart(
    name: str,
    title: str,
    caption: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    drawn: alt.Chart | alt.LayerChart | alt.FacetChart,
    height: int = 240,
    extra: dict[str, Cell] | None = None,
    also: Sequence[Sequence[Cell]] = (),
) -> Chart:
    """As wide as the page.

    Args:
        extra: columns more, the same in each row, that are drawn only.
        also: rows more that are drawn only.
    """
    values = [
        {key: _drawable(cell) for key, cell in zip(columns, row, strict=True)} | (extra or {})
        for row in (*rows, *also)
    ]
    wide: dict[str, Any] = {"width": "container", "height": height}
    spec = {**drawn.properties(data=alt.Data(values=values)).to_dict(), **wide}
    del spec["$schema"]  # an address; vega-embed is told what this is
    return Chart(name, title, caption, columns, rows, spec)


def _drawable(cell: Cell) -> Cell:
    """JSON knows no infinity; what is not finite is not drawn, but stands in the table."""
    return None if isinstance(cell, float) and not math.isfinite(cell) else cell
