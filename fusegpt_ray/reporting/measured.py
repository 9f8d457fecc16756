"""Tables on a terminal of what `fusegpt score` and `fusegpt evaluate` measured, and their notes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.text import Text

from fusegpt_ray.terminal.table import Table


def score_table(result: Mapping[str, Any]) -> Table:
    """The blocks and their scores, for `fusegpt score` on a terminal."""
    table = Table("block", result["metric"])
    table.columns[1].justify = "right"
    for row in result["blocks"]:
        mark = "  ← lowest" if row["block"] == result["lowest"] else ""
        table.add_row(str(row["block"]), f"{row['score']:.6f}{mark}")
    return table


def perplexity_tables(rows: Sequence[Mapping[str, Any]]) -> Iterator[Table]:
    """The rows of `pipeline.evaluate`, on a terminal: a table for each text, of 80 columns."""
    beside = any("against" in row for row in rows)
    for text in dict.fromkeys(row["data"] for row in rows):
        table = Table("model", "perplexity", title=Text(f"perplexity on {text}"))
        if beside:
            for name in ("ratio", "95 % interval", "differs?"):
                table.add_column(name)
        for column in table.columns[1:]:
            column.justify = "right"
        for row in rows:
            if row["data"] == text:
                cells = [escape(row["model"]), f"{row['perplexity']:.4f}"]
                table.add_row(*cells, *(difference(row.get("against")) if beside else ()))
        yield table


def difference(found: Mapping[str, Any] | None) -> Iterator[str]:
    """The cells of a row's "against": ratio, interval, and whether there is a difference."""
    if found is None or "problem" in found:
        yield from "–––"
        return
    ends = found["ratio_interval"]
    yield f"{found['ratio']:.4f}"
    yield "–" if ends is None else " … ".join(f"{end:.4f}" for end in ends)
    yield {True: "yes", False: "perhaps", None: "too few windows"}[found["distinguishable"]]


def perplexity_notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What `perplexity_tables` leave unsaid: the protocols, what the ratio is, and where there is
    none.
    """
    notes = dict.fromkeys(row["protocol"] for row in rows)
    found = [(row, row["against"]) for row in rows if "against" in row]
    for _, against in found:
        if "problem" not in against:
            first, resamples = against["model"], against["resamples"]
            told = f"ratio: to the perplexity of {first}; its interval: of {resamples} resamples of"
            told += " the windows, in pairs; differs?: perhaps, where the interval holds 1"
            notes[told] = None
    for row, against in found:
        if "problem" in against:
            what = f"{row['model']} and {against['model']} on {row['data']}"
            notes[f"{what}: no ratio is told, because {against['problem']}"] = None
    return list(notes)
