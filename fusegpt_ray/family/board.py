"""The leaderboard of a family: a row for each model that is to be published, as `family.json` has
them (see `store/family.py`). No torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.text import Text

from fusegpt_ray.recipe.recipe import percent
from fusegpt_ray.terminal.display import duration
from fusegpt_ray.terminal.table import Table

Row = Mapping[str, Any]


def total(rows: Iterable[Row], key: str) -> float | None:
    """Of "seconds", "gpu_hours" or "cost": what all runs took, each of which may have published
    several models on its way; None where nothing is known.
    """
    by_run: dict[str, float] = {}
    for row in rows:
        if row[key] is not None:
            by_run[row["run"]] = max(row[key], by_run.get(row["run"], 0.0))
    return sum(by_run.values()) if by_run else None


def ranked(rows: Iterable[Row]) -> list[Row]:
    """By how much was removed, then the least damaged first: by the mean log-ratio of perplexities
    to the dense model's over all texts. What is not there comes last.
    """

    def key(row: Row) -> tuple[bool, float, float]:
        lost = [math.log(text["published"] / text["dense"]) for text in row["perplexity"].values()]
        mean = sum(lost) / len(lost) if lost else math.inf
        return row["status"] != "done", row["sparsity"] or 0.0, mean

    return sorted(rows, key=key)


def columns(rows: Sequence[Row]) -> list[str]:
    """Of a table of them, in the order of `cells`."""
    priced = ["cost"] if any(row["cost"] is not None for row in rows) else []
    per_text = (
        f"{kind}{text}" for text in _texts(rows) for kind in ("perplexity on ", "× dense, ")
    )
    return ["member", "method", "removed", "status", "parameters", *per_text, "time", *priced]


def cells(row: Row, rows: Sequence[Row]) -> Iterator[str]:
    """Of one row of the table of all."""
    yield row["member"]
    yield row["method"]
    yield "–" if row["sparsity"] is None else f"{percent(row['sparsity'])} %"
    yield row["status"]
    dense, published = (row["parameters"][key] for key in ("dense", "published"))
    yield f"{dense:,}" if published is None else f"{dense:,} → {published:,}"
    for text in _texts(rows):
        if found := row["perplexity"].get(text):
            yield f"{found['dense']:.2f} → {found['published']:.2f}"
            yield f"{found['published'] / found['dense']:.3g}"
        else:
            yield from "––"
    yield "–" if row["seconds"] is None else duration(row["seconds"])
    if any(other["cost"] is not None for other in rows):
        yield "–" if row["cost"] is None else f"{row['cost']:,.2f}"


def _texts(rows: Sequence[Row]) -> list[str]:
    return [*dict.fromkeys(text for row in rows for text in row["perplexity"])]


def in_words(row: Row) -> str:
    """One line on a row that has ended."""
    told = [f"{row['member']}, {row['method']}: {row['folder']} {row['status']}"]
    for text, found in row["perplexity"].items():
        told.append(f"{text} {found['dense']:.2f} → {found['published']:.2f}")
    return ", ".join(told)


def markdown(result: Mapping[str, Any]) -> str:
    """The leaderboard as a page of Markdown."""
    rows, heads = ranked(result["rows"]), columns(result["rows"])
    lines = [f"# {result['name']}", "", _line(heads), "|---" * len(heads) + "|"]
    lines += [_line(cells(row, rows)) for row in rows]
    if failed := [row for row in rows if row["status"] == "failed"]:
        lines += [""]
        lines += [f"Failed: {row['folder']}: {row['problem']}  " for row in failed]
    return "\n".join(lines) + "\n"


def _line(values: Iterable[str]) -> str:
    return f"| {' | '.join(value.replace('|', chr(92) + '|') for value in values)} |"


def on_terminal(result: Mapping[str, Any]) -> Table:
    """All rows, few columns: what a person follows while members work, and sees at the end."""
    rows = result["rows"]
    texts = _texts(rows)
    table = Table(title=Text(f"family {result['name']}"))
    for name in ("member", "method", "removed", *texts, "status"):
        table.add_column(Text(name))
    for row in rows:
        found = [row["perplexity"].get(text) for text in texts]
        values = (f"{one['dense']:.2f} → {one['published']:.2f}" if one else "–" for one in found)
        removed = "–" if row["sparsity"] is None else f"{percent(row['sparsity'])} %"
        told = (row["member"], row["method"], removed, *values, row["doing"] or row["status"])
        table.add_row(*map(Text, told))
    return table
