"""Look ahead: `init`, `validate` and `plan`. None reads weights."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fusegpt_ray.commands.options import (
    json_option,
    quiet_option,
    recipe_options,
    say_outcome,
    silent,
)
from fusegpt_ray.errors import UserError

if TYPE_CHECKING:
    from fusegpt_ray.planning.fitting import There
    from fusegpt_ray.recipe.cluster_section import Cluster
    from fusegpt_ray.terminal.table import Table


@click.command()
@click.argument("model", metavar="MODEL", help="Folder, hub id or URI of a checkpoint.")
@click.option("--data", metavar="TEXT", help="Text to calibrate on (default: WikiText-2).")
@click.option("--output", default="recipe.yaml", show_default=True, help="The file to write.")
@json_option
@quiet_option
def init(model: str, data: str | None, output: str, as_json: bool, quiet: bool) -> None:
    """Write a commented recipe for a model and this machine."""
    if Path(output).exists():
        raise UserError("--output", output, "there is such a file already", "give another name")
    import torch

    from fusegpt_ray.planning.first_recipe import first_recipe
    from fusegpt_ray.planning.outlook import Device

    text = first_recipe(model, Device.here(), torch.cuda.device_count(), data)
    with open(output, "x") as file:
        file.write(text)
    told = output if quiet else f"{output}: look it through, then: fusegpt plan {output}"
    click.echo(json.dumps({"recipe": output}) if as_json else told)


@click.command()
@recipe_options
@json_option
@quiet_option
@click.pass_context
def validate(
    context: click.Context, recipe: str, settings: tuple[str, ...], as_json: bool, quiet: bool
) -> None:
    """List all mistakes of a recipe at once.

    Keys and values first; if they are right, the model, the files of text and the output, too; of a
    family or a comparison, those of all its runs. Datasets of the hub are not looked up, and are
    named instead. Reads no weights and writes nothing. The exit code is 2 if there is a mistake.
    """
    found, unknown = _mistakes(recipe, settings)
    if as_json:
        rows = [
            {"key": e.key, "value": repr(e.value), "problem": e.problem, "fix": e.fix}
            for e in found
        ]
        told = {"good": not found, "mistakes": rows, "not_looked_up": unknown}
        click.echo(json.dumps(told))
    else:
        for error in found:
            say_outcome("error:", error)
        if not found and not quiet:
            click.echo(f"good: {recipe}")
            for text in unknown:
                click.echo(f"not looked up: {text}")
    if found:
        context.exit(2)


def _mistakes(path: str, settings: tuple[str, ...]) -> tuple[list[UserError], list[str]]:
    """And what was not looked up."""
    from fusegpt_ray.commands import planning_many
    from fusegpt_ray.recipe.recipe import Recipe
    from fusegpt_ray.recipe.yaml_text import read_recipe

    data = read_recipe(path, settings)
    if planning_many.asked_by(data):
        return planning_many.mistakes(data, silent())
    if found := Recipe.mistakes(data):
        return found, []
    from fusegpt_ray.planning import plan  # torch: after the recipe has been checked

    asked = Recipe.parse(data)
    return plan.mistakes(asked, silent()), plan.not_looked_up(asked)


@click.command()
@recipe_options
@click.option("--gpu", metavar="NAME", help="Type of GPU, such as H100 (default: what is here).")
@click.option(
    "--gpus",
    type=click.IntRange(min=1),
    help="How many there are (default: one for each replica and worker; for many runs, of the "
    "largest).",
)
@click.option(
    "--probe", is_flag=True, help="Measure for 20 seconds how fast this machine is, and use that."
)
@json_option
@quiet_option
def plan(
    recipe: str,
    settings: tuple[str, ...],
    gpu: str | None,
    gpus: int | None,
    probe: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Tell what a run will cost, and whether it fits.

    From the headers of the model's files alone: reads no weights and writes nothing. Times are
    those of computing alone, by rates that were measured on an H200, or here with --probe. Of a
    family or a comparison: each run, what they share, and when it works.
    """
    if gpu and probe:
        problem = "--probe measures the machine that is here"
        raise UserError("--gpu", gpu, problem, "leave out one of the two")
    from fusegpt_ray.commands import planning_many
    from fusegpt_ray.cost.rates import find_gpu
    from fusegpt_ray.recipe.yaml_text import read_recipe

    data = read_recipe(recipe, settings)
    known = find_gpu(gpu) if gpu else None
    if probe and not quiet:
        click.echo("measuring this machine, which takes about 20 seconds", err=True)
    many = planning_many.asked_by(data)
    result = (planning_many.planned if many else _planned)(data, known, gpus, probe)
    if as_json:
        click.echo(json.dumps(result))
    else:
        (planning_many.show if many else _show)(result)


def _planned(
    data: Mapping[str, Any], gpu: str | None, gpus: int | None, probe: bool
) -> dict[str, Any]:
    from fusegpt_ray.recipe.recipe import Recipe

    checked = Recipe.parse(data)
    from fusegpt_ray.planning import outlook
    from fusegpt_ray.planning import plan as plans
    from fusegpt_ray.scheduling import forecast
    from fusegpt_ray.workers.room import Allocation

    planned = plans.plan(checked, silent(), looks=True)
    there, kind = _there(planned.recipe.cluster, gpu, gpus)
    device = outlook.Device.named(kind) if kind else outlook.Device.here()
    held = Allocation.alone(planned.recipe.cluster, planned.recipe.trains)
    # Processes on a CPU share its cores.
    count = gpus or (held.gpus or 1 if device.kind == "cuda" else 1)
    measured = None
    if probe:
        from fusegpt_ray.planning.probe import probe as measure

        measured = measure(planned)
    told = outlook.outlook(planned, device, count, measured, there)
    beside = forecast.beside_computing(planned.recipe, planned.cost, planned.rounds)
    seconds = None if told["seconds"] is None else told["seconds"] + sum(beside.values())
    return {**told, "beside_computing": beside, "whole_seconds": seconds}


