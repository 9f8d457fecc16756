"""The rounds of one run: score → choose → fuse → commit, again and again, whatever the engine. What
makes a model deeper is a single round, in which nothing is scored or chosen.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any

from fusegpt_ray.importance.ranking import Ranking
from fusegpt_ray.importance.sums import Sums
from fusegpt_ray.methods import METHODS
from fusegpt_ray.methods.base import Change, Question, Round
from fusegpt_ray.model.finite import explained
from fusegpt_ray.model.removable import ANY, Removable
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.model.weights import stored_bytes
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.recipe.specs import METHOD_SPECS
from fusegpt_ray.run.journal import Done, Journal
from fusegpt_ray.run.shared import Shared
from fusegpt_ray.store.records import checksum
from fusegpt_ray.terminal.display import Display
from fusegpt_ray.text.windows import Windows
from fusegpt_ray.workers.base import Workers

KEEP_SECONDS = 10.0
"""How much scoring a kill may cost at most, besides the share that is being measured."""


@dataclass
class Rounds:
    """The rounds of one run."""

    recipe: Recipe
    workers: Workers
    journal: Journal
    dense: Stack
    text: Windows
    """Of the calibration text."""
    show: Display
    order: Sequence[int] | None = None
    """Dense numbers of the blocks to remove, if they are chosen already (see `tournament.py`)."""
    removable: Removable = ANY
    """The blocks that are chosen among."""
    shared: Shared = field(default_factory=Shared)
    measuring: Mapping[str, Any] = field(default_factory=dict)
    """What the dense model's scores depend on, beside `importance`: shared with other runs."""

    def up_to(self, wanted: list[int]) -> list[Done]:
        """The rounds up to the last of the numbers `wanted`, in order. Those the journal has are
        not done again.
        """
        total = max(wanted)
        done = self.journal.rounds(wanted, self.show.say)[:total]
        if done:
            self.show.say(
                f"going on after round {len(done)} of {total} (found in {self.journal.folder})"
            )
        if len(done) < total and self.recipe.spec.trains:
            self.workers.prepare_training()
        while len(done) < total:
            number = len(done) + 1
            self.show.round_begins(number, total, self._scored(number))
            try:
                done.append(self._round(number, done, total))
            except Exception as error:
                where = f" in {self.journal.folder}" if self.journal.saved else ""
                finished = f"{len(done)} are finished{where}"
                error.add_note(f"stopped in round {number} of {total}; {finished}")
                if done and isinstance(error, FloatingPointError):
                    error.add_note("another recipe begins anew with --restart, which forgets them")
                raise
            self.journal.commit(number, done[-1])
            self.journal.let_go(done, wanted)
            written = sum(file.size for file in done[-1].files.values())
            self.show.round_ends(number, total, done[-1].record, written)
            self.journal.pause()
        return done

    def _scored(self, number: int) -> int:
        """How many blocks a round walks the model for; 0 where it walks it for none."""
        choice = self.recipe.spec.choice
        walks = choice == "each_round" or (choice in ("once", "run") and number == 1)
        return len(self.dense) - number + 1 if walks and not self.order else 0

    def _round(self, number: int, before: list[Done], total: int) -> Done:
        stack = before[-1].stack if before else self.dense
        score_seconds, ranking = 0.0, None
        method = METHODS[self.recipe.method]
        if self.order is None and method.choose:
            score_seconds, ranking = self._score(
                number,
                stack,
                Ranking.from_record(before[-1].record) if before else None,
                total - len(before),
            )
            self.show.say(f"  {ranking.in_words(self.recipe.chosen_by)}")
            told = {"lowest": ranking.lowest, **ranking.to_record(), "seconds": score_seconds}
            self.show.tell("scores", round=number, metric=self.recipe.chosen_by, **told)
        removes = ranking.lowest if ranking else self._next(before)
        assert removes is None or self.removable.allows([removes], stack.kept), removes
        origin = checksum({"rounds": [done.to_json() for done in before]})
        with self._explained(trained=True):
            change = method.change(
                Round(
                    number,
                    self.recipe,
                    self.workers,
                    stack,
                    self.dense,
                    removes,
                    total - len(before),
                    self.text.tokens_WT,
                    origin[:16],
                    self.journal.round_folder(number),
                    self.journal.checkpoints_folder(number),
                    self.journal.fence,
                    self.show,
                    self.journal.pause_training,
                    self.text.place_WT,
                )
            )
        record = _record(change, removes, ranking, score_seconds)
        if self.workers.streams:
            whole = stored_bytes(stack.blocks)
            scored = (ranking.bytes_read if ranking else 0) / whole
            walked = change.states_bytes_read / whole
            self.show.say(f"  weights read {scored:.3g} times to score, {walked:.3g} for states")
        if less := fewer_at_once(self.recipe, [record]):
            self.show.say(f"  memory ran out, so fewer windows at once: {less}")
        return Done(record, change.stack, change.files)

    def _next(self, before: Sequence[Done]) -> int | None:
        """The block that is known already to go; None where none goes."""
        if self.order is None:
            return None
        gone = [done.record["removed"] for done in before]
        assert gone == list(self.order[: len(gone)]), (gone, self.order)
        return self.order[len(gone)]

    def _score(
        self, number: int, stack: Stack, last: Ranking | None, left: int
    ) -> tuple[float, Ranking]:
        """Seconds and ranking; what a killed attempt noted of it is not measured again."""
        if noted := self.journal.kept("scores", number, self.show.say):
            return noted["seconds"], Ranking.from_record(noted["ranking"])
        sums = Sums(Sums.known_from(self.journal.kept("sums", number, self.show.say) or []))
        kept = began = time.monotonic()

        def keep() -> None:
            nonlocal kept
            spent = self.journal.budget and self.journal.budget.over
            if spent or time.monotonic() - kept >= KEEP_SECONDS:
                self.journal.keep("sums", number, sums.to_json())
                kept = time.monotonic()

        sums.changed = keep
        settings, seed = self.recipe.importance, self.recipe.seed
        windows = self.text.tokens_WT[: settings.windows]
        candidates = self.removable.among(stack.kept)
        asked = Question(self.workers, stack, windows, settings, seed, left, last, sums, candidates)

        choose = METHODS[self.recipe.method].choose
        assert choose is not None
        if self.recipe.spec.choice == "gates" and number == 1:
            self.show.stage(f"training the gates of {len(stack)} blocks")

        def measure() -> dict[str, Any]:
            try:
                with self._explained(trained=number > 1):
                    ranking = choose(asked)
            except KeyboardInterrupt:  # or SIGTERM
                if sums.known:
                    self.journal.keep("sums", number, sums.to_json())
                raise
            seconds = round(time.monotonic() - began, 3)
            return {"seconds": seconds, "ranking": ranking.to_record()}

        spec = METHOD_SPECS[self.recipe.method]
        if number == 1 and spec.by_metric:  # the methods that choose so find the same
            what = {
                **self.measuring,
                "choice": spec.choice,
                "importance": settings.model_dump(mode="json"),
                "candidates": candidates,
            }
            found = self.shared.measured("scores", what, measure, self.show.say)
        else:
            found = measure()
        self.journal.keep("scores", number, found)
        self.journal.forget("sums", number)
        return found["seconds"], Ranking.from_record(found["ranking"])

    def _explained(self, trained: bool) -> AbstractContextManager[None]:
        return explained(self.dense, self.recipe.model.source, self.workers.dtype, trained)


