"""A report as one page of HTML that needs no network."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fusegpt_ray.reporting.charts import Chart, charts
from fusegpt_ray.reporting.facts import Facts
from fusegpt_ray.reporting.place import OURS
from fusegpt_ray.reporting.shapes import Perplexity
from fusegpt_ray.terminal.display import byte_count, duration, flop_count
from fusegpt_ray.text.protocol import STAGES, described, stages, warnings


def html(found: Facts) -> str:
    """The whole page of one model or run."""
    return filled(
        "page.html.jinja",
        found.name,
        charts(found),
        _headline(found),
        facts=found,
        rounds=_rounds(found),
        inserted=[[copy.like, copy.after] for copy in found.inserted],
        shared=_shared(found),
        protocols=_protocols(found),
        work=_work(found),
        traffic=[*_traffic(found)],
        stages={stage: STAGES[stage] for stage in _stages(found)},
        recipe=json.dumps(found.recipe, indent=1, ensure_ascii=False),
    )


def filled(
    template: str,
    title: str,
    charts: Sequence[Chart],
    headline: Sequence[tuple[str, str]],
    **values: Any,
) -> str:
    """A template of this folder, which builds on layout.html.jinja.

    Args:
        headline: what one wants to know first, names and values.
        values: what else the template shows.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number}
    given = {"title": title, "charts": charts, "headline": headline, "vega": _vega()}
    page = environment.get_template(template).render(**given, **values)
    return OURS.decode() + page


def how_made(result: Mapping[str, Any]) -> dict[str, Any]:
    """Of a comparison or family: what its template shows of how it was made, and how far it is.

    Args:
        result: what its file says; see `store.comparison` and `store.family`.
    """
    when = datetime.fromtimestamp(result["time"], UTC).strftime("%Y-%m-%d %H:%M UTC")
    return {
        "told_at": when if result["state"] == "working" else "",
        "versions": result["versions"],
        "settings": json.dumps(result["settings"], indent=1, ensure_ascii=False),
    }


@cache
def _vega() -> str:
    """Vega, Vega-Lite and vega-embed in the version that altair writes for."""
    version = ".".join(alt.SCHEMA_VERSION.split(".")[:2])
    code: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", version)
    assert "</script" not in code and "<!--" not in code, "this would end the page's script"
    return code


def _stages(found: Facts) -> list[str]:
    """Those of which there is a perplexity."""
    return stages(row.by_stage for row in found.perplexity.values())


def _headline(found: Facts) -> list[tuple[str, str]]:
    """What one wants to know first: names and values."""
    blocks = str(found.dense_blocks or "?")
    if found.dense_blocks and not found.width:
        blocks += f" → {found.dense_blocks - len(found.removed) + len(found.inserted)}"
    told = [("blocks", blocks), ("method", found.method)]
    if found.width:
        told.insert(0, ("hidden size", f"{found.width.dense} → {found.width.kept}"))
    if found.bytes is not None:
        told.append(("size", byte_count(found.bytes)))
    if seconds := sum(found.seconds.values()):
        told.append(("time at work", duration(seconds)))
    if seconds := sum(found.measuring.values()):
        told.append(("time of measuring it", duration(seconds)))
    told += _spent(found)
    for text, row in found.perplexity.items():
        if row.undone is not None:
            told.append((f"damage undone on {text}", f"{row.undone:.0%}"))
    told += [(f"perplexity on {text}", _by_stage(row)) for text, row in found.perplexity.items()]
    if done := [other for other in found.others if other.name]:
        told.append(("published so far", ", ".join(other.name for other in done)))
    for other in done:
        for text, row in other.perplexity.items():
            told.append((f"perplexity of {other.name} on {text}", _by_stage(row)))
    return told


def _by_stage(row: Perplexity) -> str:
    return " → ".join(f"{stage} {value:.2f}" for stage, value in row.by_stage.items())


def _spent(found: Facts) -> list[tuple[str, str]]:
    """By the whole run until this model was published: also where it waited or began again."""
    if (spent := found.spent) is None:
        return []
    so_far = "" if found.state == "published" else " so far"
    told = [(f"time of the run{so_far}", duration(spent.seconds))]
    if found.gpu_hours is not None:
        told.append(("GPU hours of the run", f"{found.gpu_hours:,.2f}"))
    if len(found.gpu_seconds) > 1:
        each = ((gpu, seconds / 3600) for gpu, seconds in found.gpu_seconds.items())
        told += [(f"GPU hours on {gpu or 'other GPUs'}", f"{hours:,.2f}") for gpu, hours in each]
    if found.cost is not None:
        told.append(("price of these hours", f"{found.cost:,.2f}"))
    return told


def _rounds(found: Facts) -> list[list[Any]]:
    """Which block went where."""
    return [
        [
            number,
            round.removed,
            ", ".join(map(str, round.into)) or "–",
            *((round.losses[0], round.losses[-1]) if round.losses else (None, None)),
            duration(sum(round.seconds.values())),
        ]
        for number, round in enumerate(found.rounds, 1)
        if round.removed is not None
    ]


def _shared(found: Facts) -> list[list[Any]]:
    """The groups of blocks that share weights."""
    groups = found.healing.groups if found.healing else []
    return [[number, ", ".join(map(str, group))] for number, group in enumerate(groups, 1)]


def _work(found: Facts) -> list[list[str]]:
    """What was planned beside what it took, in money, too, where a price was given. The speed is
    that of the work that was done, which is often less than was planned.
    """
    price = found.price_per_second
    return [
        [
            row.stage,
            flop_count(row.flops),
            "–" if row.seconds is None else duration(row.seconds),
            duration(taken),
            "–" if (done := found.done(row)) is None else f"{flop_count(done / taken)}/s",
            *([_money(row.seconds, price), _money(taken, price)] if price else []),
        ]
        for row, taken in found.worked
    ]


def _traffic(found: Facts) -> Iterator[list[str]]:
    """Planned bytes beside those that were moved."""

    def shown(planned: int, moved: int) -> list[str]:
        return [byte_count(planned), byte_count(moved)] if planned or moved else ["–", "–"]

    for row, moved in found.traffic:
        yield [row.stage, *shown(row.read, moved.read), *shown(row.written, moved.written)]


def _money(seconds: float | None, price: float) -> str:
    """In the currency of the recipe's price, whatever it is."""
    return "–" if seconds is None else f"{seconds * price:,.2f}"


def _protocols(found: Facts) -> list[tuple[str, str]]:
    """How each text was used."""
    used = [
        ("calibration", found.calibration),
        ("healing", found.healing.data if found.healing else None),
        *((f"perplexity on {text}", row) for text, row in found.perplexity.items()),
    ]
    rows = [(what, text.model_dump(exclude_none=True)) for what, text in used if text]
    return [(what, "; ".join([described(row), *warnings(row)])) for what, row in rows]


def _number(value: object) -> str:
    """For a table."""
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
