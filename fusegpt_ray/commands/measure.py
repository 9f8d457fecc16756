"""Look into models: `score` and `evaluate`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from fusegpt_ray.commands.options import (
    as_arguments,
    display,
    json_option,
    quiet_option,
    recipe_options,
)

if TYPE_CHECKING:
    from fusegpt_ray.recipe.sections import Evaluation


@click.command()
@recipe_options
@json_option
@quiet_option
def score(recipe: str, settings: tuple[str, ...], as_json: bool, quiet: bool) -> None:
    """Show how much each block of the dense model matters."""
    from fusegpt_ray.recipe.recipe import Recipe

    checked = Recipe.load(recipe, settings)
    from fusegpt_ray import pipeline  # torch: after the recipe has been checked

    result = pipeline.score(checked, display(quiet))
    if as_json:
        click.echo(json.dumps(result))
        return
    from rich.console import Console

    from fusegpt_ray.reporting.measured import score_table
    from fusegpt_ray.text.protocol import described

    Console().print(score_table(result))
    click.echo(described(result))


@click.command()
@click.argument(
    "models",
    metavar="MODEL…",
    nargs=-1,
    required=True,
    help="Folders, hub ids or URIs of checkpoints. All but the first are compared with it.",
)
@click.option(
    "--data",
    required=True,
    multiple=True,
    help="File of text or a table of it (path or URI), or a `datasets` id; or wikitext2 or c4, read"
    " as papers do (wikitext2=FILE: from a copy). May be given several times.",
)
@click.option("--length", type=int, help="Tokens a window (wikitext2, c4: 2048 if left out).")
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
    "--image-folder",
    metavar="DIR",
    help="Where relative paths of images begin (default: the file).",
)
@click.option(
    "--bos",
    type=click.Choice(["auto", "always", "never"]),
    help="Whether each window begins with a beginning-of-sequence token; auto, the default: as the"
    " tokenizer does (wikitext2, c4: once, before the whole text, if left out).",
)
@click.option("--revision", help="Of a single hub model: branch, tag or commit.")
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
@click.option("--report", metavar="FILE", help="Write a page of HTML, too.")
@json_option
@quiet_option
def evaluate(
    models: tuple[str, ...],
    data: tuple[str, ...],
    revision: str | None,
    dtype: str,
    engine: str,
    replicas: int,
    report: str | None,
    as_json: bool,
    quiet: bool,
    **text: Any,
) -> None:
    """Measure the perplexity of models over consecutive windows of texts.

    Of several models it is also said whether they differ from the first by more than noise.
    """
    from fusegpt_ray.recipe.cluster_section import Cluster
    from fusegpt_ray.recipe.recipe import Recipe
    from fusegpt_ray.reporting.place import free, write

    with as_arguments():
        texts = _texts(data, **text)
        cluster = Recipe.check(Cluster, {"engine": engine, "replicas": replicas}, "cluster")
        if report:
            free(report, "--report")  # rather than after all has been measured
        from fusegpt_ray import pipeline

        result = pipeline.evaluate(
            models, texts, revision=revision, dtype=dtype, cluster=cluster, display=display(quiet)
        )
    if report:
        from fusegpt_ray.publishing.publish import versions
        from fusegpt_ray.reporting import evaluation

        write(evaluation.html(result["results"], versions()), report, "--report")
    if as_json:
        click.echo(json.dumps(result))
        return
    if "perplexity" in result:
        click.echo(f"perplexity {result['perplexity']:.4f}  ({result['protocol']})")
        return
    from rich.console import Console

    from fusegpt_ray.reporting.measured import perplexity_notes, perplexity_tables

    for table in perplexity_tables(result["results"]):
        Console().print(table)
    for note in perplexity_notes(result["results"]):
        click.echo(note)


def _texts(data: tuple[str, ...], apart: bool, **given: Any) -> list[Evaluation]:
    """Each with what was given of texts. What says how rows are read is of those that are no
    published ones, if there are others.
    """
    from fusegpt_ray.recipe.recipe import Recipe
    from fusegpt_ray.recipe.sections import Evaluation

    said = {key: value for key, value in given.items() if value is not None and value is not False}
    of_any = {key: said[key] for key in ("length", "windows", "bos") if key in said}
    texts = [Recipe.check(Evaluation, of_any | {"data": uri}, "evaluation.data") for uri in data]
    if apart:
        said["pack"] = False
    others = [text for text in texts if not text.published] or texts
    return [
        Recipe.check(Evaluation, said | {"data": text.data}, "evaluation.data")
        if text in others
        else text
        for text in texts
    ]