def _record(
    change: Change, removes: int | None, ranking: Ranking | None, score_seconds: float
) -> dict[str, Any]:
    """What journal and manifest tell of a round."""
    losses = list(change.losses)
    return {
        "removed": removes,
        **({"replaced": list(change.replaced)} if change.replaced else {}),
        **({"inserted": [*map(asdict, change.inserted)]} if change.inserted else {}),
        **({"width": dict(change.width)} if change.width else {}),
        **(ranking.to_record() if ranking else {}),
        "group": list(change.group),
        **({"repair": dict(change.repair)} if change.repair else {}),
        "states_batch_size": change.states_batch_size,
        "states_bytes_read": change.states_bytes_read,
        "micro_batch": change.micro_batch,
        "loss_first": losses[0] if losses else None,
        "loss_last": losses[-1] if losses else None,
        "losses": losses,
        "seconds": {
            "score": score_seconds,
            "states": round(change.states_seconds, 3),
            "finetune": round(change.train_seconds, 3),
        },
    }


def fewer_at_once(recipe: Recipe, rounds: Sequence[Mapping[str, Any]]) -> str:
    """Where rounds, given by their records, passed fewer windows at once than the recipe says: "1
    of 4 in scoring"; or nothing.
    """
    batch = recipe.importance.batch
    micro_batch = recipe.cluster.micro_batch or recipe.fusion.batch // recipe.cluster.workers
    asked = {
        "batch_size": (batch, "scoring"),
        "states_batch_size": (batch, "states"),
        "micro_batch": (micro_batch, "fine-tuning"),
    }
    found = []
    for key, (wanted, what) in asked.items():
        least = min((record[key] for record in rounds if record.get(key)), default=wanted)
        if least < wanted:
            found.append(f"{least} of {wanted} in {what}")
    return ", ".join(found)
