"""The commands that need workers: compress, score and evaluate.

`compress` reads: plan → open the workers → rounds → publish.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from fusegpt_ray import evaluation
from fusegpt_ray.errors import UserError
from fusegpt_ray.footprint import shortage
from fusegpt_ray.importance.scoring import score as score_stack
from fusegpt_ray.judge import Judge
from fusegpt_ray.model.finite import explained
from fusegpt_ray.model.source import MANIFEST, Source
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.plan import Plan, find_model, leading_tokens, open_model, plan
from fusegpt_ray.preflight import Target, check_tokens, name_taken
from fusegpt_ray.publishing.publish import Published, publish
from fusegpt_ray.recipe import Recipe
from fusegpt_ray.report import Display
from fusegpt_ray.rounds import Rounds, fewer_at_once
from fusegpt_ray.run.identity import identity
from fusegpt_ray.run.journal import Done, Journal
from fusegpt_ray.run.outputs import run_id
from fusegpt_ray.saving import put_shards
from fusegpt_ray.sections import Cluster, Evaluation, Model
from fusegpt_ray.store import storage
from fusegpt_ray.text import calibration
from fusegpt_ray.text.windows import Windows, calibration_windows, evaluation_windows
from fusegpt_ray.workers.base import Setup, Workers


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
        planned = plan(recipe, show, restart)
        blocks = f"{len(planned.model.stack)} blocks, {planned.rounds} to remove"
        show.say(f"{planned.model.source.name}: {blocks} ({recipe.method})")
        show.say(planned.cost.in_words())
        with open_workers(planned.setup, show) as workers:
            run = _Run.begin(planned, workers, show)
            published = run.publish_all(restart)
        results = [published[target.folder] for target in planned.targets]
        show.results((item.uri.rsplit("/", 1)[-1], item.manifest["perplexity"]) for item in results)
        for item in results:
            show.say(f"published {item.uri}")
        show.left_out(planned.model.source.name, results[-1].manifest.get("left_out", []))
        return results


@dataclass
class _Run:
    """A compression on open workers."""

    plan: Plan
    workers: Workers
    show: Display
    windows: Windows
    """Of the calibration text."""
    held_out: dict[str, Windows]
    identity: dict[str, Any]
    """What this run may not change and still be resumed."""

    @classmethod
    def begin(cls, planned: Plan, workers: Workers, show: Display) -> _Run:
        """Draw the windows, and find out which run this is.

        Raises:
            UserError: a text cannot be used.
        """
        recipe, model = planned.recipe, planned.model
        show.say(workers.description)
        show.stage("tokenising")
        text, leading = recipe.calibration, planned.leading
        windows = _calibration_windows(workers, recipe, leading["calibration"])
        held_out = {}
        for name, held in recipe.evaluation.items():
            key = f"evaluation.{name}"
            held_out[name] = _evaluation_windows(
                workers, held, held.length or text.length, leading[key], f"{key}.data"
            )
        held_out_windows = (item.tokens_WT for item in held_out.values())
        check_tokens(model.source, model.stack, windows.tokens_WT, *held_out_windows)
        show.stage("checking the model's files")
        drawn = calibration.fingerprint(windows.tokens_WT)
        exact = recipe.cluster.deterministic
        hardware = workers.hardware if exact else {}
        this = identity(recipe, drawn, model.stack, workers.dtype, hardware)
        return cls(planned, workers, show, windows, held_out, this)

    @property
    def id(self) -> str:
        """See `run_id`."""
        return run_id(self.identity)

    def publish_all(self, restart: bool) -> dict[str, Published]:
        """Do what is left to do; everything that this run has published, by folder.

        Raises:
            UserError: another run has the name.
        """
        targets, journal = self.plan.targets, Journal.of(self.plan.recipe)
        with ExitStack() as life:
            if not restart:
                journal.check(self.identity)
            published = self._published_before()
            if journal.exists or len(published) < len(targets):
                facts = {
                    "rounds": self.plan.rounds,
                    "models": [target.name for target in targets],
                }
                owned = journal.owned(self.show.say, lambda: self.show.doing, facts)
                journal = life.enter_context(owned)
                published = self._published_before()  # perhaps while we waited
                if restart:
                    journal.clear()
            if missing := [target for target in targets if target.folder not in published]:
                published |= self._publish(missing, journal)
            else:
                self.show.say("nothing is left to do: this very run has published everything")
            if journal.lease:
                journal.remove()
        return published

    def _publish(self, missing: Sequence[Target], journal: Journal) -> dict[str, Published]:
        """Do the rounds, then publish the models that are missing."""
        recipe, model, workers = self.plan.recipe, self.plan.model, self.workers
        windows_WT, show = self.windows.tokens_WT, self.show
        journal.begin(self.identity, show.say)
        _compare_source(workers, model.source, model.stack, windows_WT, show)
        show.calibration(self.windows.protocol)
        if recipe.trains:
            room, last = workers.device_bytes, self.plan.rounds
            if lack := shortage(recipe, model.stack, workers.dtype, last, room):
                show.say(lack)
        show.stage("evaluating the dense model")
        with explained(model.stack, model.source.name, workers.dtype):
            judge = Judge(workers, model.stack, self.held_out, windows_WT, show, journal, self.id)
        rounds = Rounds(recipe, workers, journal, model.stack, windows_WT, show)
        done = rounds.up_to([target.remove for target in missing])
        published = {}
        for target in missing:
            show.stage(f"evaluating and publishing {target.name}")
            stack = done[target.remove - 1].stack
            with journal.creating():
                published[target.folder] = publish(
                    target.folder,
                    stack,
                    model.stack,
                    model.source,
                    int(recipe.output.shard_gb * 1e9),
                    self._facts(target, done[: target.remove]),
                    partial(judge.measure, target.folder, stack),
                    journal.fence,
                    partial(put_shards, workers),
                )
            show.published(published[target.folder].manifest["publishing"])
        return published

    def _facts(self, target: Target, done: Sequence[Done]) -> dict[str, Any]:
        """What the manifest tells of the run."""
        recipe, records = self.plan.recipe, [round.record for round in done]
        return {
            "run": self.id,
            "arithmetic": self.identity["arithmetic"],
            "method": recipe.method,
            "sparsity": target.sparsity,
            "recipe": recipe.model_dump(mode="json"),
            "calibration": self.windows.protocol,
            "removed": [record["removed"] for record in records],
            "rounds": records,
            "fewer_at_once": fewer_at_once(recipe, records),
        }

    def _published_before(self) -> dict[str, Published]:
        """By folder, what this very run published before it died.

        Raises:
            UserError: another run published one of the targets.
        """
        published = {}
        for target in self.plan.targets:
            manifest = storage.join(target.folder, MANIFEST)
            if storage.exists(manifest):
                published[target.folder] = Published(target.folder, storage.read_json(manifest))
                if published[target.folder].manifest.get("run") != self.id:
                    raise name_taken(self.plan.recipe, target)
        return published


def score(recipe: Recipe, display: Display | None = None) -> dict[str, Any]:
    """The recipe's metric for every block of the dense model, on all windows: {"metric", "blocks":
    [{"block", "score"} …], "lowest"} and the protocol (see `Windows.protocol`). "metric" is
    "macro_influence", "kl", "loss" or "block_influence".

    Raises:
        UserError: the recipe cannot be carried out.
    """
    full = recipe.importance.model_copy(update={"all": True, "racing": None})
    with display or Display() as show:
        lengths = {"calibration.length": recipe.calibration.length}
        source, _ = find_model(recipe.model, lengths)
        model = open_model(source, show)
        leading = leading_tokens(recipe, model.tokenizer)["calibration"]
        setup = Setup(
            source,
            model.stack,
            recipe.cluster,
            recipe.model.dtype,
            full,
            recipe.calibration.piece_mb,
        )
        with open_workers(setup, show) as workers:
            show.stage("tokenising")
            drawn = _calibration_windows(workers, recipe, leading).first(full.windows)
            windows_WT = drawn.tokens_WT
            check_tokens(source, model.stack, windows_WT)
            _compare_source(workers, source, model.stack, windows_WT, show)
            show.calibration(drawn.protocol)
            show.stage(f"scoring {len(model.stack)} blocks on {len(windows_WT)} windows")
            with explained(model.stack, source.name, workers.dtype):
                ranking = score_stack(workers, model.stack, windows_WT, full)
    blocks = [{"block": dense, "score": value} for dense, value in ranking.scores.items()]
    found = {"metric": full.spec.name, "blocks": blocks, "lowest": ranking.lowest}
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
    key = "evaluation.data"
    if data.length is None:
        fix = "give the tokens a window, such as 2048"
        raise UserError(f"{key}.length", None, "missing", fix)
    asked = {"source": model, "revision": revision, "dtype": dtype}
    which = Recipe.check(Model, asked, "model")
    with display or Display() as show:
        source, _ = find_model(which, {f"{key}.length": data.length})
        opened = open_model(source, show)
        leading = calibration.leading_token(data.bos or "auto", opened.tokenizer, f"{key}.bos")
        setup = Setup(source, opened.stack, cluster or Cluster(), which.dtype)
        with open_workers(setup, show) as workers:
            show.stage("tokenising")
            taken = _evaluation_windows(workers, data, data.length, leading, f"{key}.data")
            windows_WT = taken.tokens_WT
            check_tokens(source, opened.stack, windows_WT)
            _compare_source(workers, source, opened.stack, windows_WT, show)
            show.stage(f"evaluating {len(windows_WT)} windows of {data.length} tokens")
            with explained(opened.stack, source.name, workers.dtype):
                value = evaluation.perplexity(workers, opened.stack, windows_WT)
    return {"model": model, **taken.protocol, "perplexity": value}


def open_workers(setup: Setup, show: Display) -> Workers:
    """The workers that `cluster.engine` names, to be entered. With `local`, neither ray nor
    deepspeed is imported.
    """
    show.stage(f"starting the {setup.cluster.engine} engine")
    if setup.cluster.engine == "local":
        from fusegpt_ray.workers.local import LocalWorkers

        return LocalWorkers(setup)
    from fusegpt_ray.distributed.cluster import RayWorkers

    return RayWorkers(setup)


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


def _calibration_windows(workers: Workers, recipe: Recipe, leading: int | None) -> Windows:
    key, text = "calibration.data", recipe.calibration
    return calibration_windows(workers.tokens(text, key), text, leading, key)


def _evaluation_windows(
    workers: Workers, text: Evaluation, length: int, leading: int | None, key: str
) -> Windows:
    return evaluation_windows(workers.tokens(text, key), text, length, leading, key)
