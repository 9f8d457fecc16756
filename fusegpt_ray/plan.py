"""The plan of a run: everything that is known, and every mistake of the user that can be found,
before weights are read and before anything is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fusegpt_ray.cost import Cost, cost
from fusegpt_ray.errors import UserError, blaming
from fusegpt_ray.generation import check_beginning
from fusegpt_ray.model.source import Source
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.model.structure import Structure
from fusegpt_ray.preflight import (
    Target,
    check_images,
    check_method,
    check_model,
    check_output,
    plan_targets,
    with_start,
)
from fusegpt_ray.publishing.rehearsal import ANY, Removable, rehearse
from fusegpt_ray.recipe import Recipe
from fusegpt_ray.report import Display
from fusegpt_ray.sections import Model
from fusegpt_ray.specs import METHOD_SPECS
from fusegpt_ray.text.calibration import leading_token
from fusegpt_ray.text.mixture import data_keys, shares
from fusegpt_ray.text_sections import GeneratedText
from fusegpt_ray.workers.base import Setup


@dataclass(frozen=True)
class OpenedModel:
    """A dense model whose files have been looked at."""

    source: Source
    stack: Stack
    tokenizer: Any


@dataclass(frozen=True)
class Plan:
    """A run that can begin."""

    recipe: Recipe
    model: OpenedModel
    targets: tuple[Target, ...]
    """The models to publish, the lightest compression first."""
    leading: Mapping[str, int | None]
    """The token that each window begins with, if any, by the recipe key of its text."""
    removable: Removable = ANY
    """The blocks that may go."""

    @property
    def setup(self) -> Setup:
        """For the workers."""
        return Setup.of(self.recipe, self.model.source, self.model.stack)

    @property
    def cost(self) -> Cost:
        """What it will compute and write."""
        return cost(self.recipe, self.model.stack, self.targets)

    @property
    def rounds(self) -> int:
        """How many blocks the smallest of the models loses."""
        return self.targets[-1].remove


def plan(recipe: Recipe, show: Display, restart: bool = False) -> Plan:
    """The plan for a recipe.

    Cheap and local mistakes are looked for first; the files of a hub model are fetched last.

    Args:
        restart: an unfinished run of this name will be forgotten.

    Raises:
        UserError: the recipe cannot be carried out.
    """
    shares(recipe.calibration, recipe.calibration.windows, "calibration", "calibration.windows")
    source, structure = find_model(recipe.model, window_lengths(recipe))
    check_images(source, recipe.keys_of_images)
    targets = plan_targets(recipe, len(structure.blocks))
    recipe = with_start(recipe, structure, show.say)
    check_output(recipe, targets, restart)
    check_method(recipe, structure)
    model = open_model(source, show)
    leading = leading_tokens(recipe, model.tokenizer)
    removable = rehearse(model.stack, structure, [target.remove for target in targets])
    if recipe.search and removable.why:
        raise UserError(
            "search",
            list(recipe.search.candidates),
            f"a tournament needs a model of which any block can go; {removable.in_words()}",
            "leave search out",
        )
    if not METHOD_SPECS[recipe.method].nested and removable != ANY:
        problem = f"a run of blocks needs a model of which any can go; {removable.in_words()}"
        raise UserError("method", recipe.method, problem, "use method: mi")
    return Plan(recipe, model, tuple(targets), leading, removable)


def find_model(model: Model, lengths: Mapping[str, int]) -> tuple[Source, Structure]:
    """Where a model is, and what its config.json describes.

    Args:
        lengths: tokens of the windows that it will see, by recipe key.

    Raises:
        UserError: it cannot be found, or cannot be used with such windows.
    """
    with blaming("model.source", model.source):
        source = Source.find(model.source, model.revision)
        return source, check_model(source, dict(lengths))


def open_model(source: Source, show: Display) -> OpenedModel:
    """The model's tokenizer and its dense stack. Reads headers, no weights; fetches a hub model.

    Raises:
        UserError: a file is missing or damaged, or does not belong to the others.
    """
    with blaming("model.source", source.name):
        tokenizer = source.tokenizer()
        if source.on_hub:
            show.stage("fetching the model's files from the hub, unless they are here")
        return OpenedModel(source, source.stack(), tokenizer)


def window_lengths(recipe: Recipe) -> dict[str, int]:
    """Tokens of each text's windows, by recipe key."""
    lengths = {"calibration.length": recipe.calibration.length}
    for name, text in recipe.evaluation.items():
        if text.length:
            lengths[f"evaluation.{name}.length"] = text.length
    return lengths


def leading_tokens(recipe: Recipe, tokenizer: Any) -> dict[str, int | None]:
    """The token that windows begin with, by the recipe key of their text. A held-out text that says
    nothing has the calibration text's.

    Raises:
        UserError: see `calibration.leading_token`, `check_beginning`.
    """
    for section, texts in (("calibration", recipe.calibration), ("heal", recipe.heal)):
        if texts and texts.data:
            for part, key in zip(texts.parts, data_keys(texts, section), strict=True):
                if isinstance(part, GeneratedText):
                    check_beginning(part, tokenizer, key)
    calibration = leading_token(recipe.calibration.bos, tokenizer, "calibration.bos")
    leading = {"calibration": calibration}
    for name, text in recipe.evaluation.items():
        key = f"evaluation.{name}"
        leading[key] = leading_token(text.bos, tokenizer, f"{key}.bos") if text.bos else calibration
    return leading
