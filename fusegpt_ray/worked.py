"""What a run did for one model, as its manifest tells it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fusegpt_ray.model.stack import Stack
from fusegpt_ray.plan import Plan
from fusegpt_ray.publishing.publish import versions
from fusegpt_ray.rounds import fewer_at_once
from fusegpt_ray.run.budget import SPENT
from fusegpt_ray.run.done import Done, moved
from fusegpt_ray.run.journal import Journal
from fusegpt_ray.targets import Target
from fusegpt_ray.text.windows import Windows
from fusegpt_ray.workers.base import Workers
from fusegpt_ray.workers.room import Held


@dataclass(frozen=True)
class Worked:
    """All of it, before the model is published."""

    target: Target
    rounds: Sequence[Done]
    healed: Done | None

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
        self, judged: Callable[[Stack], Mapping[str, Any]], journal: Journal, model: Stack
    ) -> dict[str, Any]:
        """What is said of the published model, and what the run has spent until then."""
        assert journal.budget
        stages, keys = moved(self.rounds, self.healed).values(), ("read", "written")
        total = {f"bytes_{key}": sum(stage[key] for stage in stages) for key in keys}
        return {**judged(model), SPENT: journal.budget.spent | total}


def known_before(plan: Plan, workers: Workers) -> dict[str, Any]:
    """What can be told of a run before its first round, for whoever looks while it is under way."""
    about = {"dense_blocks": len(plan.model.stack), "versions": versions()}
    return about | planned(plan, plan.targets[-1], workers)


def planned(plan: Plan, target: Target, workers: Workers) -> dict[str, Any]:
    """The work of one model, on these workers."""
    gpu = workers.hardware.get("gpu", "")
    training = workers.training_workers if plan.recipe.trains else 0
    held = Held(workers.replicas, training, workers.gpus_held)
    return {
        "planned": plan.stages_of(target, gpu, held),
        "planned_bytes": [*map(asdict, plan.traffic_of([target], held, workers.streams))],
        **({"gpu": gpu, "gpus": held.gpus} if gpu else {}),
    }
