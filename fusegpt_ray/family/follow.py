"""What is known of the members of a family while they work and afterwards."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from fusegpt_ray.family.board import in_words, markdown
from fusegpt_ray.family.members import Members
from fusegpt_ray.model.companions import REPORT
from fusegpt_ray.publishing.publish import versions
from fusegpt_ray.reporting.facts import of_manifest
from fusegpt_ray.scheduling.news import News, as_json
from fusegpt_ray.scheduling.slots import Job
from fusegpt_ray.store import storage
from fusegpt_ray.store.checkpoint import read_index
from fusegpt_ray.store.family import BOARD, FORMAT
from fusegpt_ray.targets import Target
from fusegpt_ray.terminal.display import Display
from fusegpt_ray.text.protocol import stages

PAGE, TABLE = "index.html", "leaderboard.md"


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
        self._news = News(self._file(BOARD), self._newest, show)

    def changed(self, job: Job) -> None:
        """Tell it to whoever follows family.json."""
        self._news.write()
        if job.ended:
            for name, method, of, target in self._entries:
                if of is job and target.folder in self._final:
                    self.show.say(in_words(self._row(name, method, job, target)))

    def result(self, state: str) -> dict[str, Any]:
        """What is in family.json, see `store.family.Told`; of what is known, without reading."""
        return {
            "format": FORMAT,
            "name": self.members.name,
            "state": state,
            "time": round(time.time(), 3),
            "rows": [self._row(*entry) for entry in self._entries],
            "settings": self.members.settings,
            "versions": versions(),
        }

    def ended(self) -> dict[str, Any]:
        """See `result`; once all jobs have ended."""
        self._look()
        failed = any(job.problem for _, _, job, _ in self._entries)
        return self.result("failed" if failed else "done")

    def write(self, result: Mapping[str, Any], page: bytes | None) -> None:
        """The files of a family, family.json last."""
        storage.write(self._file(TABLE), markdown(result).encode())
        if page:
            storage.write(self._file(PAGE), page)
        storage.write(self._file(BOARD), as_json(result))

    def _file(self, name: str) -> str:
        return storage.join(self.members.folder, name)

    def _row(self, name: str, method: str, job: Job, target: Target) -> dict[str, Any]:
        """See `store.family.Row`."""
        found, status = self._final.get(target.folder), "working" if job.working else "waiting"
        if target.folder in self._final:
            status = "done" if found else "failed"
        doing = job.show.doing if job.working and not job.ended else ""
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

    def _newest(self) -> dict[str, Any]:
        self._look()
        return self.result("working")

    def _look(self) -> None:
        """At what jobs that have ended have published."""
        for _, _, job, target in self._entries:
            if job.ended and target.folder not in self._final:
                manifest = job.published(target)
                self._final[target.folder] = _told(target, manifest) if manifest else None


def _told(target: Target, manifest: Mapping[str, Any]) -> dict[str, Any]:
    facts = of_manifest(target.name, manifest, manifest["publishing"]["bytes"])
    tensors = read_index(target.folder, "output.uri")
    return {
        "published": sum(prod(tensor.shape) for tensor in tensors.values()),
        "report": REPORT in manifest["files"],
        "perplexity": {
            text: {"dense": row["dense"], "published": row[stages([row])[-1]]}
            for text, row in manifest.get("perplexity", {}).items()
        },
        "seconds": round(sum(facts.seconds.values()), 3),
        "gpu_hours": facts.gpu_hours,
        "cost": facts.cost,
    }
