"""What runs of the same model and texts compute once for all of them, known beforehand. What they
share in truth: `run/shared.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from fusegpt_ray.cost.cost import Cost, scoring_stage
from fusegpt_ray.cost.evaluating import evaluation_stage
from fusegpt_ray.cost.stage import Stage
from fusegpt_ray.planning.plan import Plan
from fusegpt_ray.store.records import checksum


def shared(plans: Mapping[str, Plan]) -> tuple[dict[str, Cost], list[dict[str, Any]]]:
    """By the names of the runs, in the order in which they work: what each computes itself, where
    the first one does what several need. And what that is: [{"what", "runs", "flops"} …].
    """
    costs, users = dict[str, Cost](), dict[str, tuple[str, Stage, list[str]]]()
    for name, plan in plans.items():
        cost = plan.cost
        for key, what, stage in _parts(plan):
            _, _, names = users.setdefault(key, (what, stage, []))
            if names:
                cost = _without(cost, stage)
            names.append(name)
        costs[name] = cost
    rows = [
        {"what": what, "runs": names, "flops": stage.flops}
        for what, stage, names in users.values()
        if len(names) > 1
    ]
    return costs, rows


def _without(cost: Cost, part: Stage) -> Cost:
    stages = []
    for stage in cost.stages:
        if stage.name == part.name:
            forwards = stage.block_forwards - part.block_forwards
            stage = replace(stage, flops=stage.flops - part.flops, block_forwards=forwards)
        stages.append(stage)
    return replace(cost, stages=tuple(stages))


def _parts(plan: Plan) -> Iterator[tuple[str, str, Stage]]:
    """A key of all that it depends on, what it is, and its work, as a part of the run's stage."""
    recipe, dense, source = plan.recipe, plan.model.stack, plan.model.source.name
    dumped = recipe.model_dump(mode="json")
    basis = {key: dumped[key] for key in ("model", "calibration")}
    basis["batch"] = recipe.importance.batch
    if recipe.spec.by_metric and not recipe.search:
        depth, length = [len(dense)], recipe.calibration.length
        how = {"choice": recipe.spec.choice, "importance": dumped["importance"]}
        key = checksum({**basis, **how, "among": plan.removable.among(dense.kept)})
        yield (
            key,
            f"first scores of {source}",
            scoring_stage(recipe.importance, dense, depth, length),
        )
    for name, text in recipe.evaluation.items():
        if text.most_windows:
            key = checksum({**basis, "text": dumped["evaluation"][name]})
            what = f"perplexity of {source} on {name}"
            yield key, what, evaluation_stage(recipe, dense, [], [text])
