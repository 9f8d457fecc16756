"""A tournament of sets of blocks to remove: each is dropped, what is left is healed for a while on
a replica, several side by side, and the lowest held-out loss wins.

Shapes: W windows, T tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fusegpt_ray.errors import UserError
from fusegpt_ray.healing.sharing import Sharing
from fusegpt_ray.healing.trial import trial
from fusegpt_ray.healing.whole_model import WholeModel
from fusegpt_ray.importance.removals import Removal, removal
from fusegpt_ray.model.finite import explained
from fusegpt_ray.model.memory import find_batch_size
from fusegpt_ray.model.removable import ANY, Removable
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.run.journal import Journal
from fusegpt_ray.samples import Batch, tokens_of
from fusegpt_ray.terminal.display import Display
from fusegpt_ray.workers.base import Workers


@dataclass
class Entrant:
    """One set of blocks."""

    ways: list[str]
    """That lead to it, of `search.candidates`."""
    removed: Removal
    held_out: list[float] | None = None
    """Loss before and after its healing, once that is done; empty if it diverged."""
    micro_batch: int | None = None
    """Windows that passed its blocks at once."""

    def in_words(self) -> str:
        assert self.held_out is not None
        came = "its healing diverged"
        if self.held_out:
            came = f"held-out loss {self.held_out[0]:.4g} → {self.held_out[-1]:.4g}"
        blocks = ", ".join(map(str, self.removed))
        return f"{' = '.join(self.ways)}: blocks {blocks}; {came}"


@dataclass
class Tournament:
    """The tournament of one run."""

    recipe: Recipe
    workers: Workers
    journal: Journal
    dense: Stack
    windows: Batch
    """Of the calibration text, to find the sets with."""
    healed: Batch
    held_out: Batch
    """See `heal.Healer`."""
    show: Display
    removable: Removable = ANY
    sharing: Sharing = field(default_factory=Sharing)
    """Of the blocks of what is healed."""
    looked: list[str] = field(default_factory=list)
    """The ways by which a set was looked for already."""
    _before: float = field(default=0.0, init=False)
    """Seconds that attempts took which were stopped, as far as they were noted."""
    _began: float = field(default=0.0, init=False)

    def removal(self, count: int) -> tuple[Removal, dict[str, Any]]:
        """So many blocks in the order in which to remove them; and what the manifest tells. What
        the journal has is not tried again.

        Raises:
            FloatingPointError: a sum is not finite, or every healing diverged.
            MemoryError: not even a single window fits.
            UserError: no way leads to a set.
        """
        noted = self.journal.kept("search", 0, self.show.say) or {"looked": [], "entrants": []}
        self._before, self._began = noted.get("seconds", 0.0), time.monotonic()
        noted_sets = [
            Entrant(**{**item, "removed": tuple(item["removed"])}) for item in noted["entrants"]
        ]
        # An earlier version may have noted sets that may not go.
        may_go = partial(self.removable.allows, kept=self.dense.kept)
        entrants = [entrant for entrant in noted_sets if may_go(entrant.removed)]
        refused = {way for one in noted_sets if one not in entrants for way in one.ways}
        self.looked = [way for way in noted["looked"] if way not in refused]
        with explained(self.dense, self.recipe.model.source, self.workers.dtype, trained=True):
            self._find(entrants, count)
            if not entrants:
                ways = list(self.recipe.search.candidates) if self.recipe.search else []
                problem = f"none of these ways finds {count} blocks that may go"
                raise UserError("search.candidates", ways, problem, "add a metric, such as mi")
            self._try(entrants)
            if all(entrant.held_out == [] for entrant in entrants):
                raise FloatingPointError("the healing of every set of blocks diverged")
        best = min(entrants, key=_loss)
        self.show.say(f"  chosen: {' = '.join(best.ways)}")
        record = {
            "tokens": tokens_of(self._trial).size,
            "tried": [vars(entrant).copy() for entrant in entrants],
            "seconds": self._seconds,
        }
        return best.removed, record

    @property
    def _trial(self) -> Batch:
        return self.healed[: self.recipe.trial_windows]

    def _find(self, found: list[Entrant], count: int) -> None:
        """Add the sets that are not yet looked for, the ways that lead to the same one together.
        Each is noted as soon as it is found.
        """
        recipe = self.recipe
        assert recipe.search
        windows = self.windows[: recipe.importance.windows]
        for way in recipe.search.candidates:
            if way in self.looked:
                continue
            self.show.stage(f"search: {count} blocks by {way}")
            removed = removal(
                way, self.workers, self.dense, windows, recipe.importance, count, self.removable
            )
            self.looked.append(way)
            if removed is None:
                what = f"no {count} of {len(self.dense)} blocks that may go are {way}"
                self.show.say(f"  {what}: left out")
            elif same := [one for one in found if set(one.removed) == set(removed)]:
                same[0].ways.append(way)
            else:
                found.append(Entrant([way], removed))
            self._keep(found)

    def _try(self, entrants: Sequence[Entrant]) -> None:
        """Heal those that are not yet healed; each is noted as soon as it is."""
        heal, cluster = self.recipe.heal, self.recipe.cluster
        assert heal is not None
        once = heal.model_copy(update={"looks": 1})
        total = len(entrants)
        self.show.stage(
            f"search: healing {total} models on {tokens_of(self._trial).size:,} tokens each", total
        )

        def attempt(micro_batch: int) -> None:
            left = [entrant for entrant in entrants if entrant.micro_batch != micro_batch]
            tasks = [
                (
                    WholeModel(
                        self.sharing.of(self.dense.drop(*entrant.removed)),
                        self.dense,
                        once,
                        self.recipe.seed,
                        self.journal.folder,  # nothing is written there
                    ),
                    self._trial,
                    self.held_out,
                    cluster,
                )
                for entrant in left
            ]
            costs = [math.inf] * len(tasks)
            for number, held_out in self.workers.map(trial, tasks, micro_batch, costs):
                left[number].held_out, left[number].micro_batch = held_out, micro_batch
                self._keep(entrants)
                self.show.say(f"  {left[number].in_words()}")
                self.show.tell("trial", **vars(left[number]))

        asked = cluster.micro_batch or heal.batch
        before = [entrant.micro_batch for entrant in entrants if entrant.micro_batch]
        find_batch_size(attempt, min([asked, *before]), heal.batch, "a trial of search")

    def _keep(self, entrants: Sequence[Entrant]) -> None:
        noted = {"looked": self.looked, "entrants": [vars(entrant) for entrant in entrants]}
        self.journal.keep("search", 0, noted | {"seconds": self._seconds})

    @property
    def _seconds(self) -> float:
        """Until now."""
        return round(self._before + time.monotonic() - self._began, 3)


def _loss(entrant: Entrant) -> float:
    assert entrant.held_out is not None
    return min(entrant.held_out, default=math.inf)
