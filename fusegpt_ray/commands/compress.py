"""Make models: `compress`."""

from __future__ import annotations

import json

import click

from fusegpt_ray.commands.options import display, json_option, quiet_option, recipe_options


@click.command()
@recipe_options
@click.option("--restart", is_flag=True, help="Forget an unfinished run of this name, begin anew.")
@json_option
@quiet_option
def compress(
    recipe: str, settings: tuple[str, ...], restart: bool, as_json: bool, quiet: bool
) -> None:
    """Compress the model of a recipe and publish the result.

    Run again after a failure, it goes on from what is saved.
    """
    from fusegpt_ray.recipe.recipe import Recipe

    checked = Recipe.load(recipe, settings)
    from fusegpt_ray import pipeline  # torch: after the recipe has been checked

    published = pipeline.compress(checked, display(quiet), restart=restart)
    if as_json:
        models = [
            {"uri": item.uri, "perplexity": item.manifest["perplexity"]} for item in published
        ]
        click.echo(json.dumps({"models": models}))
