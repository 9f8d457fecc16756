"""Drawing windows from texts on workers, as the recipe asks for them."""

from __future__ import annotations

import numpy as np

from fusegpt_ray.recipe import Recipe
from fusegpt_ray.sections import Evaluation
from fusegpt_ray.text import windows
from fusegpt_ray.text.windows import Windows
from fusegpt_ray.workers.base import Workers


def calibration_windows(workers: Workers, recipe: Recipe, leading: int | None) -> Windows:
    """Of the calibration text, drawn at random.

    Args:
        leading: the token that each window begins with, if any.

    Raises:
        UserError: the text cannot be used.
    """
    key, text = "calibration.data", recipe.calibration
    return windows.calibration_windows(workers.tokens(text, key), text, leading, key)


def evaluation_windows(
    workers: Workers, text: Evaluation, length: int, leading: int | None, key: str
) -> Windows:
    """Of a held-out text, one after another.

    Raises:
        UserError: the text cannot be used.
    """
    return windows.evaluation_windows(workers.tokens(text, key), text, length, leading, key)


def healing_windows(
    workers: Workers, recipe: Recipe, leading: int | None
) -> tuple[Windows, Windows]:
    """To heal on, and to choose the best state by: no token is in two of them, unless
    `heal.repeat` allows it.

    Raises:
        UserError: the text cannot be used, or is too short.
    """
    heal = recipe.heal
    assert heal is not None
    length = recipe.calibration.length
    text = heal if heal.data else recipe.calibration
    key = "heal.data" if heal.data else "calibration.data"
    every = windows.evaluation_windows(
        workers.tokens(text, key), Evaluation(data=text.data), length, leading, key
    )
    order = np.random.default_rng(recipe.calibration.seed).permutation(len(every.tokens_WT))
    held, rest = order[: heal.held_out], order[heal.held_out :]
    count = min(recipe.healing_windows, len(rest)) // heal.batch * heal.batch
    take = lambda numbers: Windows(every.tokens_WT[numbers], every.data, every.bos)  # noqa: E731
    return take(rest[:count]), take(held)
