"""Drawing samples with images, as the recipe asks for them; what `drawing.py` does for text alone.

Which conversations are drawn, `text/album.py` tells; the workers make samples of them.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fusegpt_ray.errors import UserError
from fusegpt_ray.preflight import image_token
from fusegpt_ray.recipe import Recipe
from fusegpt_ray.samples import Samples
from fusegpt_ray.sections import Evaluation
from fusegpt_ray.text.formats import beside
from fusegpt_ray.text.images import Processing
from fusegpt_ray.text.mixture import seed_of
from fusegpt_ray.text.windows import Drawn, Windows
from fusegpt_ray.text_sections import Text
from fusegpt_ray.workers.base import Workers


def calibration_samples(workers: Workers, recipe: Recipe) -> Windows:
    """Of the calibration text, drawn at random.

    Raises:
        UserError: it cannot be used, or has too few.
    """
    text = recipe.calibration
    found = _samples(workers, text, text.length, text.windows, "calibration.data", text.seed)
    if len(found.tokens_WT) < text.windows:
        fix = "ask for fewer windows, give more conversations, or raise the length"
        raise UserError("calibration.windows", text.windows, _only(found), fix)
    return found


def evaluation_samples(workers: Workers, text: Evaluation, length: int, key: str) -> Windows:
    """Of a held-out text, the first ones.

    Raises:
        UserError: it cannot be used.
    """
    return _samples(workers, text, length, text.windows, key, None, beside(key, "length"))


def healing_samples(workers: Workers, recipe: Recipe) -> tuple[Windows, Windows]:
    """To heal on, and held-out ones, none of which is among the former.

    Raises:
        UserError: the text cannot be used, or has too few.
    """
    heal, calibration = recipe.heal, recipe.calibration
    assert heal is not None
    text, section = recipe.healing_texts
    key = f"{section}.data"
    kept, wanted = heal.held_out, recipe.healing_windows
    seed = seed_of(calibration.seed, "healing")
    found = _samples(workers, text, calibration.length, kept + wanted, key, seed)
    there = len(found.tokens_WT) - kept
    if heal.tokens is None and not heal.repeat:
        wanted = min(wanted, there // heal.batch * heal.batch)
    if there < max(1, wanted if not heal.repeat else 1) or not wanted:
        fix = "lower heal.tokens or heal.held_out, give more, or set heal.repeat: true"
        raise UserError("heal.tokens", heal.tokens, _only(found), fix)
    numbers = kept + np.arange(wanted) % there
    drawn = replace(found.texts[0], distinct=there)
    return (
        Windows.of(found.tokens_WT[numbers], found.bos, drawn),
        found.first(kept),
    )


def _samples(
    workers: Workers,
    text: Text,
    length: int,
    limit: int | None,
    key: str,
    seed: int | None = None,
    length_key: str = "calibration.length",
) -> Windows:
    """At most `limit` samples; in an order of chance, if there is a `seed`."""
    source = workers.setup.source
    placeholder = image_token(source)
    assert placeholder is not None, "`check_images` has looked"
    processor = source.processor()
    album = workers.album(text, Processing(processor, placeholder, length, key, length_key))
    samples, left_out = album.drawn(limit, seed)
    drawn = Drawn(text.label, conversations=album.there, left_out=left_out)
    return Windows.of(samples, _begin(samples, processor.tokenizer.bos_token_id), drawn)


def _begin(samples: Samples, bos: int | None) -> bool:
    """Whether each sample begins with the beginning-of-sequence token."""
    return bool((samples.tokens_WT[:, 0] == bos).all())


def _only(found: Windows) -> str:
    drawn = found.texts[0]
    return (
        f"the text has {len(found.tokens_WT)} conversations that fit, and {drawn.left_out} that "
        "are longer than a window"
    )
