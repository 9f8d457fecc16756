"""Look into models: `score` and `evaluate`."""

from __future__ import annotations

import json
import re
from typing import Any

import click

from fusegpt_ray.commands.options import display, json_option, quiet_option, recipe_options
from fusegpt_ray.errors import UserError


@click.command()
@recipe_options
@json_option
@quiet_option
def score(recipe: str, settings: tuple[str, ...], as_json: bool, quiet: bool) -> None:
    """Show how much each block of the dense model matters."""
    from fusegpt_ray.recipe import Recipe

    checked = Recipe.load(recipe, settings)
    from fusegpt_ray import pipeline  # torch: after the recipe has been checked

    result = pipeline.score(checked, display(quiet))
    if as_json:
        click.echo(json.dumps(result))
        return
    from rich.console import Console

    from fusegpt_ray.report import score_table
    from fusegpt_ray.text.protocol import described

    Console().print(score_table(result))
    click.echo(described(result))


@click.command()
@click.argument("model", metavar="MODEL", help="Folder, hub id or URI of a checkpoint.")
@click.option(
    "--data", required=True, help="File of text or a table of it (path or URI), or a `datasets` id."
)
@click.option("--length", type=int, required=True, help="Tokens a window.")
@click.option("--windows", type=int, help="Only the first so many windows.")
@click.option("--config", help="`datasets` only: the configuration.")
@click.option("--split", help="`datasets` only: the split (default: test).")
@click.option("--column", help="The column that holds the text (default: text).")
@click.option(
    "--apart", is_flag=True, help="Each row, or file of plain text, is a window of its own."
)
@click.option(
    "--images",
    is_flag=True,
    help="Rows are conversations with images; the perplexity is that of the answers.",
)
@click.option(
    "--bos",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    help="Whether each window begins with a beginning-of-sequence token; auto: as the tokenizer"
    " does.",
)
@click.option("--revision", help="Hub models only: branch, tag or commit.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    help="Arithmetic.",
)
@click.option(
    "--engine",
    type=click.Choice(["ray", "local"]),
    default="local",
    help="Default: one process, no Ray.",
)
@click.option("--replicas", type=int, default=1, help="Ray only: replicas that share the windows.")
@json_option
@quiet_option
def evaluate(
    model: str,
    revision: str | None,
    dtype: str,
    engine: str,
    replicas: int,
    apart: bool,
    as_json: bool,
    quiet: bool,
    **text: Any,
) -> None:
    """Measure the perplexity of a model over consecutive windows of a text."""
    from fusegpt_ray.recipe import Recipe
    from fusegpt_ray.sections import Cluster, Evaluation

    text = {key: value for key, value in text.items() if value is not None}
    text["pack"] = not apart
    try:
        data = Recipe.check(Evaluation, text, "evaluation.data")
        cluster = Recipe.check(Cluster, {"engine": engine, "replicas": replicas}, "cluster")
        from fusegpt_ray import pipeline

        result = pipeline.evaluate(
            model, data, revision=revision, dtype=dtype, cluster=cluster, display=display(quiet)
        )
    except UserError as error:
        raise UserError(
            _as_argument(error.key), error.value, error.problem, _as_argument(error.fix)
        ) from error
    if as_json:
        click.echo(json.dumps(result))
        return
    from fusegpt_ray.text.protocol import described

    click.echo(f"perplexity {result['perplexity']:.4f}  ({described(result)})")


def _as_argument(text: str) -> str:
    """Recipe keys in a message → what the arguments are called."""
    text = text.replace("model.source", "MODEL")
    options = "data|length|windows|config|split|column|bos|revision|dtype|replicas"
    return re.sub(rf"\b(?:evaluation\.data|cluster|model)\.({options})\b", r"--\1", text)
