"""The work of measuring perplexities, as far as the number of windows is known."""

from __future__ import annotations

from collections.abc import Sequence

from fusegpt_ray.cost.flops import attention_flops, matrix_flops
from fusegpt_ray.cost.stage import Stage
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.recipe.sections import Evaluation
from fusegpt_ray.targets import Target


def evaluation_stage(
    recipe: Recipe, dense: Stack, targets: Sequence[Target], texts: Sequence[Evaluation]
) -> Stage:
    """Of texts whose number of windows is known: the dense model, and each target after all stages
    that the judge measures.
    """
    done = flops = 0
    for text in texts:
        windows = text.most_windows
        assert windows, "their number is known"
        length = text.length_or(recipe.calibration.length)
        matrix, attention = matrix_flops(dense, length), attention_flops(dense, length)
        for target in (None, *targets):
            width = target and target.width
            models = len(_measured(recipe, target)) if target else 1
            walked = windows * models * (len(dense) - (target.fewer if target else 0))
            done += walked
            flops += int(walked * (matrix * (width.share if width else 1) + attention))
    return Stage("evaluation", done, flops)


def _measured(recipe: Recipe, target: Target) -> set[str]:
    """The stages of a model that have a perplexity of their own; see `measuring/judge.py`."""
    repaired = recipe.trains_groups and recipe.repairs
    asked = {"dropped": target.remove, "repaired": repaired, "healed": recipe.heal}
    return {recipe.spec.stage, *(stage for stage, there in asked.items() if there)}
