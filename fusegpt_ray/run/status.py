"""What is below an output URI, for a person and for a program: finished models, runs at work, runs
that stopped. Light: no torch.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from fusegpt_ray.errors import UserError
from fusegpt_ray.run.budget import SPENT
from fusegpt_ray.run.outputs import Folder, Outputs, Run
from fusegpt_ray.store.manifest import KEY, MANIFEST, Manifest
from fusegpt_ray.terminal.display import duration, perplexity_table
from fusegpt_ray.terminal.table import Table
from fusegpt_ray.text.protocol import STAGES, described


def status(uri: str) -> dict[str, Any]:
    """{"uri", "models": […], "runs": […], "unfinished": [names of folders without manifest]} of an
    output URI, a run or a model.

    Raises:
        UserError: there is nothing, or it cannot be reached.
    """
    there = Outputs.look(uri)
    folders = there.folders
    if MANIFEST in there.files or there.uri.endswith(".run"):
        folders = (Folder.look(there.uri),)
        if not (folders[0].finished or folders[0].run):
            raise UserError(
                KEY, there.uri, "not the folder of a run", "give an output.uri, or a folder in it"
            )
    return {
        "uri": there.uri,
        "models": [_model(folder) for folder in folders if folder.finished],
        "runs": [_run(run) for folder in folders if (run := folder.run)],
        "unfinished": [folder.name for folder in folders if folder.half],
    }


def _model(folder: Folder) -> dict[str, Any]:
    about: dict[str, Any] = {"name": folder.name, "uri": folder.uri}
    try:
        manifest = Manifest.read(folder.uri)
    except UserError as error:
        return about | {"problem": error.problem}
    keys = ("dense_blocks", "sparsity", "method", "perplexity", "width")
    facts = {key: manifest.data.get(key) for key in keys}
    if not _is_sound(facts):
        return about | {"problem": f"{MANIFEST} says nonsense of its sparsity, depth or perplexity"}
    return about | {"blocks": len(manifest.data["kept"]), "bytes": manifest.size, **facts}


def _is_sound(facts: Mapping[str, Any]) -> bool:
    """Whether what a manifest tells, and what nobody else relies on, can be shown."""
    numbers = [facts["sparsity"], facts["dense_blocks"]]
    table = facts["perplexity"] or {}
    if not isinstance(table, dict) or not all(isinstance(row, dict) for row in table.values()):
        return False
    if (width := facts["width"]) is not None:
        if not isinstance(width, dict) or not {"dense", "kept"} <= width.keys():
            return False
        numbers += [width["dense"], width["kept"]]
    shown = (*STAGES, "windows", "length")
    numbers += [row[key] for row in table.values() for key in shown if key in row]
    return all(number is None or type(number) in (int, float) for number in numbers)


def _run(run: Run) -> dict[str, Any]:
    """`seconds_left` counts rounds only, each as long as those before it."""
    heartbeat, rounds = run.heartbeat, run.rounds
    seconds = [sum(record["seconds"].values()) for record in rounds]
    total = heartbeat.get("rounds")
    return {
        "name": run.name,
        "uri": run.folder.uri,
        "state": run.state(),
        "doing": heartbeat.get("doing"),
        "ended": heartbeat.get("ended"),
        "heartbeat_age": round(time.time() - heartbeat["time"], 1) if heartbeat else None,
        "host": heartbeat.get("host"),
        "pid": heartbeat.get("pid"),
        "spent": heartbeat.get(SPENT),
        "rounds": total,
        "rounds_done": len(rounds),
        "epochs_saved": run.epochs_saved,
        "removed": [record["removed"] for record in rounds if record["removed"] is not None],
        "last_loss": rounds[-1]["loss_last"] if rounds else None,
        "round_seconds": round(seconds[-1], 1) if rounds else None,
        "seconds_left": round((total - len(rounds)) * sum(seconds) / len(seconds), 1)
        if rounds and total and len(rounds) < total
        else None,
    }


def show(result: Mapping[str, Any], console: Console) -> None:
    """The same as tables."""
    protocols: dict[str, None] = {}  # of several models mostly the same
    if result["models"]:
        console.print(_models(result["models"]))
        sound = [model for model in result["models"] if "problem" not in model]
        measured = perplexity_table([(one["name"], one["perplexity"] or {}) for one in sound])
        if measured.row_count:
            console.print(measured)
    for model in result["models"]:
        if "problem" in model:
            console.print(f"{model['name']}: {model['problem']}", markup=False, soft_wrap=True)
            continue
        for data, row in (model["perplexity"] or {}).items():
            if "length" in row:
                protocols[f"{data}: {described(row)}"] = None
    for protocol in protocols:
        console.print(protocol, markup=False, soft_wrap=True)
    if result["runs"]:
        console.print(_runs(result["runs"]))
    for name in result["unfinished"]:
        console.print(
            f"{name}: without a manifest, so not a finished model (yet)",
            markup=False,
            soft_wrap=True,
        )
    if not (result["models"] or result["runs"] or result["unfinished"]):
        console.print(f"no models and no runs in {result['uri']}", markup=False, soft_wrap=True)


def _models(models: list[dict[str, Any]]) -> Table:
    table = Table("model", "blocks", "sparsity")
    for model in models:
        if "problem" in model:
            continue
        sparsity = f"{model['sparsity']:.1%}" if model["sparsity"] else "–"
        size = _depth(model)
        if width := model["width"]:
            size += f", width {width['kept']} of {width['dense']}"
        table.add_row(Text(model["name"]), size, sparsity)
    return table


def _depth(model: Mapping[str, Any]) -> str:
    blocks, dense = model["blocks"], model["dense_blocks"]
    return (
        f"{blocks}, {dense} before" if dense and blocks > dense else f"{blocks} of {dense or '?'}"
    )


def _runs(runs: list[dict[str, Any]]) -> Table:
    table = Table(
        "run", "state", "doing", "rounds", "removed", "last loss", "a round", "rounds left"
    )
    for run in runs:
        ended = f", then {run['ended']}" if run["ended"] else ""
        saved = f", epochs saved: {run['epochs_saved']}" if run["epochs_saved"] else ""
        heard = (
            f", heard of {duration(run['heartbeat_age'])} ago"
            if run["heartbeat_age"] is not None
            else ""
        )
        table.add_row(
            Text(run["name"]),
            run["state"] + heard,
            Text(f"{run['doing'] or '–'}{ended}"),
            f"{run['rounds_done']} of {run['rounds'] or '?'}{saved}",
            ", ".join(map(str, run["removed"])) or "–",
            f"{run['last_loss']:.4g}" if run["last_loss"] is not None else "–",
            duration(run["round_seconds"]) if run["round_seconds"] is not None else "–",
            f"about {duration(run['seconds_left'])}" if run["seconds_left"] is not None else "–",
        )
    return table
