"""The prompts that the dense and the published model continue, some about images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fusegpt_ray.errors import UserError, first_line
from fusegpt_ray.model.config import read_config
from fusegpt_ray.model.source import Source
from fusegpt_ray.preparing.preflight import image_token
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.recipe.specs import SAMPLE_PROMPTS
from fusegpt_ray.recipe.text_sections import Text
from fusegpt_ray.text.images import Processing, check_pillow
from fusegpt_ray.text.mixture import data_keys
from fusegpt_ray.text.questions import Question, asked_about, found_in

TOKENS = 32
"""The most that are written after a prompt."""
SHOWN = 2
"""Images that are asked about where the recipe does not say what to ask."""
KEY = "output.samples"
Prompt = str | Question
"""What both models continue."""


def asked(recipe: Recipe, source: Source, say: Callable[[str], object]) -> list[Prompt]:
    """The prompts of a recipe. Where it leaves them out, also the first questions about images of
    its held-out texts, or else of its calibration texts; where these cannot be used, a line says
    so.

    Raises:
        UserError: see `named`.
    """
    prompts = named(recipe, source)
    if recipe.output.samples == SAMPLE_PROMPTS:
        try:
            prompts += _found(recipe, source)
        except UserError as error:
            say(f"no samples about images: they cannot be asked about ({first_line(error)})")
    return prompts


def named(recipe: Recipe, source: Source) -> list[Prompt]:
    """Those that the recipe gives.

    Raises:
        UserError: an image cannot be read, is too large, or the model takes none.
    """
    prompts: list[Prompt] = []
    for number, sample in enumerate(recipe.output.samples):
        if isinstance(sample, str):
            prompts.append(sample)
            continue
        key = f"{KEY}.{number}.image"
        check_pillow(key)
        if image_token(source) is None:
            problem = f"{source.name} is a model of text alone"
            raise UserError(key, sample.image, problem, "use a model that sees, or ask no image")
        prompts.append(asked_about(sample, _processing(source, key)))
    return prompts


def _found(recipe: Recipe, source: Source) -> list[Question]:
    for text, key in _texts_with_images(recipe):
        if found := found_in(text, _processing(source, key), SHOWN):
            return found
    return []


def _texts_with_images(recipe: Recipe) -> Iterator[tuple[Text, str]]:
    """With their recipe keys."""
    for name, text in recipe.evaluation.items():
        if recipe.sees(text):
            yield text, f"evaluation.{name}.data"
    parts = recipe.calibration.parts
    for part, key in zip(parts, data_keys(recipe.calibration, "calibration"), strict=True):
        if isinstance(part, Text) and recipe.sees(part):
            yield part, key


def _processing(source: Source, key: str) -> Processing:
    placeholder, length = image_token(source), positions(source.config()) - TOKENS
    assert placeholder is not None, "it is known that the model sees"
    return Processing(source.processor(), placeholder, length, key, key)


def positions(config: Mapping[str, Any]) -> int:
    """The most tokens that a model takes, by its config.json."""
    told = getattr(read_config(config).get_text_config(), "max_position_embeddings", None)
    return told if isinstance(told, int) and told > 1 else 2**20
