"""The loop: score → choose → fuse → commit → … → publish. The same for one process and for a cluster."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from fusegpt_ray.engine import Engine
from fusegpt_ray.errors import UserError, blaming
from fusegpt_ray.fusion.round import Round
from fusegpt_ray.importance.ranking import Ranking
from fusegpt_ray.importance.sums import Sums
from fusegpt_ray.model.finite import explained
from fusegpt_ray.model.memory import fewer_at_once
from fusegpt_ray.model.source import MANIFEST, Source
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.preflight import Target, check_model, check_output, check_tokens, name_taken, plan_targets
from fusegpt_ray.publishing.publish import Published, publish
from fusegpt_ray.recipe import Recipe
from fusegpt_ray.report import Display
from fusegpt_ray.run.heartbeat import Heartbeat, wait_until_alone
from fusegpt_ray.run.journal import Done, Journal, identity
from fusegpt_ray.sections import Calibration, Cluster, Evaluation, Model
from fusegpt_ray.store import storage
from fusegpt_ray.store.records import checksum
from fusegpt_ray.text import calibration

KEEP_SECONDS = 10.0
"""How much scoring a kill may cost at most, besides the share that is being measured."""


def compress(recipe: Recipe, display: Display | None = None, restart: bool = False) -> list[Published]:
    """Make the model shallower as the recipe says; returns what was published, the lightest compression first.

    Run again after a failure, it goes on from the last committed round; with `restart` it forgets an unfinished run and begins anew.
    Run again after its end, it finds what it published.

    Raises:
        UserError: the recipe cannot be carried out; nothing was written then.
    """
    with display or Display() as show:
        source, depth = _check_source(recipe.model, _lengths(recipe))
        targets = plan_targets(recipe, depth)
        check_output(recipe, targets, restart)
        dense = _open_source(source)
        show.say(f"{source.name}: {depth} blocks, {targets[-1].remove} to remove ({recipe.method})")
        show.stage(f"starting the {recipe.cluster.engine} engine")
        with _open_engine(recipe, source, dense) as engine, ExitStack() as life:
            show.say(engine.description)
            show.stage("tokenising")
            windows_WT = _calibration_windows(engine, recipe.calibration)
            held_out = {name: _evaluation_windows(engine, name, item, recipe) for name, item in recipe.evaluation.items()}
            check_tokens(source, dense, windows_WT, *held_out.values())
            show.stage("checking the model's files")
            this = identity(recipe, calibration.fingerprint(windows_WT), dense, engine.dtype)
            journal, run_id = Journal.of(recipe), checksum(this)
            wait_until_alone(journal.folder, recipe.output.name, show.say)
            if restart:
                journal.remove()
            published = _published_before(recipe, targets, run_id)
            if missing := [target for target in targets if target.folder not in published]:
                life.enter_context(journal.begun(this))
                plan = {"rounds": targets[-1].remove, "models": [target.name for target in targets]}
                life.enter_context(Heartbeat(journal.folder, lambda: show.doing, plan))
                show.stage("evaluating the dense model")
                with explained(dense, source.name, engine.dtype):
                    judge = _Judge(engine, dense, held_out, windows_WT, show)
                done = _Run(recipe, engine, journal, dense, windows_WT, show).rounds([target.remove for target in missing])
            else:
                show.say("nothing is left to do: this very run has published everything")
                journal.check(this)
            for target in missing:
                records, stack = [round.record for round in done[: target.remove]], done[target.remove - 1].stack
                show.stage(f"evaluating and publishing {target.name}")
                facts = {
                    "run": run_id,
                    "arithmetic": this["arithmetic"],
                    "method": recipe.method,
                    "sparsity": target.sparsity,
                    "recipe": recipe.model_dump(mode="json"),
                    "removed": [record["removed"] for record in records],
                    "rounds": records,
                    "fewer_at_once": fewer_at_once(recipe, records),
                }
                measure = partial(judge.measure, target.folder, stack)
                shard_bytes = int(recipe.output.shard_gb * 1e9)
                published[target.folder] = publish(target.folder, stack, dense, source, shard_bytes, facts, measure)
            life.close()  # a later sign would bring the folder back
            journal.remove()
        results = [published[target.folder] for target in targets]
        show.results((item.uri.rsplit("/", 1)[-1], item.manifest["perplexity"]) for item in results)
        for item in results:
            show.say(f"published {item.uri}")
        return results


def score(recipe: Recipe, display: Display | None = None) -> dict[str, Any]:
    """Macro Influence of every block of the dense model, on all windows: {"metric", "blocks": [{"block", "score"} …], "lowest"}.

    Raises:
        UserError: the recipe cannot be carried out.
    """
    full = recipe.importance.model_copy(update={"all": True, "racing": None})
    recipe = recipe.model_copy(update={"importance": full})
    with display or Display() as show:
        source, _ = _check_source(recipe.model, {"calibration.length": recipe.calibration.length})
        dense = _open_source(source)
        show.stage(f"starting the {recipe.cluster.engine} engine")
        with _open_engine(recipe, source, dense) as engine:
            show.stage("tokenising")
            windows_WT = _calibration_windows(engine, recipe.calibration)[: recipe.importance.windows]
            check_tokens(source, dense, windows_WT)
            show.stage(f"scoring {len(dense)} blocks on {len(windows_WT)} windows")
            with explained(dense, source.name, engine.dtype):
                ranking = engine.score(dense, windows_WT)
    blocks = [{"block": dense, "score": value} for dense, value in ranking.scores.items()]
    return {"metric": "macro_influence", "blocks": blocks, "lowest": ranking.lowest}


def evaluate(
    model: str,
    data: Evaluation,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    cluster: Cluster | None = None,
    display: Display | None = None,
) -> dict[str, Any]:
    """Perplexity of any checkpoint over consecutive windows of a text: {"model", "data", "length", "windows", "perplexity"}.

    Raises:
        UserError: the model or the text cannot be used.
    """
    if data.length is None:
        raise UserError("evaluation.data.length", None, "missing", "give the tokens a window, such as 2048")
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
        dense = _open_source(source)
        show.stage(f"starting the {recipe.cluster.engine} engine")
        with _open_engine(recipe, source, dense) as engine:
            show.stage("tokenising")
            windows_WT = _evaluation_windows(engine, "data", data, recipe)
            check_tokens(source, dense, windows_WT)
            show.stage(f"evaluating {len(windows_WT)} windows of {data.length} tokens")
            with explained(dense, source.name, engine.dtype):
                value = engine.perplexity(dense, windows_WT)
    return {"model": model, "data": data.data, "length": data.length, "windows": len(windows_WT), "perplexity": value}


def _open_engine(recipe: Recipe, source: Source, dense: Stack) -> Engine:
    """The engine that `recipe.cluster.engine` names; with `local`, neither ray nor deepspeed is imported."""
    if recipe.cluster.engine == "local":
        from fusegpt_ray.local import LocalEngine

        return LocalEngine(recipe, source, dense)
    from fusegpt_ray.distributed.engine import RayEngine

    return RayEngine(recipe, source, dense)


def _check_source(model: Model, lengths: dict[str, int]) -> tuple[Source, int]:
    with blaming("model.source", model.source):
        source = Source.find(model.source, model.revision)
        return source, check_model(source, lengths)


def _open_source(source: Source) -> Stack:
    """The dense stack of a source whose tokenizer loads; reads headers, no weights."""
    with blaming("model.source", source.name):
        source.tokenizer()
        return source.stack()


def _lengths(recipe: Recipe) -> dict[str, int]:
    lengths = {"calibration.length": recipe.calibration.length}
    return lengths | {f"evaluation.{name}.length": item.length for name, item in recipe.evaluation.items() if item.length}


def _calibration_windows(engine: Engine, text: Calibration) -> np.ndarray:
    key = "calibration.data"
    return calibration.sample_windows(engine.tokens(text, key), text.windows, text.length, text.seed, key)


def _evaluation_windows(engine: Engine, name: str, text: Evaluation, recipe: Recipe) -> np.ndarray:
    key = f"evaluation.{name}.data"
    length = text.length or recipe.calibration.length
    return calibration.consecutive_windows(engine.tokens(text, key), length, text.windows, key)


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


@dataclass
class _Run:
    """The rounds of one run."""

    recipe: Recipe
    engine: Engine
    journal: Journal
    dense: Stack
    windows_WT: np.ndarray
    show: Display

    def rounds(self, wanted: list[int]) -> list[Done]:
        """The rounds up to the last of the numbers `wanted`, in order. Those the journal has are not done again."""
        total = max(wanted)
        done = self.journal.rounds(wanted, self.show.say)[:total]
        if done:
            self.show.say(f"going on after round {len(done)} of {total} (found in {self.journal.folder})")
        while len(done) < total:
            number = len(done) + 1
            self.show.round_begins(number, total, len(self.dense) - len(done))
            try:
                done.append(self._round(number, done))
            except Exception as error:
                error.add_note(f"stopped in round {number} of {total}; {len(done)} are finished in {self.journal.folder}")
                raise
            self.journal.commit(number, done[-1])
            self.show.round_ends(number, total, done[-1].record["losses"])
        return done

    def _round(self, number: int, before: list[Done]) -> Done:
        stack = before[-1].stack if before else self.dense
        score_seconds, ranking = self._score(number, stack, Ranking.from_record(before[-1].record) if before else None)
        donor = ranking.lowest
        self.show.scored(ranking)
        seconds = {"score": score_seconds, "states": 0.0, "finetune": 0.0}
        group: list[int] = []
        states_rows = micro_batch = None
        losses: list[float] = []
        after, files = stack.drop(donor), {}
        if self.recipe.method != "mi":
            settings = self.recipe.fusion
            fuse = self.recipe.method == "fusegpt"
            origin = checksum({"rounds": [done.to_json() for done in before]})
            job = Round(stack, self.dense, donor, settings, fuse, self.recipe.seed, self.journal.round_folder(number), origin[:16])
            group = [block.dense for block in job.group]
            verb = "fusing" if fuse else "fine-tuning"
            self.show.stage(f"round {number}: {verb} blocks {group[0]}–{group[-1]} without {donor}", settings.epochs)
            heard = lambda n, loss: self.show.epoch(n, settings.epochs, loss)  # noqa: E731
            with self._explained(trained=True):
                tuned = self.engine.finetune(job, self.windows_WT, heard, self.show.say)
            after, files, losses = after.swap(tuned.saved.blocks), tuned.saved.files, tuned.losses
            states_rows, micro_batch = tuned.rows, tuned.micro_batch
            seconds |= {"states": round(tuned.states_seconds, 3), "finetune": round(tuned.finetune_seconds, 3)}
        record = {
            "removed": donor,
            **ranking.to_record(),
            "group": group,
            "states_rows": states_rows,
            "micro_batch": micro_batch,
            "loss_first": losses[0] if losses else None,
            "loss_last": losses[-1] if losses else None,
            "losses": losses,
            "seconds": seconds,
        }
        if less := fewer_at_once(self.recipe, [record]):
            self.show.say(f"  memory ran out, so fewer windows at once: {less}")
        return Done(record, after, files)

    def _score(self, number: int, stack: Stack, last: Ranking | None) -> tuple[float, Ranking]:
        """Seconds and ranking; what a killed attempt noted of it is not measured again."""
        if noted := self.journal.kept("scores", number, self.show.say):
            return noted["seconds"], Ranking.from_record(noted["ranking"])
        sums = Sums(Sums.known_from(self.journal.kept("sums", number, self.show.say) or []))
        kept = began = time.monotonic()

        def keep() -> None:
            nonlocal kept
            if time.monotonic() - kept >= KEEP_SECONDS:
                self.journal.keep("sums", number, sums.to_json())
                kept = time.monotonic()

        sums.changed = keep
        with self._explained(trained=number > 1):
            ranking = self.engine.score(stack, self.windows_WT[: self.recipe.importance.windows], last, sums)
        seconds = round(time.monotonic() - began, 3)
        self.journal.keep("scores", number, {"seconds": seconds, "ranking": ranking.to_record()})
        self.journal.forget("sums", number)
        return seconds, ranking

    def _explained(self, trained: bool) -> AbstractContextManager[None]:
        return explained(self.dense, self.recipe.model.source, self.engine.dtype, trained)


@dataclass
class _Judge:
    """Proves a published model, and measures it beside the dense and the dropped one on the held-out texts."""

    engine: Engine
    dense: Stack
    held_out: Mapping[str, np.ndarray]
    windows_WT: np.ndarray
    """Of the calibration text, for a proof without held-out texts."""
    show: Display

    def __post_init__(self) -> None:
        self._dense = {name: self.engine.perplexity(self.dense, windows) for name, windows in self.held_out.items()}

    def measure(self, folder: str, stack: Stack, published: Stack) -> dict[str, Any]:
        """The proof that the model in `folder` is the stack, and perplexities; `published` is the folder's own stack."""
        windows_WT = next(iter(self.held_out.values()), self.windows_WT)
        proof = self.engine.prove(published, folder, stack, windows_WT)
        return {"perplexity": self._perplexities(stack, published), "proof": asdict(proof)}

    def _perplexities(self, stack: Stack, published: Stack) -> dict[str, dict[str, float]]:
        """`fused` is that of the published weights, in their dtype, not of the float32 blocks they were rounded from."""
        dropped = self.dense
        for dense in set(self.dense.kept) - set(stack.kept):
            dropped = dropped.drop(dense)
        found = {}
        for name, windows_WT in self.held_out.items():
            fused = self.engine.perplexity(published, windows_WT)
            plain = fused if stack == dropped else self.engine.perplexity(dropped, windows_WT)
            length = int(windows_WT.shape[1])
            found[name] = {"dense": self._dense[name], "dropped": plain, "fused": fused, "length": length}
        return found