def _there(cluster: Cluster, gpu: str | None, gpus: int | None) -> tuple[There, str | None]:
    """What is known of where the run will work, and its type of GPU, where that is not this
    machine's: what was said, this machine, or a Ray cluster, which is asked unless something was
    said.
    """
    from fusegpt_ray.cost.rates import find_gpu
    from fusegpt_ray.planning.fitting import There

    address = cluster.address or os.environ.get("RAY_ADDRESS")
    if gpu or (gpus and address and cluster.engine == "ray"):
        return There(gpus), gpu
    if not address or cluster.engine == "local":
        return replace(There.here(), **({"gpus": gpus} if gpus else {})), None
    from fusegpt_ray.distributed.connection import asked

    there, kind = There(), None
    with suppress(UserError):  # it need not be reached from here, and its GPUs need not be known
        found = asked(cluster)
        there = There(found.get("GPU", 0.0), found.get("CPU", 0.0))
        types = [key.partition(":")[2] for key in found if key.startswith("accelerator_type:")]
        if len(types) == 1:
            kind = find_gpu(types[0])
    return there, kind


def _show(result: dict[str, Any]) -> None:
    from rich.console import Console

    from fusegpt_ray.commands.planning_many import uncounted
    from fusegpt_ray.planning.outlook import over_budget
    from fusegpt_ray.terminal.display import byte_count, duration, flop_count
    from fusegpt_ray.terminal.table import Table

    console = Console(highlight=False)

    def say(text: str) -> None:
        console.print(text, markup=False)

    say(f"{result['model']}: {result['blocks']} blocks, {result['parameters']:,} parameters,")
    say(f"{byte_count(result['source_bytes'])}; method {result['method']}")
    for target in result["targets"]:
        become = f"{target['blocks']} blocks, {byte_count(target['bytes'])}"
        change = f"{target['removes']} blocks go, {become} stay"
        if added := target["adds"]:
            change = f"{added} blocks are added, which makes {become}"
        if width := target["width"]:
            change = f"the hidden size becomes {width}, {become} stay"
        say(f"  {target['name']}: {change}")
    say("order of the work:")
    for step in result["order"]:
        say(f"  {step}")
    timed, priced = (result[key] is not None for key in ("seconds", "price"))
    more = ["time"] * timed + ["price"] * priced
    work = Table("stage", "block-forwards", "FLOP", "share", *more)
    for column in work.columns[1:]:
        column.justify = "right"
    for row in result["stages"]:
        share = f"{row['flops'] / result['flops']:.0%}"
        more = [duration(row["seconds"])] if timed else []
        more += [f"{row['price']:,.2f}"] if priced else []
        work.add_row(
            row["stage"], f"{row['block_forwards']:,}", flop_count(row["flops"]), share, *more
        )
    console.print(work)
    total = f"at most {flop_count(result['flops'])}"
    if timed:
        probed = " (measured now)" if result["probed"] else ""
        many = result["device"]
        if not many.endswith("CPU"):
            many = f"{result['gpus']:g} × {many}"
        price = f", for {result['price']:,.2f}" if priced else ""
        say(f"{total}, {duration(result['seconds'])} of computing on {many}{probed}{price}")
        for line in _whole(result):
            say(line)
    else:
        say(f"{total}; how fast {result['device']} is, is not known:")
        say("--probe measures it, --gpu H100 tells of another")
    for table in _of_memory_and_bytes(result):
        console.print(table)
    for line in (*uncounted([result]), *_lacking(result)):
        say(line)
    advice = (row["advice"] for row in (*result["memory"], *result["storage"]))
    for line in (result["unpriced"], *over_budget(result["budget"]), *advice):
        if line:
            say(line)


def _whole(result: Mapping[str, Any]) -> Iterator[str]:
    from fusegpt_ray.commands.planning_many import assumed
    from fusegpt_ray.terminal.display import duration

    yield f"with starting, rounds and publishing {duration(result['whole_seconds'])};"
    yield from assumed()


def _lacking(result: Mapping[str, Any]) -> Iterator[str]:
    """Without what the run does not begin."""
    for row in result["processes"]:
        there = "not known" if row["there"] is None else f"{row['there']:g}"
        yield f"{row['what']}: {row['needs']:g} needed, there: {there}"
        if row["advice"]:
            yield "  too few, so that the run would not begin;"
            yield f"  {row['advice']}"


def _of_memory_and_bytes(result: Mapping[str, Any]) -> Iterator[Table]:
    from fusegpt_ray.terminal.display import byte_count
    from fusegpt_ray.terminal.table import Table

    yield _rooms("memory", result["memory"])
    traffic = Table("weights, at most", "read", "written")
    for column in traffic.columns[1:]:
        column.justify = "right"
    for row in result["traffic"]:
        moved = (byte_count(row[key]) if row[key] else "–" for key in ("read", "written"))
        traffic.add_row(row["stage"], *moved)
    yield traffic
    yield _rooms("storage, at most", result["storage"])


def _rooms(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Bytes beside the room for them, where that is known."""
    from fusegpt_ray.terminal.display import byte_count
    from fusegpt_ray.terminal.table import Table

    known = any(row["room"] is not None for row in rows)
    table = Table(title, "needs", *(("of", "") if known else ()))
    for row in rows:
        room = "–" if row["room"] is None else byte_count(row["room"])
        fits = {None: "", True: "fits", False: "does not fit"}[row["fits"]]
        table.add_row(row["what"], byte_count(row["bytes"]), *((room, fits) if known else ()))
    return table
