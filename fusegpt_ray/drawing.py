"""Drawing windows from texts on workers, as the recipe asks for them."""

from __future__ import annotations

from functools import partial

from fusegpt_ray.generation import generated_stream
from fusegpt_ray.pictures import calibration_samples, evaluation_samples, healing_samples
from fusegpt_ray.recipe import Recipe
from fusegpt_ray.report import Display
from fusegpt_ray.sections import Evaluation
from fusegpt_ray.text import mixture, windows
from fusegpt_ray.text.calibration import PACKED, Reading, Stream
from fusegpt_ray.text.documents import APART
from fusegpt_ray.text.fresh import fresh_windows
from fusegpt_ray.text.published import published_windows
from fusegpt_ray.text.windows import Windows
from fusegpt_ray.text_sections import GeneratedText, Texts
from fusegpt_ray.workers.base import Workers


def calibration_windows(
    workers: Workers, recipe: Recipe, leading: int | None, show: Display
) -> Windows:
    """Of the calibration texts, drawn at random.

    Args:
        leading: the token that each window begins with, if any.

    Raises:
        UserError: a text cannot be used.
    """
    key, text = "calibration", recipe.calibration
    if text.images:
        return calibration_samples(workers, recipe)
    streams = _streams(workers, recipe, text, key, show, text.windows)
    return mixture.calibration_windows(streams, text, leading, key)


def evaluation_windows(
    workers: Workers,
    text: Evaluation,
    length: int,
    leading: int | None,
    key: str,
    pack: bool = True,
    images: bool = False,
) -> Windows:
    """Of a held-out text, one after another.

    `pack`, `images`: where the text itself does not tell.

    Raises:
        UserError: the text cannot be used.
    """
    if text.published:
        return published_windows(text, workers.setup.source.tokenizer(), length, leading, key)
    if images if text.images is None else text.images:
        return evaluation_samples(workers, text, length, key)
    packed = pack if text.pack is None else text.pack
    stream = workers.tokens(text, key, _reading(packed))
    return windows.evaluation_windows(stream, text, length, leading, key, packed)


def healing_windows(
    workers: Workers, recipe: Recipe, leading: int | None, show: Display
) -> tuple[Windows, Windows]:
    """To heal on, and held-out ones to choose the best state by.

    Raises:
        UserError: a text cannot be used, or is too short.
    """
    heal, calibration = recipe.heal, recipe.calibration
    assert heal is not None
    if calibration.images:
        return healing_samples(workers, recipe)
    texts, section = recipe.healing_texts
    amounts = (recipe.healing_windows, heal.held_out)
    return fresh_windows(
        _streams(workers, recipe, texts, section, show, *amounts),
        texts,
        recipe.healing_windows,
        heal.held_out,
        calibration.length,
        calibration.seed,
        heal.repeat,
        leading,
        section,
        fewer=heal.batch if heal.tokens is None else None,
        pack=calibration.pack,
    )


def _reading(pack: bool) -> Reading:
    return PACKED if pack else APART


def _streams(
    workers: Workers, recipe: Recipe, texts: Texts, key: str, show: Display, *windows: int
) -> list[Stream]:
    """Of each text; so many windows of them all are drawn, in one or several sets."""
    tokens = mixture.generated_tokens(texts, recipe.calibration.length, *windows)

    def generated(text: GeneratedText, name: str) -> Stream:
        return generated_stream(workers, recipe, text, tokens[text], name, show)

    read = partial(workers.tokens, reading=_reading(recipe.calibration.pack))
    return mixture.streams(read, texts, key, generated)
