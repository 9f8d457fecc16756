"""What several verbs ask for."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

from fusegpt_ray.errors import UserError

if TYPE_CHECKING:
    from fusegpt_ray.terminal.display import Display

Verb = TypeVar("Verb", bound=Callable[..., Any])

PUBLISHED = "Folder of a published model, anywhere fsspec reaches."

recipe_argument = click.argument(
    "recipe", metavar="RECIPE", help="YAML file; see examples/quickstart.yaml."
)
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
quiet_option = click.option(
    "--quiet", is_flag=True, help="Say nothing on the way: only errors, warnings and the result."
)
models_argument = click.argument(
    "models",
    metavar="MODEL…",
    nargs=-1,
    required=True,
    help="Folders, hub ids or URIs of checkpoints; others are compared with the first.",
)
dtype_option = click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    help="Arithmetic; auto: as each model is stored.",
)
set_option = click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a field, such as sparsity=0.3; may be given several times.",
)


def recipe_options(verb: Verb) -> Verb:
    """For a verb that takes a recipe."""
    return recipe_argument(set_option(verb))


@contextmanager
def as_arguments() -> Iterator[None]:
    """For a verb without a recipe: what goes wrong is told by the names of its arguments.

    Raises:
        UserError: the block raised one; keys of recipes in it have become arguments.
    """
    try:
        yield
    except UserError as error:
        key, fix = _as_argument(error.key), _as_argument(error.fix)
        raise UserError(key, error.value, error.problem, fix) from error


def _as_argument(text: str) -> str:
    text = text.replace("model.source", "MODEL").replace("evaluation.data.pack", "--apart")
    text = text.replace("evaluation.data.image_folder", "--image-folder")
    options = "data|length|windows|config|split|column|images|bos|revision|dtype|engine|replicas"
    return re.sub(rf"\b(?:evaluation\.data|cluster|model)\.({options})\b", r"--\1", text)


def say_outcome(outcome: str, *lines: object) -> None:
    """On stderr; on a terminal the first word is red, unless NO_COLOR is set."""
    colour = False if os.environ.get("NO_COLOR") else None
    first = f"{click.style(outcome, fg='red', bold=True)} {lines[0]}"
    click.echo("\n".join([first, *map(str, lines[1:])]), err=True, color=colour)


def display(quiet: bool) -> Display | None:
    """What a verb shows on the way; None: as usual."""
    if not quiet:
        from fusegpt_ray.terminal.log_lines import LogLines, asked

        return LogLines() if asked() else None
    return silent()


def silent() -> Display:
    """One that shows nothing but warnings, each once."""
    from fusegpt_ray.terminal.display import WarningsAlone

    return WarningsAlone()
