"""The tables of a comparison, in the layout of the paper's Tables I to III: a row for each method,
the dense model first; a column for each sparsity and text. No torch.
"""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from rich.text import Text

from fusegpt_ray.comparison.cells import Comparison
from fusegpt_ray.recipe.recipe import percent
from fusegpt_ray.reporting.facts import of_manifest
from fusegpt_ray.store.comparison import FORMAT
from fusegpt_ray.terminal.table import Table
from fusegpt_ray.text.protocol import described, stages

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Model:
    """A model that is to be published."""

    model: str
    method: str
    sparsity: float
    uri: str
    status: Literal["waiting", "working", "ended"]
    """Of its run."""
    manifest: Mapping[str, Any] | None
    """None: it is not published, or its run has not ended."""
    problem: str = ""

    @property
    def named(self) -> dict[str, Any]:
        return {"model": self.model, "method": self.method, "sparsity": self.sparsity}


def result(
    comparison: Comparison,
    models: Sequence[Model],
    state: Literal["working", "done"],
    versions: Mapping[str, str],
) -> dict[str, Any]:
    """What is in table.json, see `store.comparison.Told`: {"format", "name", "state": "failed"
    where all is done and something failed, "time", "baseline", "paper", "rows", "failed",
    "unfinished", "settings", "versions"}.

    "damage_left" of a row is the log-perplexity lost to the dense model, relative to what the
    baseline lost of the same model at the same sparsity on the same text; None where that lost
    nothing. "bytes" are those of the weights, "seconds" those of the work.
    """
    rows = [row for model in models for row in _rows(model)]
    lost = {
        (row["model"], row["sparsity"], row["text"]): math.log(row["perplexity"] / row["dense"])
        for row in rows
        if row["method"] == comparison.baseline
    }
    for row in rows:
        base = lost.get((row["model"], row["sparsity"], row["text"]), 0.0)
        own = math.log(row["perplexity"] / row["dense"])
        row["damage_left"] = own / base if base > 0 else None
    ended = [model for model in models if model.status == "ended"]
    failed = [{**model.named, "problem": model.problem} for model in _failed(ended)]
    left = [{**one.named, "status": one.status} for one in models if one.status != "ended"]
    paper = dict.fromkeys(run.method for run in comparison.runs if run.recipe.preset == "paper")
    return {
        "format": FORMAT,
        "name": comparison.name,
        "state": "failed" if failed and state == "done" else state,
        "time": round(time.time(), 3),
        "baseline": comparison.baseline,
        "paper": [*paper],
        "rows": rows,
        "failed": failed,
        "unfinished": left,
        "settings": comparison.settings,
        "versions": dict(versions),
    }


def _failed(models: Sequence[Model]) -> Iterator[Model]:
    """What was not published; of a run that failed when all was, its last model."""
    for _, group in groupby(models, key=lambda m: (m.model, m.method, m.problem)):
        run = [*group]
        missing = [m for m in run if m.manifest is None]
        yield from missing or [m for m in run[-1:] if m.problem]


def _rows(model: Model) -> Iterator[dict[str, Any]]:
    if model.manifest is None:
        return
    size = model.manifest["publishing"]["bytes"]
    seconds = sum(of_manifest(model.uri, model.manifest, size).seconds.values())
    for text, row in model.manifest.get("perplexity", {}).items():
        yield {
            **model.named,
            "text": text,
            "dense": row["dense"],
            "dropped": row.get("dropped"),
            "width": model.manifest.get("width"),
            "perplexity": row[stages([row])[-1]],
            "removed": model.manifest["removed"],
            "bytes": size,
            "seconds": round(seconds, 3),
            "uri": model.uri,
            "protocol": described(row),
        }


def files(result: Mapping[str, Any]) -> dict[str, str]:
    """The contents of the tables for people and for spreadsheets."""
    text = io.StringIO()
    columns = ["model", "method", "sparsity", "text", "dense", "dropped", "perplexity"]
    columns += ["damage_left", "removed", "width", "bytes", "seconds", "uri"]
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in result["rows"]:
        removed, width = " ".join(map(str, row["removed"])), (row["width"] or {}).get("kept")
        writer.writerow({**row, "removed": removed, "width": width})
    return {"table.md": _markdown(result), "table.csv": text.getvalue()}


