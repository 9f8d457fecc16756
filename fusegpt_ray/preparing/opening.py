"""A dense model is found and looked at, and its files are fetched if it lies on the hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fusegpt_ray.errors import blaming
from fusegpt_ray.model.source import Source
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.model.structure import Structure
from fusegpt_ray.preparing.preflight import check_model
from fusegpt_ray.recipe.sections import Model
from fusegpt_ray.terminal.display import Display

KEY = "model.source"


@dataclass(frozen=True)
class OpenedModel:
    """A dense model whose files have been looked at."""

    source: Source
    stack: Stack
    tokenizer: Any


def find_model(model: Model, lengths: Mapping[str, int]) -> tuple[Source, Structure]:
    """Where a model is, and what its config.json describes.

    Args:
        lengths: tokens of the windows that it will see, by recipe key.

    Raises:
        UserError: it cannot be found, or cannot be used with such windows.
    """
    with blaming(KEY, model.source):
        source = Source.find(model.source, model.revision)
        return source, check_model(source, dict(lengths))


def look_at(source: Source) -> OpenedModel:
    """The model's tokenizer and its dense stack, by the headers of its weights, which are read
    where they are: of a hub model that is not here, the stack can read no weights.

    Raises:
        UserError: a file is missing or damaged, or does not belong to the others.
    """
    with blaming(KEY, source.name):
        tokenizer = source.tokenizer()
        return OpenedModel(source, source.stack(fetches=False), tokenizer)


def fetched(model: OpenedModel, show: Display) -> OpenedModel:
    """The model once its files are here, if it lies on the hub; errors are those of `look_at`."""
    source = model.source
    if not source.on_hub:
        return model
    with blaming(KEY, source.name):
        return replace(model, stack=_fetched(source, show))


def open_model(source: Source, show: Display) -> OpenedModel:
    """The model, to be read from now on; errors are those of `look_at`."""
    with blaming(KEY, source.name):
        tokenizer = source.tokenizer()
        return OpenedModel(source, _fetched(source, show), tokenizer)


def _fetched(source: Source, show: Display) -> Stack:
    if source.on_hub:
        show.stage("fetching the model's files from the hub, unless they are here")
    return source.stack()
