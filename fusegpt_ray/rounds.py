"""The rounds of one run: score → choose → fuse → commit, again and again, whatever the engine."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np

from fusegpt_ray.fusion.round import Round
from fusegpt_ray.importance.ranking import Ranking
from fusegpt_ray.importance.sums import Sums
from fusegpt_ray.model.finite import explained
from fusegpt_ray.model.memory import fewer_at_once
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.recipe import Recipe
from fusegpt_ray.report import Display
from fusegpt_ray.run.journal import Done, Journal
from fusegpt_ray.store.records import checksum
from fusegpt_ray.workers.base import Engine

KEEP_SECONDS = 10.0
"""How much scoring a kill may cost at most, besides the share that is being measured."""


@dataclass
class Rounds:
    """The rounds of one run."""

    recipe: Recipe
    engine: Engine
    journal: Journal
    dense: Stack
    windows_WT: np.ndarray
    show: Display

    def up_to(self, wanted: list[int]) -> list[Done]:
        """The rounds up to the last of the numbers `wanted`, in order. Those the journal has are not done again."""
        total = max(wanted)
        done = self.journal.rounds(wanted, self.show.say)[:total]
        if done:
            self.show.say(
                f"going on after round {len(done)} of {total} (found in {self.journal.folder})"
            )
        while len(done) < total:
            number = len(done) + 1
            self.show.round_begins(number, total, len(self.dense) - len(done))
            try:
                done.append(self._round(number, done))
            except Exception as error:
                where = f" in {self.journal.folder}" if self.journal.saved else ""
                finished = f"{len(done)} are finished{where}"
                error.add_note(f"stopped in round {number} of {total}; {finished}")
                if done and isinstance(error, FloatingPointError):
                    error.add_note("another recipe begins anew with --restart, which forgets them")
                raise
            self.journal.commit(number, done[-1])
            self.show.round_ends(number, total, done[-1].record["losses"])
        return done

    def _round(self, number: int, before: list[Done]) -> Done:
        stack = before[-1].stack if before else self.dense
        score_seconds, ranking = self._score(
            number, stack, Ranking.from_record(before[-1].record) if before else None
        )
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
            folder = self.journal.round_folder(number)
            job = Round(
                stack,
                self.dense,
                donor,
                settings,
                fuse,
                self.recipe.seed,
                folder,
                origin[:16],
                self.journal.fence,
            )
            group = [block.dense for block in job.group]
            verb = "fusing" if fuse else "fine-tuning"
            self.show.stage(
                f"round {number}: {verb} blocks {group[0]}–{group[-1]} without {donor}",
                settings.epochs,
            )
            heard = lambda n, loss: self.show.epoch(n, settings.epochs, loss)  # noqa: E731
            with self._explained(trained=True):
                tuned = self.engine.finetune(job, self.windows_WT, heard, self.show.say)
            after, files, losses = after.swap(tuned.saved.blocks), tuned.saved.files, tuned.losses
            states_rows, micro_batch = tuned.rows, tuned.micro_batch
            seconds |= {
                "states": round(tuned.states_seconds, 3),
                "finetune": round(tuned.finetune_seconds, 3),
            }
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
            ranking = self.engine.score(
                stack, self.windows_WT[: self.recipe.importance.windows], last, sums
            )
        seconds = round(time.monotonic() - began, 3)
        self.journal.keep("scores", number, {"seconds": seconds, "ranking": ranking.to_record()})
        self.journal.forget("sums", number)
        return seconds, ranking

    def _explained(self, trained: bool) -> AbstractContextManager[None]:
        return explained(self.dense, self.recipe.model.source, self.engine.dtype, trained)