def _of(rows: Sequence[Row], key: str) -> list[Any]:
    return [*dict.fromkeys(row[key] for row in rows)]


def _markdown(result: Mapping[str, Any]) -> str:
    lines = [f"# {result['name']}", ""]
    for model in _of(result["rows"], "model"):
        rows = [row for row in result["rows"] if row["model"] == model]
        lines += [f"## {model}", "", "Perplexity:", "", *_grid(rows, "perplexity"), ""]
        base = result["baseline"]
        lines += [f"Damage left (log-perplexity lost, relative to {base}):", ""]
        lines += [*_grid(rows, "damage_left"), ""]
        lines += [f"{row[0]}: {row[1]}.  " for row in protocols(rows)]
    lines += [
        f"Failed: {item['model']}, {item['method']}, {item['sparsity']:.1%}: {item['problem']}  "
        for item in result["failed"]
    ]
    return "\n".join(lines).rstrip() + "\n"


def protocols(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Of each text in words how it was measured."""
    return [*dict.fromkeys((row["text"], row["protocol"]) for row in rows)]


def _grid(rows: Sequence[Row], key: str) -> list[str]:
    """One table of Markdown."""
    columns = [(s, t) for s in sorted(_of(rows, "sparsity")) for t in _of(rows, "text")]
    dense = {row["text"]: row["dense"] if key == "perplexity" else 0.0 for row in rows}
    head = [f"{percent(sparsity)} % {_cell(text)}" for sparsity, text in columns]
    lines = [f"| method | {' | '.join(head)} |", "|---" + "|---:" * len(columns) + "|"]
    lines.append(f"| dense | {' | '.join(f'{dense[text]:.2f}' for _, text in columns)} |")
    for method in _of(rows, "method"):
        found = {(r["sparsity"], r["text"]): r[key] for r in rows if r["method"] == method}
        values = (_number(found.get(column)) for column in columns)
        lines.append(f"| {_cell(method)} | {' | '.join(values)} |")
    return lines


def _cell(name: str) -> str:
    """A name as it stands in a table of Markdown."""
    return name.replace("|", "\\|")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def on_terminal(result: Mapping[str, Any]) -> Iterator[Table | str]:
    """A table for each model and text, of four sparsities at most so that it fits 80 columns."""
    failed = {(row["model"], row["method"], row["sparsity"]) for row in result["failed"]}
    for model in _of(result["rows"], "model"):
        of_model = [row for row in result["rows"] if row["model"] == model]
        for text, protocol in protocols(of_model):
            rows = [row for row in of_model if row["text"] == text]
            sparsities = sorted(_of(rows, "sparsity"))
            for first in range(0, len(sparsities), 4):
                yield _table(model, text, rows, sparsities[first : first + 4], failed)
            yield f"{text}: {protocol}"
    yield f"in brackets: log-perplexity lost, relative to {result['baseline']}"


def _table(
    model: str,
    text: str,
    rows: Sequence[Row],
    sparsities: Sequence[float],
    failed: Collection[tuple[str, str, float]],
) -> Table:
    table = Table(title=Text(f"{model}: perplexity on {text}"))
    table.add_column("method")
    for sparsity in sparsities:
        table.add_column(f"{percent(sparsity)} %", justify="right")
    table.add_row("dense", *[f"{rows[0]['dense']:.2f} (0.00)"] * len(sparsities))
    for method in _of(rows, "method"):
        found = {row["sparsity"]: row for row in rows if row["method"] == method}
        table.add_row(
            method,
            *(
                f"{found[s]['perplexity']:.2f} ({_number(found[s]['damage_left'])})"
                if s in found
                else ("failed" if (model, method, s) in failed else "–")
                for s in sparsities
            ),
        )
    return table
