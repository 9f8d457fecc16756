"""The leaderboard of a family: a row for each model that is to be published, while the members work
and afterwards.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

from rich.table import Table
from rich.text import Text

from fusegpt_ray.errors import StorageError
from fusegpt_ray.family.members import Members
from fusegpt_ray.model.companions import REPORT
from fusegpt_ray.recipe import percent
from fusegpt_ray.report import Display, duration
from fusegpt_ray.reporting.facts import of_manifest
from fusegpt_ray.scheduling.slots import Job
from fusegpt_ray.store import storage
from fusegpt_ray.store.checkpoint import read_index
from fusegpt_ray.store.family import BOARD, FORMAT
from fusegpt_ray.store.manifest import MANIFEST
from fusegpt_ray.targets import Target
from fusegpt_ray.text.protocol import stages

PAGE, TABLE = "index.html", "leaderboard.md"
Row = Mapping[str, Any]


class Board:
    """Follows the jobs of a family."""

    def __init__(self, members: Members, jobs: Sequence[Job], show: Display) -> None:
        self.members, self.show = members, show
        runs = [(member, run) for member in members.members for run in member.runs]
        self._entries = [
            (member.name, run.method, job, target)
            for (member, run), job in zip(runs, jobs, strict=True)
            for target in job.plan.targets
        ]
        self._parameters = {id(job): job.plan.cost.parameters for job in jobs}
        """Of the dense models."""
        self._final: dict[str, dict[str, Any] | None] = {}
        """What manifests tell of models whose jobs have ended, by folder; None: they failed."""
        self._writing = threading.Lock()

    def changed(self, job: Job) -> None:
        """Tell it to whoever follows family.json."""
        try:
            if job.ended:
                self._look(job)
            with self._writing:
                storage.write(self._file(BOARD), _json(self.result("working")))
        except StorageError as error:  # what is lost is only the news
            self.show.say(f"WARNING: {BOARD} could not be written ({error})")
        if job.ended:
            for name, method, of, target in self._entries:
                if of is job:
                    self.show.say(in_words(self._row(name, method, job, target)))

    def result(self, state: str) -> dict[str, Any]:
        """{"format", "name", "state", "rows": see `_row`}; of what is known, without reading."""
        about = {"format": FORMAT, "name": self.members.name, "state": state}
        return {**about, "rows": [self._row(*entry) for entry in self._entries]}

    def ended(self) -> dict[str, Any]:
        """See `result`; once all jobs have ended."""
        for _, _, job, _ in self._entries:
            self._look(job)
        failed = any(job.problem for _, _, job, _ in self._entries)
        return self.result("failed" if failed else "done")

    def write(self, result: Mapping[str, Any], page: bytes | None) -> None:
        """The files of a family, family.json last."""
        storage.write(self._file(TABLE), markdown(result).encode())
        if page:
            storage.write(self._file(PAGE), page)
        storage.write(self._file(BOARD), _json(result))

    def _file(self, name: str) -> str:
        return storage.join(self.members.folder, name)

    def _row(self, name: str, method: str, job: Job, target: Target) -> dict[str, Any]:
        """{"member", "method", "sparsity", "source", "status", "doing", "folder", "run",
        "problem", "parameters": {"dense", "published"}, "report", "perplexity": {text: {"dense",
        "published"}}, "seconds", "gpu_hours", "cost"}. The folder is a name beside that of
        families; "gpu_hours" and "cost" are None where no price was given or no GPU was used.
        """
        found, status = self._final.get(target.folder), "waiting" if job.show is None else "working"
        if target.folder in self._final:
            status = "done" if found else "failed"
        doing = job.show.doing if job.show and not job.ended else ""
        unknown: dict[str, Any] = {
            "perplexity": {},
            "seconds": None,
            "gpu_hours": None,
            "cost": None,
        }
        told = {"published": None, "report": False, **unknown, **(found or {})}
        dense, published = self._parameters[id(job)], told.pop("published")
        return {
            "member": name,
            "method": method,
            "sparsity": target.sparsity,
            "source": job.plan.model.source.name,
            "status": status,
            "doing": doing,
            "folder": target.name,
            "run": job.id,
            "problem": job.problem if status == "failed" else "",
            "parameters": {"dense": dense, "published": published},
            **told,
        }

    def _look(self, job: Job) -> None:
        """At what a job that has ended has published: only models of this very run count."""
        for _, _, of, target in self._entries:
            if of is job and target.folder not in self._final:
                file = storage.join(target.folder, MANIFEST)
                manifest = storage.read_json(file) if storage.exists(file) else {}
                ours = bool(manifest) and manifest.get("run") == job.id
                self._final[target.folder] = _told(target, manifest) if ours else None


def _told(target: Target, manifest: Mapping[str, Any]) -> dict[str, Any]:
    facts = of_manifest(target.name, manifest, manifest["publishing"]["bytes"])
    seconds = round(sum(facts.seconds.values()), 3)
    price, cluster = facts.price_per_second, manifest["recipe"]["cluster"]
    cost = None if price is None else seconds * price
    tensors = read_index(target.folder, "output.uri")
    return {
        "published": sum(prod(tensor.shape) for tensor in tensors.values()),
        "report": REPORT in manifest["files"],
        "perplexity": {
            text: {"dense": row["dense"], "published": row[stages([row])[-1]]}
            for text, row in manifest.get("perplexity", {}).items()
        },
        "seconds": seconds,
        "gpu_hours": None if cost is None else cost / cluster["gpu_hour_price"],
        "cost": cost,
    }


def _json(result: Mapping[str, Any]) -> bytes:
    return (json.dumps(result, indent=1, ensure_ascii=False) + "\n").encode()


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
    names = ("member", "method", "removed", "parameters", *per_text, "time", *priced, "status")
    return list(names)


def cells(row: Row, rows: Sequence[Row]) -> Iterator[str]:
    """Of one row of the table of all."""
    yield row["member"]
    yield row["method"]
    yield "–" if row["sparsity"] is None else f"{percent(row['sparsity'])} %"
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
    yield row["status"]


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
        table.add_column(Text(name), overflow="fold")
    for row in rows:
        found = [row["perplexity"].get(text) for text in texts]
        values = (f"{one['dense']:.2f} → {one['published']:.2f}" if one else "–" for one in found)
        removed = "–" if row["sparsity"] is None else f"{percent(row['sparsity'])} %"
        told = (row["member"], row["method"], removed, *values, row["doing"] or row["status"])
        table.add_row(*map(Text, told))
    return table
