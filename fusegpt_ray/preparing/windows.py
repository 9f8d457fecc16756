"""Drawing windows from texts on workers, as the recipe asks for them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np

from fusegpt_ray.preparing.generation import generated_stream
from fusegpt_ray.preparing.preflight import image_token
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.recipe.sections import Evaluation
from fusegpt_ray.recipe.text_sections import GeneratedText, Text, Texts, WeightedText
from fusegpt_ray.run.shared import Shared
from fusegpt_ray.terminal.display import Display
from fusegpt_ray.text import mixture, windows
from fusegpt_ray.text.album import Album
from fusegpt_ray.text.calibration import PACKED, Reading, Stream
from fusegpt_ray.text.documents import APART
from fusegpt_ray.text.formats import beside
from fusegpt_ray.text.fresh import fresh_windows
from fusegpt_ray.text.images import Processing
from fusegpt_ray.text.licence import licensed
from fusegpt_ray.text.published import published_windows
from fusegpt_ray.text.windows import Opened, Windows
from fusegpt_ray.workers.base import Workers

Drawn = tuple[Windows, dict[str, Windows], tuple[Windows, Windows] | None]
"""Of the calibration text; of the texts to evaluate on, by name; to heal on, and held-out ones, or
None where nothing is healed."""


def all_windows(
    workers: Workers,
    recipe: Recipe,
    leading: Mapping[str, int | None],
    show: Display,
    shared: Shared,
) -> Drawn:
    """All that a run reads, drawn once for the runs that share it.

    `leading`: see `Plan.leading`.

    Raises:
        UserError: a text cannot be used.
    """
    text, held_out = recipe.calibration, dict[str, Windows]()
    drawing = {"calibration": text.model_dump(mode="json"), "leading": dict(leading)}
    for name, held in recipe.evaluation.items():
        key = f"evaluation.{name}"
        length = held.length_or(text.length)
        more = (f"{key}.data", text.pack, text.images)
        held_out[name] = shared.once(
            key,
            drawing | {"text": held.model_dump(mode="json")},
            partial(evaluation_windows, workers, held, length, leading[key], *more),
        )
        held_out[name] = licensed(held_out[name], [held])
    # After those that are only read: the dense model may have to write some of it.
    draw = partial(calibration_windows, workers, recipe, leading["calibration"], show, shared)
    windows = licensed(shared.once("calibration", drawing, draw), text.parts)
    if not recipe.heal:
        return windows, held_out, None
    healed, kept_out = shared.once(
        "heal",
        drawing | {"heal": recipe.heal.model_dump(mode="json")},
        partial(healing_windows, workers, recipe, leading["calibration"], show, shared, windows),
    )
    return windows, held_out, (licensed(healed, recipe.healing_texts[0].parts), kept_out)


def calibration_windows(
    workers: Workers, recipe: Recipe, leading: int | None, show: Display, shared: Shared
) -> Windows:
    """Of the calibration texts, drawn at random.

    Args:
        leading: the token that each window begins with, if any.
        shared: what is known of the model, for text that it writes itself.

    Raises:
        UserError: a text cannot be used.
    """
    key, text = "calibration", recipe.calibration
    opened = _opened(workers, recipe, text, key, show, shared, text.windows)
    return mixture.calibration_windows(opened, text, leading, key)


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
        album = _album(workers, text, length, key, beside(key, "length"))
        return windows.evaluation_windows(album, text, length, leading, key)
    packed = pack if text.pack is None else text.pack
    stream = workers.tokens(text, key, _reading(packed))
    return windows.evaluation_windows(stream, text, length, leading, key, packed)


def healing_windows(
    workers: Workers,
    recipe: Recipe,
    leading: int | None,
    show: Display,
    shared: Shared,
    calibrated: Windows | None = None,
) -> tuple[Windows, Windows]:
    """To heal on, and held-out ones to choose the best state by: of text that those before, of the
    calibration, have not seen, where there is enough.

    Raises:
        UserError: a text cannot be used, or is too short.
    """
    heal, calibration = recipe.heal, recipe.calibration
    assert heal is not None
    texts, section = recipe.healing_texts
    amounts = (recipe.healing_windows, heal.held_out)
    return fresh_windows(
        _opened(workers, recipe, texts, section, show, shared, *amounts),
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
        tokens=heal.tokens,
        seen=_seen(calibrated, calibration, texts) if calibrated else {},
    )


def _seen(calibrated: Windows, calibration: Texts, texts: Texts) -> dict[int, np.ndarray]:
    """Where windows of the calibration begin, by the number that their text has in `texts`."""
    known, asked = (
        [part.model_dump(exclude={"weight", "licence", "tokens"}) for part in each.parts]
        for each in (calibration, texts)
    )
    return {
        number: calibrated.starts_of(known.index(part))
        for number, part in enumerate(asked)
        if part in known
    }


def _reading(pack: bool) -> Reading:
    return PACKED if pack else APART


def _album(workers: Workers, text: Text, length: int, key: str, length_key: str) -> Album:
    source = workers.setup.source
    placeholder = image_token(source)
    assert placeholder is not None, "`check_images` has looked"
    processing = Processing(source.processor(), placeholder, length, key, length_key)
    return workers.album(text, processing)


def _opened(
    workers: Workers,
    recipe: Recipe,
    texts: Texts,
    key: str,
    show: Display,
    shared: Shared,
    *windows: int,
) -> list[Opened]:
    """Each text; so many windows of them all are drawn, in one or several sets."""
    length, pack = recipe.calibration.length, recipe.calibration.pack
    tokens = mixture.generated_tokens(texts, length, *windows)

    def read(text: WeightedText, name: str) -> Opened:
        if recipe.sees(text):
            return _album(workers, text, length, name, "calibration.length")
        return workers.tokens(text, name, _reading(pack))

    def generated(text: GeneratedText, name: str) -> Stream:
        return generated_stream(workers, recipe, text, tokens[text], name, show, shared)

    return mixture.opened(read, texts, key, generated)
