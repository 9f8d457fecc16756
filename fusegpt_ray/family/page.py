"""The page of a family: one file of HTML that needs no network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fusegpt_ray.family.board import cells, columns, ranked, total
from fusegpt_ray.model.companions import REPORT
from fusegpt_ray.reporting.charts import Chart, over_sparsity
from fusegpt_ray.reporting.page import filled, how_made
from fusegpt_ray.reporting.sparsities import lines
from fusegpt_ray.store.public import public_of_many
from fusegpt_ray.terminal.display import duration


def html(result: Mapping[str, Any], linked: bool) -> str:
    """The whole page.

    Args:
        result: what is in family.json, see `store.family.Told`.
        linked: it will lie in the family's folder, from where links lead to its models.
    """
    result = public_of_many(result)
    rows = result["rows"]
    return filled(
        "family.html.jinja",
        result["name"],
        [*_charts(result)],
        [*_headline(result)],
        members=[*dict.fromkeys(row["member"] for row in rows)],
        columns=columns(rows),
        rows=[(row, [*cells(row, rows)]) for row in ranked(rows)],
        linked=linked,
        report=REPORT,
        failed=[(row["folder"], row["problem"]) for row in rows if row["status"] == "failed"],
        **how_made(result),
    )


def _headline(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    rows = result["rows"]
    done = [row for row in rows if row["status"] == "done"]
    failed = sum(row["status"] == "failed" for row in rows)
    told = ((len(done), "done"), (failed, "failed"), (len(rows) - len(done) - failed, "to come"))
    yield "models", ", ".join(f"{count} {what}" for count, what in told if count or what == "done")
    yield "members", str(len({row["member"] for row in rows}))
    if seconds := total(done, "seconds"):
        yield "time at work", duration(seconds)
    for key, name in (("gpu_hours", "GPU hours"), ("cost", "cost")):
        if (value := total(done, key)) is not None:
            yield name, f"{value:,.2f}"


def _charts(result: Mapping[str, Any]) -> Iterator[Chart]:
    """For each member of several sparsities and each text."""
    found = [row for row in result["rows"] if row["sparsity"] is not None and row["perplexity"]]
    members = dict.fromkeys(row["member"] for row in found)
    for member, text in ((m, t) for m in members for t in dict.fromkeys(_texts(found))):
        rows = [row for row in found if row["member"] == member and text in row["perplexity"]]
        shares = {row["sparsity"] for row in rows}
        if len(shares) < 2:
            continue
        methods = [*dict.fromkeys(row["method"] for row in rows)]
        points = [
            (row["method"], row["sparsity"], row["perplexity"][text]["published"]) for row in rows
        ]
        yield over_sparsity(
            "perplexity",
            f"Perplexity on {text}: {member}",
            "Lower is better; the dashed line is the dense model.",
            points,
            rows[0]["perplexity"][text]["dense"],
            lines(methods, shares, (), "bottom"),
        )


def _texts(rows: list[Mapping[str, Any]]) -> Iterator[str]:
    for row in rows:
        yield from row["perplexity"]
