"""A compression on open workers: rounds → healing → publishing, as far as they are left to do."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from fusegpt_ray.compressing.heal import Healer, sharing_of
from fusegpt_ray.compressing.rounds import Rounds
from fusegpt_ray.compressing.saving import put_shards
from fusegpt_ray.compressing.tournament import Tournament
from fusegpt_ray.compressing.worked import Begun, Worked, added
from fusegpt_ray.cost.footprint import healing_shortage, search_shortage, shortage
from fusegpt_ray.errors import PutOff
from fusegpt_ray.fusion.repair import repaired_only
from fusegpt_ray.healing.sharing import Sharing
from fusegpt_ray.importance.removals import Removal
from fusegpt_ray.measuring.as_loaded import compare_source
from fusegpt_ray.measuring.evaluation import blocks_added_behind
from fusegpt_ray.measuring.judge import Judge, stages_of
from fusegpt_ray.model.finite import explained
from fusegpt_ray.model.source import MANIFEST
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.planning.plan import Plan
from fusegpt_ray.preparing.generation import GENERATED_EVENT, identity_of_model
from fusegpt_ray.preparing.preflight import check_price, check_tokens, name_taken
from fusegpt_ray.preparing.sample_prompts import asked
from fusegpt_ray.preparing.windows import all_windows
from fusegpt_ray.publishing.publish import Published, publish
from fusegpt_ray.reporting.beside import beside_model
from fusegpt_ray.run.begun import being_published
from fusegpt_ray.run.budget import SPENT, Budget
from fusegpt_ray.run.done import Done
from fusegpt_ray.run.identity import healing_identity, identity, run_id
from fusegpt_ray.run.journal import Journal
from fusegpt_ray.run.known import Known
from fusegpt_ray.run.metrics_log import MetricsLog
from fusegpt_ray.run.shared import Shared
from fusegpt_ray.samples import fingerprint
from fusegpt_ray.store import storage
from fusegpt_ray.store.public import named
from fusegpt_ray.targets import Target
from fusegpt_ray.terminal.display import Display, Listener
from fusegpt_ray.text.windows import Windows
from fusegpt_ray.tracking.follow import followed
from fusegpt_ray.workers.base import Workers


@dataclass
class Compression:
    """A compression on open workers."""

    plan: Plan
    workers: Workers
    show: Display
    windows: Windows
    """Of the calibration text."""
    held_out: dict[str, Windows]
    healing: tuple[Windows, Windows] | None
    """Of the text that healing trains on, and held-out ones; None where nothing is healed."""
    identity: dict[str, Any]
    """What this run may not change and still be resumed."""
    shared: Shared
    """With other runs of the same model."""
    took: float = 0.0
    """Seconds until this was known, …"""
    generating: float = 0.0
    """… and of these, those in which the dense model wrote text."""
    log: MetricsLog = field(default_factory=MetricsLog)
    """Hears what happens, and is kept beside the journal."""
    puts_off: Callable[[], bool] = lambda: False
    """Asked once all that is left to do is to publish: whether that is to be done later."""

    @classmethod
    def begin(
        cls, planned: Plan, workers: Workers, show: Display, shared: Shared | None = None
    ) -> Compression:
        """Draw the windows, and find out which run this is.

        Args:
            shared: with other runs of the same model on the same workers; None: with nobody.

        Raises:
            UserError: a text cannot be used; or see `check_price`.
        """
        began = time.monotonic()
        recipe, model, shared = planned.recipe, planned.model, shared or Shared()
        check_price(workers)
        show.stage("tokenising")
        generating: list[float] = []

        def hear(event: str, values: Mapping[str, Any]) -> None:
            if event == GENERATED_EVENT:
                generating.append(values["seconds"])

        with show.heard(hear):
            windows, held_out, healing = all_windows(workers, recipe, planned.leading, show, shared)
        every = [text.tokens_WT for text in (windows, *held_out.values(), *(healing or ()))]
        check_tokens(model.source, model.stack, *every)
        planned = planned.counting(held_out).seeing(blocks_added_behind(workers, every), show.say)
        show.stage("checking the model's files")
        drawn = fingerprint(windows.tokens_WT)
        hardware = workers.hardware if recipe.cluster.deterministic else {}
        files = identity_of_model(workers, shared)
        this = identity(recipe, drawn, files, workers.dtype, hardware)
        texts_drawn, took = (windows, held_out, healing), time.monotonic() - began
        begun = cls(planned, workers, show, *texts_drawn, this, shared, took, sum(generating))
        show.tell("drawn", run=begun.id, seconds=round(took, 3))
        return begun

    @property
    def id(self) -> str:
        """See `run_id`."""
        return run_id(self.identity, self._healing_identity)

    @property
    def _measuring(self) -> dict[str, Any]:
        """What every measurement of the dense model depends on, beside its windows."""
        parts = ("method_version", "model", "arithmetic", "hardware")
        batch = self.plan.recipe.importance.batch
        return {key: self.identity[key] for key in parts} | {"batch": batch}

    def check(self, restart: bool = False) -> None:
        """
        Raises:
            UserError: another run has the name.
        """
        if not restart:
            Journal.of(self.plan.recipe).check(self.identity)
        self._published_before()

    @cached_property
    def _healing_identity(self) -> dict[str, Any] | None:
        if self.healing is None:
            return None
        drawn = (fingerprint(item.tokens_WT) for item in self.healing)
        return healing_identity(self.plan.recipe, *drawn)

    def publish_all(self, restart: bool) -> dict[str, Published]:
        """Do what is left to do; everything that this run has published, by folder.

        Raises:
            UserError: another run has the name; or see `Budget.check_prices`.
            PutOff: see `puts_off`; the same run goes on from there.
        """
        targets, journal = self.plan.targets, Journal.of(self.plan.recipe)
        recipe, workers = self.plan.recipe, self.workers
        held = (workers.gpus_held, workers.hardware.get("gpu", ""))
        budget = Budget(recipe.cluster, journal.folder, *held, time.monotonic() - self.took)
        journal.budget, monitor = budget, workers.monitor(recipe.output.name)
        with ExitStack() as life:
            if not restart:
                journal.check(self.identity)
                replace(budget).check_prices()  # it asks anew what is spent once it has the name
            published = self._published_before()
            if journal.exists or len(published) < len(targets):
                names = [target.name for target in targets]
                facts = {"run": self.id, "rounds": self.plan.rounds, "models": names}

                def told() -> dict[str, Any]:  # with every heartbeat
                    monitor(SPENT, budget.told)
                    return {**facts, SPENT: budget.spent}

                owned = journal.owned(self.show.say, lambda: self.show.doing, told, self.log)
                journal = life.enter_context(owned)
                published = self._published_before()  # perhaps while we waited
                if restart:
                    journal.clear()
            if missing := [target for target in targets if target.folder not in published]:
                with self._followed(journal, monitor):
                    published |= self._publish(missing, journal)
                monitor(SPENT, budget.told)
            else:
                self.show.say("nothing is left to do: this very run has published everything")
            if journal.lease:
                journal.remove()
        return published

    def _followed(self, journal: Journal, monitor: Listener) -> AbstractContextManager[None]:
        """A context in which whoever follows the run hears of it."""
        recipe, workers, listeners = self.plan.recipe, self.workers, (self.log, monitor)
        facts = {"source": named(self.plan.model.source.name), "blocks": len(self.plan.model.stack)}
        facts |= {"rounds": self.plan.rounds, "workers": workers.description}
        return followed(self.show, recipe, self.id, facts, *listeners, saved=lambda: journal.saved)

    def _publish(self, missing: Sequence[Target], journal: Journal) -> dict[str, Published]:
        """Do the rounds, then publish the models that are missing."""
        recipe, model, workers = self.plan.recipe, self.plan.model, self.workers
        windows_WT, show = self.windows.tokens_WT, self.show
        journal.begin(self.identity, show.say)
        begun = Begun.noted(self.plan, workers, journal, show.say, self.generating)
        drawn = {"windows": self.identity["windows_sha256"]}
        compare = partial(compare_source, workers, model.source, model.stack, windows_WT, show)
        self.shared.once("source", drawn, compare)
        show.calibration(self.windows.protocol)
        if recipe.trains:
            self._tell_shortages()
        judge = self._judge(journal)
        begun.judged(judge)
        order, searched = self._search(journal)
        rounds = Rounds(
            recipe,
            workers,
            journal,
            model.stack,
            self.windows,
            show,
            order,
            self.plan.removable,
            self.shared,
            self._measuring | drawn,
        )
        done = rounds.up_to([target.rounds for target in missing])
        published = {}
        for target in missing:
            healed = self._heal(target, done[: target.rounds], journal)
            if target == missing[-1 if healed else 0] and self.puts_off():
                raise PutOff("waits to be published")
            stages, repairing = self._stages(done[: target.rounds], healed, journal)
            seconds = added(begun.seconds, {"repair": repairing})
            worked = Worked(target, done[: target.rounds], healed, seconds)
            show.stage(f"evaluating and publishing {target.name}")
            events = partial(self.log.whole, show.say)
            beside = partial(beside_model, target.folder, show.say, recipe.output.report, events)
            with being_published(target.folder, journal.fence), journal.creating():
                published[target.folder] = publish(
                    target.folder,
                    [*stages.values()][-1],
                    model.stack,
                    model.source,
                    int(recipe.output.shard_gb * 1e9),
                    searched | self._facts(worked),
                    partial(worked.measured, judge, stages, journal),
                    journal.fence,
                    partial(put_shards, workers),
                    beside,
                )
            manifest = published[target.folder].manifest
            show.published(target.name, target.fewer, manifest["publishing"])
            if wrong := manifest.get("wrong_in_vllm"):
                show.warn(f"{target.name}: {wrong}")
        return published

    def _tell_shortages(self) -> None:
        """Where memory is known to be too short for what is to be trained."""
        recipe, dense, workers = self.plan.recipe, self.plan.model.stack, self.workers
        targets, room = self.plan.targets, workers.device_bytes
        least, most = (len(dense) - end.fewer for end in (targets[-1], targets[0]))
        for lack in (
            shortage(recipe, dense, workers.dtype, self.plan.rounds, room),
            healing_shortage(recipe, dense, workers.dtype, most, room),
            search_shortage(recipe, dense, workers.dtype, least, room),
        ):
            if lack:
                self.show.say(lack)

    def _judge(self, journal: Journal) -> Judge:
        """The dense model is measured here, unless that is known."""
        model, workers, show = self.plan.model, self.workers, self.show
        with explained(model.stack, model.source.name, workers.dtype):
            return Judge(
                workers,
                model.stack,
                self.held_out,
                self.windows.tokens_WT,
                show,
                journal,
                self.id,
                self.shared,
                self._measuring,
                asked(self.plan.recipe, model.source, show.say),
            )

    def _stages(
        self, rounds: Sequence[Done], healed: Done | None, journal: Journal
    ) -> tuple[dict[str, Stack], float]:
        """The model on its way, and the seconds that repairing once more took."""
        began = time.monotonic()
        stages = stages_of(self.plan.recipe, rounds[-1].stack, healed.stack if healed else None)
        if self.plan.recipe.trains_groups and self.plan.recipe.repairs and self.held_out:
            self.show.stage("repairing the gaps alone, to compare with")
            removed = [done.record["removed"] for done in rounds]
            folder = storage.join(journal.blocks_folder, "repaired")
            way, windows = self.plan.recipe.fusion.start, self.windows
            assert way != "auto" and way != "none"
            dense, fence = self.plan.model.stack, journal.fence
            stack = repaired_only(self.workers, dense, removed, way, windows, folder, fence)
            return {"repaired": stack, **stages}, time.monotonic() - began
        return stages, 0.0

    def _search(self, journal: Journal) -> tuple[Removal | None, dict[str, Any]]:
        """The blocks to remove, in order, and what the manifest tells of their choice; None and
        nothing if each round chooses.
        """
        if self.plan.recipe.search is None:
            return None, {}
        assert self.healing is not None
        recipe, dense = self.plan.recipe, self.plan.model.stack
        windows, healed, held = (text.tokens_WT for text in (self.windows, *self.healing))
        about = (recipe, self.workers, journal, dense)
        rest = (self.show, self.plan.removable, self._sharing(journal))
        found = Tournament(*about, windows, healed, held, *rest)
        removed, record = found.removal(self.plan.rounds)
        return removed, {"search": record}

    def _sharing(self, journal: Journal) -> Sharing:
        recipe, dense = self.plan.recipe, self.plan.model.stack
        scoring = self.windows.first(recipe.importance.windows).tokens_WT
        known = Known(journal, "sharing", self.id, self.shared, self._measuring, self.show.say)
        return sharing_of(recipe, self.workers, known, dense, scoring, self.show)

    def _heal(self, target: Target, rounds: Sequence[Done], journal: Journal) -> Done | None:
        """The healed model, if the recipe asks for it."""
        this = self._healing_identity
        if self.healing is None or this is None:
            return None
        about = (self.plan.recipe, self.workers, journal, self.plan.model.stack)
        healer = Healer(*about, *self.healing, this, self.show, self._sharing(journal))
        return healer.heal(target.name, rounds)

    def _facts(self, worked: Worked) -> dict[str, Any]:
        """What the manifest tells of the run."""
        this = {"run": self.id, "arithmetic": self.identity["arithmetic"]}
        return this | worked.facts(self.plan, self.workers, self.windows)

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
