"""Drawing windows from texts on workers, as the recipe asks for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from fusegpt_ray.recipe import Recipe
from fusegpt_ray.sections import Evaluation
from fusegpt_ray.text import mixture, windows
from fusegpt_ray.text.calibration import PACKED, Stream
from fusegpt_ray.text.documents import APART
from fusegpt_ray.text.fresh import fresh_windows
from fusegpt_ray.text.windows import Windows
from fusegpt_ray.text_sections import Text
from fusegpt_ray.workers.base import Workers


def calibration_windows(workers: Workers, recipe: Recipe, leading: int | None) -> Windows:
    """Of the calibration texts, drawn at random.

    Args:
        leading: the token that each window begins with, if any.

    Raises:
        UserError: a text cannot be used.
    """
    key, text = "calibration", recipe.calibration
    streams = mixture.streams(_reader(workers, text.pack), text, key)
    return mixture.calibration_windows(streams, text, leading, key)


def evaluation_windows(
    workers: Workers,
    text: Evaluation,
    length: int,
    leading: int | None,
    key: str,
    pack: bool = True,
) -> Windows:
    """Of a held-out text, one after another.

    `pack`: where the text itself does not tell.

    Raises:
        UserError: the text cannot be used.
    """
    packed = pack if text.pack is None else text.pack
    stream = _reader(workers, packed)(text, key)
    return windows.evaluation_windows(stream, text, length, leading, key, packed)


def healing_windows(
    workers: Workers, recipe: Recipe, leading: int | None
) -> tuple[Windows, Windows]:
    """To heal on, and held-out ones to choose the best state by.

    Raises:
        UserError: a text cannot be used, or is too short.
    """
    heal, calibration = recipe.heal, recipe.calibration
    assert heal is not None
    texts = heal if heal.data else calibration
    return fresh_windows(
        mixture.streams(_reader(workers, calibration.pack), texts, "heal"),
        texts,
        recipe.healing_windows,
        heal.held_out,
        calibration.length,
        calibration.seed,
        heal.repeat,
        leading,
        "heal",
        fewer=heal.batch if heal.tokens is None else None,
        pack=calibration.pack,
    )


def _reader(workers: Workers, pack: bool) -> Callable[[Text, str], Stream]:
    return partial(workers.tokens, reading=PACKED if pack else APART)
