"""What a run did for one model, as its manifest tells it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fusegpt_ray.compressing.rounds import fewer_at_once
from fusegpt_ray.measuring.judge import Judge
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.planning.plan import Plan
from fusegpt_ray.publishing.publish import versions
from fusegpt_ray.run.budget import SPENT
from fusegpt_ray.run.done import Done, moved
from fusegpt_ray.run.journal import Journal
from fusegpt_ray.targets import Target
from fusegpt_ray.text.windows import Windows
from fusegpt_ray.workers.base import Workers
from fusegpt_ray.workers.room import Allocation

STAGE_SECONDS = "stage_seconds"
"""In journal and manifest: seconds of the planned stages that no record of a round or of healing
tells of."""


@dataclass(frozen=True)
class Worked:
    """All of it, before the model is published."""

    target: Target
    rounds: Sequence[Done]
    healed: Done | None
    seconds: Mapping[str, float] = field(default_factory=dict)
    """By stage, of those outside of rounds and healing."""

    def facts(self, plan: Plan, workers: Workers, windows: Windows) -> dict[str, Any]:
        """
        Args:
            windows: of the calibration text.
        """
        recipe, records = plan.recipe, [round.record for round in self.rounds]
        return {
            **({"healing": self.healed.record} if self.healed else {}),
            "method": recipe.method,
            "sparsity": self.target.sparsity,
            "recipe": recipe.model_dump(mode="json"),
            "calibration": windows.protocol,
            "removed": [record["removed"] for record in records if record["removed"] is not None],
            "inserted": [copy for record in records for copy in record.get("inserted", ())],
            **({"width": width} if (width := records[-1].get("width")) else {}),
            **planned(plan, self.target, workers),
            "moved": moved(self.rounds, self.healed),
            "rounds": records,
            "fewer_at_once": fewer_at_once(recipe, records),
        }

    def measured(
        self, judge: Judge, stages: Mapping[str, Stack], journal: Journal, model: Stack
    ) -> dict[str, Any]:
        """What is said of the published model, and what the run has spent until then."""
        assert journal.budget
        moves, keys = moved(self.rounds, self.healed).values(), ("read", "written")
        total = {f"bytes_{key}": sum(stage[key] for stage in moves) for key in keys}
        before = judge.seconds
        told = judge.measure(self.target.folder, stages, model)
        took = added(self.seconds, {"evaluation": judge.seconds - before})
        return {**told, STAGE_SECONDS: took, SPENT: journal.budget.spent | total}


@dataclass
class Begun:
    """What can be told of a run before its first round, noted in its journal for whoever looks
    while it is under way.
    """

    journal: Journal
    facts: Mapping[str, Any]
    seconds: dict[str, float]
    """By stage, of those that are over then, also in attempts that were stopped."""

    @classmethod
    def noted(
        cls,
        plan: Plan,
        workers: Workers,
        journal: Journal,
        say: Callable[[str], None],
        generating: float,
    ) -> Begun:
        """`generating`: seconds that the dense model has just written text for."""
        before = (journal.kept("plan", 0, say) or {}).get(STAGE_SECONDS, {})
        facts = {"dense_blocks": len(plan.model.stack), "versions": versions()}
        facts |= planned(plan, plan.targets[-1], workers)
        found = cls(journal, facts, added(before, {"generating": generating}))
        found._keep()
        return found

    def judged(self, judge: Judge) -> None:
        """The dense model has been measured."""
        self.facts = {**self.facts, "perplexity": judge.of_dense}
        self.seconds = added(self.seconds, {"evaluation": judge.seconds})
        self._keep()

    def _keep(self) -> None:
        self.journal.keep("plan", 0, {**self.facts, STAGE_SECONDS: self.seconds})


def added(seconds: Mapping[str, float], more: Mapping[str, float]) -> dict[str, float]:
    """By stage; those that took no time are left out."""
    sums = {key: seconds.get(key, 0.0) + more.get(key, 0.0) for key in [*seconds, *more]}
    return {key: round(value, 3) for key, value in sums.items() if value}


def planned(plan: Plan, target: Target, workers: Workers) -> dict[str, Any]:
    """The work of one model, on these workers."""
    gpu = workers.hardware.get("gpu", "")
    training = workers.training_workers if plan.recipe.trains else 0
    held = Allocation(workers.replicas, training, workers.gpus_held)
    return {
        "planned": plan.stages_of(target, gpu, held),
        "planned_bytes": [*map(asdict, plan.traffic_of([target], held, workers.streams))],
        **({"gpu": gpu, "gpus": held.gpus} if gpu else {}),
    }
