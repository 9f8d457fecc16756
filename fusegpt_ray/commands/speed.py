"""How fast models are, side by side: `speed`."""

from __future__ import annotations

import json

import click

from fusegpt_ray.commands.options import (
    display,
    dtype_option,
    json_option,
    models_argument,
    quiet_option,
)


@click.command()
@models_argument
@click.option(
    "--prompt", type=click.IntRange(1), default=512, show_default=True, help="Tokens of a prompt."
)
@click.option(
    "--new", type=click.IntRange(2), default=64, show_default=True, help="Tokens written after it."
)
@click.option(
    "--batch", type=click.IntRange(1), default=1, show_default=True, help="Prompts at once."
)
@click.option(
    "--runs", type=click.IntRange(1), default=5, show_default=True, help="Of each model, in turns."
)
@click.option(
    "--with",
    "kind",
    type=click.Choice(["transformers", "vllm"]),
    default="transformers",
    show_default=True,
    help="What runs the models.",
)
@dtype_option
@json_option
@quiet_option
def speed(
    models: tuple[str, ...],
    prompt: int,
    new: int,
    batch: int,
    runs: int,
    kind: str,
    dtype: str,
    as_json: bool,
    quiet: bool,
) -> None:
    """Time prefill and decoding of models, side by side.

    Give the dense model first. All models are loaded at once and take turns, so that a machine's
    drift hits all of them alike.
    """
    from fusegpt_ray.measuring import speed as work
    from fusegpt_ray.measuring.tables import of_speed

    trial = work.Trial(prompt, new, batch, runs, dtype, kind)
    result = work.speed(models, trial, display(quiet))
    if as_json:
        click.echo(json.dumps(result))
        return
    from rich.console import Console

    console = Console()
    for item in of_speed(result):
        console.print(item, markup=False)
