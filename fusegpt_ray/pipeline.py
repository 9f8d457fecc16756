"""The loop: score → choose → fuse → commit → … → publish. The same for one process and for a
cluster.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np

from fusegpt_ray import evaluation
from fusegpt_ray.errors import UserError, blaming
from fusegpt_ray.importance.scoring import score as score_stack
from fusegpt_ray.judge import Judge
from fusegpt_ray.model.finite import explained
from fusegpt_ray.model.source import MANIFEST, Source
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.model.structure import Structure
from fusegpt_ray.preflight import (
    Target,
    check_method,
    check_model,
    check_output,
    check_tokens,
    name_taken,
    plan_targets,
)
from fusegpt_ray.publishing.publish import Published, publish
from fusegpt_ray.publishing.rehearsal import rehearse
from fusegpt_ray.recipe import Recipe
from fusegpt_ray.report import Display
from fusegpt_ray.rounds import Rounds, fewer_at_once
from fusegpt_ray.run.journal import Journal, identity
from fusegpt_ray.sections import Cluster, Evaluation, Model
from fusegpt_ray.store import storage
from fusegpt_ray.store.records import checksum
from fusegpt_ray.text import calibration
from fusegpt_ray.text.windows import Windows, calibration_windows, evaluation_windows
from fusegpt_ray.workers.base import Setup, Workers

Leading = dict[str, int | None]
"""The token that each window begins with, if any, by the recipe key of its text."""


def compress(
    recipe: Recipe, display: Display | None = None, restart: bool = False
) -> list[Published]:
    """Make the model shallower as the recipe says; returns what was published, the lightest
    compression first.

    Run again after a failure, it goes on from the last committed round; with `restart` it forgets
    an unfinished run and begins anew. Run again after its end, it finds what it published.

    Raises:
        UserError: the recipe cannot be carried out; nothing was written then.
    """
    with display or Display() as show:
        source, structure = _check_source(recipe.model, _lengths(recipe))
        depth = len(structure.blocks)
        targets = plan_targets(recipe, depth)
        check_output(recipe, targets, restart)
        dense, tokenizer = _open_source(source, show)
        leading = _leading_tokens(recipe, tokenizer)
        check_method(recipe, structure)
        rehearse(dense, structure, [target.remove for target in targets])
        show.say(f"{source.name}: {depth} blocks, {targets[-1].remove} to remove ({recipe.method})")
        show.stage(f"starting the {recipe.cluster.engine} engine")
        with _open_workers(recipe, source, dense) as workers, ExitStack() as life:
            show.say(workers.description)
            show.stage("tokenising")
            drawn = _calibration_windows(workers, recipe, leading)
            windows_WT = drawn.tokens_WT
            evaluations = partial(_evaluation_windows, workers, recipe, leading)
            held_out = {name: evaluations(name) for name in recipe.evaluation}
            check_tokens(source, dense, windows_WT, *(item.tokens_WT for item in held_out.values()))
            show.stage("checking the model's files")
            this = identity(recipe, calibration.fingerprint(windows_WT), dense, workers.dtype)
            journal, run_id = Journal.of(recipe), checksum(this)
            if not restart:
                journal.check(this)
            published = _published_before(recipe, targets, run_id)
            if journal.exists or len(published) < len(targets):
                plan = {"rounds": targets[-1].remove, "models": [target.name for target in targets]}
                owned = journal.owned(show.say, lambda: show.doing, plan)
                journal = life.enter_context(owned)
                published = _published_before(recipe, targets, run_id)  # perhaps while we waited
                if restart:
                    journal.clear()
            if missing := [target for target in targets if target.folder not in published]:
                journal.begin(this, show.say)
                _compare_source(workers, source, dense, windows_WT, show)
                show.calibration(drawn.protocol)
                show.stage("evaluating the dense model")
                with explained(dense, source.name, workers.dtype):
                    judge = Judge(workers, dense, held_out, windows_WT, show)
                done = Rounds(recipe, workers, journal, dense, windows_WT, show).up_to(
                    [target.remove for target in missing]
                )
            else:
                show.say("nothing is left to do: this very run has published everything")
            for target in missing:
                records, stack = (
                    [round.record for round in done[: target.remove]],
                    done[target.remove - 1].stack,
                )
                show.stage(f"evaluating and publishing {target.name}")
                facts = {
                    "run": run_id,
                    "arithmetic": this["arithmetic"],
                    "method": recipe.method,
                    "sparsity": target.sparsity,
                    "recipe": recipe.model_dump(mode="json"),
                    "calibration": drawn.protocol,
                    "removed": [record["removed"] for record in records],
                    "rounds": records,
                    "fewer_at_once": fewer_at_once(recipe, records),
                }
                measure = partial(judge.measure, target.folder, stack)
                shard_bytes = int(recipe.output.shard_gb * 1e9)
                with journal.creating():
                    published[target.folder] = publish(
                        target.folder,
                        stack,
                        dense,
                        source,
                        shard_bytes,
                        facts,
                        measure,
                        journal.fence,
                    )
            if journal.lease:
                journal.remove()
        results = [published[target.folder] for target in targets]
        show.results((item.uri.rsplit("/", 1)[-1], item.manifest["perplexity"]) for item in results)
        for item in results:
            show.say(f"published {item.uri}")
        show.left_out(source.name, results[-1].manifest.get("left_out", []))
        return results


def score(recipe: Recipe, display: Display | None = None) -> dict[str, Any]:
    """Macro Influence of every block of the dense model, on all windows: {"metric", "blocks":
    [{"block", "score"} …], "lowest"} and the protocol (see `Windows.protocol`).

    Raises:
        UserError: the recipe cannot be carried out.
    """
    full = recipe.importance.model_copy(update={"all": True, "racing": None})
    recipe = recipe.model_copy(update={"importance": full})
    with display or Display() as show:
        source, _ = _check_source(recipe.model, {"calibration.length": recipe.calibration.length})
        dense, tokenizer = _open_source(source, show)
        leading = _leading_tokens(recipe, tokenizer)
        show.stage(f"starting the {recipe.cluster.engine} engine")
        with _open_workers(recipe, source, dense) as workers:
            show.stage("tokenising")
            drawn = _calibration_windows(workers, recipe, leading).first(recipe.importance.windows)
            windows_WT = drawn.tokens_WT
            check_tokens(source, dense, windows_WT)
            _compare_source(workers, source, dense, windows_WT, show)
            show.calibration(drawn.protocol)
            show.stage(f"scoring {len(dense)} blocks on {len(windows_WT)} windows")
            with explained(dense, source.name, workers.dtype):
                ranking = score_stack(workers, dense, windows_WT, recipe.importance)
    blocks = [{"block": dense, "score": value} for dense, value in ranking.scores.items()]
    found = {"metric": "macro_influence", "blocks": blocks, "lowest": ranking.lowest}
    return found | drawn.protocol


def evaluate(
    model: str,
    data: Evaluation,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    cluster: Cluster | None = None,
    display: Display | None = None,
) -> dict[str, Any]:
    """Perplexity of any checkpoint over consecutive windows of a text: {"model", "data", "windows",
    "length", "bos", "perplexity"}.

    Raises:
        UserError: the model or the text cannot be used.
    """
    if data.length is None:
        raise UserError(
            "evaluation.data.length", None, "missing", "give the tokens a window, such as 2048"
        )
    recipe = Recipe.parse(
        {
            "model": {"source": model, "revision": revision, "dtype": dtype},
            "calibration": {"data": data.data, "length": data.length},
            "evaluation": {"data": data},
            "cluster": cluster or Cluster(),
            "output": {"uri": ".", "name": "none"},  # nothing is written
        }
    )
    with display or Display() as show:
        source, _ = _check_source(recipe.model, {"evaluation.data.length": data.length})
        dense, tokenizer = _open_source(source, show)
        leading = _leading_tokens(recipe, tokenizer)
        show.stage(f"starting the {recipe.cluster.engine} engine")
        with _open_workers(recipe, source, dense) as workers:
            show.stage("tokenising")
            taken = _evaluation_windows(workers, recipe, leading, "data")
            windows_WT = taken.tokens_WT
            check_tokens(source, dense, windows_WT)
            _compare_source(workers, source, dense, windows_WT, show)
            show.stage(f"evaluating {len(windows_WT)} windows of {data.length} tokens")
            with explained(dense, source.name, workers.dtype):
                value = evaluation.perplexity(workers, dense, windows_WT)
    return {"model": model, **taken.protocol, "perplexity": value}


def _compare_source(
    workers: Workers, source: Source, dense: Stack, windows_WT: np.ndarray, show: Display
) -> None:
    """
    Raises:
        UserError: what is walked block by block is not the model that plain `from_pretrained`
        loads.
    """
    show.stage("comparing with what from_pretrained loads")
    with explained(dense, source.name, workers.dtype):
        plain = evaluation.compare_source(workers, windows_WT)
        if plain.kl is not None and math.isnan(plain.kl):
            raise FloatingPointError(plain.problem)
    if plain.problem:
        fix = (
            "use a checkpoint that plain from_pretrained loads, of an architecture that can be run"
            " block by block"
        )
        raise UserError("model.source", source.name, plain.problem, fix)


def _open_workers(recipe: Recipe, source: Source, dense: Stack) -> Workers:
    """The engine that `recipe.cluster.engine` names; with `local`, neither ray nor deepspeed is
    imported.
    """
    if recipe.cluster.engine == "local":
        from fusegpt_ray.workers.local import LocalWorkers

        return LocalWorkers(Setup.of(recipe, source, dense))
    from fusegpt_ray.distributed.cluster import RayWorkers

    return RayWorkers(Setup.of(recipe, source, dense))


def _check_source(model: Model, lengths: dict[str, int]) -> tuple[Source, Structure]:
    with blaming("model.source", model.source):
        source = Source.find(model.source, model.revision)
        return source, check_model(source, lengths)


def _open_source(source: Source, show: Display) -> tuple[Stack, Any]:
    """The dense stack of a source, and its tokenizer; reads headers, no weights."""
    with blaming("model.source", source.name):
        tokenizer = source.tokenizer()
        if source.on_hub:
            show.stage("fetching the model's files from the hub, unless they are here")
        return source.stack(), tokenizer


def _lengths(recipe: Recipe) -> dict[str, int]:
    lengths = {"calibration.length": recipe.calibration.length}
    return lengths | {
        f"evaluation.{name}.length": item.length
        for name, item in recipe.evaluation.items()
        if item.length
    }


def _leading_tokens(recipe: Recipe, tokenizer: Any) -> Leading:
    """
    Raises:
        UserError: see `calibration.leading_token`.
    """
    asked = {"calibration": recipe.calibration.bos}
    asked |= {
        f"evaluation.{name}": item.bos for name, item in recipe.evaluation.items() if item.bos
    }
    leading = calibration.leading_token
    found = {key: leading(bos, tokenizer, f"{key}.bos") for key, bos in asked.items()}
    inherited = {f"evaluation.{name}": found["calibration"] for name in recipe.evaluation}
    return inherited | found


def _calibration_windows(workers: Workers, recipe: Recipe, leading: Leading) -> Windows:
    key, text = "calibration.data", recipe.calibration
    return calibration_windows(workers.tokens(text, key), text, leading["calibration"], key)


def _evaluation_windows(workers: Workers, recipe: Recipe, leading: Leading, name: str) -> Windows:
    key, text = f"evaluation.{name}.data", recipe.evaluation[name]
    length, bos = text.length or recipe.calibration.length, leading[f"evaluation.{name}"]
    return evaluation_windows(workers.tokens(text, key), text, length, bos, key)


def _published_before(recipe: Recipe, targets: list[Target], run_id: str) -> dict[str, Published]:
    """By folder, what this very run published before it died.

    Raises:
        UserError: another run published one of the targets.
    """
    published = {}
    for target in targets:
        manifest = storage.join(target.folder, MANIFEST)
        if storage.exists(manifest):
            published[target.folder] = Published(target.folder, storage.read_json(manifest))
            if published[target.folder].manifest.get("run") != run_id:
                raise name_taken(recipe, target)
    return published
