"""Finds the block of the lowest score without walking every candidate over every window. No torch:
numbers only.

No token counts below 0 in any metric, so a candidate's sum over some windows is a lower bound of
its sum over all: once it passes the complete sum of another candidate, it cannot be the lowest, and
is stopped. The block found is that of the full table, always, ties included. Where a candidate
costs nothing beside the full model (a metric that compares at the block itself), the full table is
what is measured.

Every candidate is walked over the windows in order, a batch at a time; what is chosen is how far it
goes in each wave:

- **Look.** All candidates walk the first batch. Where the last round's scores are known, they stand
  in for it: one wave less.
- **Plan.** The leader (lowest mean so far) goes to the end, and every other candidate just as far
  as it should need to be stopped: a candidate twice as high as the leader, over half of the
  windows. All go in one walk, so that the full model, which every candidate is compared with, is
  walked once for all of them. Finishing the leader alone first would walk it twice.
- **Again.** Candidates that the plan did not stop go as far as they should need now. Those that
  are left after that go to the **end**.

So scoring takes at most four waves, each of which reads the weights once, and at most 2 N
block-forwards a window more than the full table in a single walk: each candidate meets each window
once, the full model at most three times. (Where a metric compares with the dense model, that is
read and walked beside the full one.) Waves are the same on any number of replicas, and so are all
results. The price is the first look, in the first round only, whose single batch keeps one replica
busy.

**Racing** (`importance.racing`, a probability) comes before the plan: all candidates walk 1, 2, 4,
… batches, and after each such look those that a paired test finds above the leader are given up. It
ends as soon as one candidate is left; else the plan takes over for the last half of the windows. A
test's level is the stated probability ÷ (N − 1) leaders ÷ looks: by Bonferroni, the full table's
choice is given up with at most that probability, as far as the test's assumptions hold (see
`racing.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import accumulate

import numpy as np

from fusegpt_ray.importance.racing import surely_above
from fusegpt_ray.importance.ranking import Cost, Ranking, Stopped
from fusegpt_ray.recipe.sections import Importance

Job = tuple[int, tuple[int, ...]]
"""A batch of windows, by number, and the positions of the candidates to walk it."""
Measure = Callable[[list[Job]], list[np.ndarray]]
"""The metric summed over tokens, float64 [windows of the batch, candidates], for each job."""


def block_forwards(
    depth: int, positions: Sequence[int], walks_on: bool = True, beside: int = 0
) -> int:
    """What these candidates cost a window, the full model's walk included.

    Args:
        walks_on: see `MetricSpec`.
        beside: the depth of another model that is walked as well.
    """
    return beside + depth + walks_on * sum(depth - 1 - position for position in positions)


def search(
    measure: Measure,
    kept: Sequence[int],
    batches: Sequence[int],
    lengths: Sequence[int],
    settings: Importance,
    last: Ranking | None = None,
    beside: int = 0,
    candidates: Collection[int] | None = None,
) -> Ranking:
    """Rank the blocks `kept` (dense numbers, in order) on batches of so many windows.

    Args:
        lengths: of each window, how many of its tokens count.
        beside: see `block_forwards`.
        candidates: those of the blocks that may go; None: all.

    Raises:
        FloatingPointError: a sum is not finite.
    """
    walks_on = settings.spec.walks_on
    found = _Found(measure, kept, batches, lengths, walks_on, beside)
    if candidates is not None:
        found.candidates = [p for p, dense in enumerate(kept) if dense in candidates]
        found.alive = [*found.candidates]
    among = {kept[position] for position in found.candidates}
    everything = dict.fromkeys(found.alive, len(batches))
    if settings.all or not walks_on:
        found.walk(everything)
        return found.ranking()
    if settings.racing is None and last is not None and last.estimates.keys() >= among:
        means = {p: last.estimates[kept[p]] for p in found.candidates}
    else:
        found.walk(dict.fromkeys(found.alive, 1))
        if settings.racing is not None:
            _race(found, settings.racing)
            if len(found.alive) == 1:
                return found.ranking()
        means = found.means
    found.walk(_goals(found, means))
    found.stop()
    found.walk(_goals(found, found.means))
    found.stop()
    found.walk(everything)
    found.stop()
    return found.ranking()


def _race(found: _Found, error: float) -> None:
    """Look after 1, 2, 4, … batches, but not after the last one, and give up the candidates that
    are surely above the leader.
    """
    looks = [2**i for i in range((len(found.batches) - 1).bit_length())]
    for batches in looks:
        found.walk(dict.fromkeys(found.alive, batches))
        leader = min(found.alive, key=found.mean)
        for position in set(found.alive) - {leader}:
            if surely_above(
                found.sums[position],
                found.sums[leader],
                found.windows,
                error / (len(found.candidates) - 1) / len(looks),
            ):
                found.alive.remove(position)
        if len(found.alive) == 1:
            return


def _goals(found: _Found, means: Mapping[int, float]) -> dict[int, int]:
    """How many batches each candidate should have walked in all, to be complete (the leader) or to
    be stopped.

    `means`: of every candidate by position, as far as known.
    """
    aim = min(means[position] for position in found.alive)
    goals = {}
    for position in found.alive:
        # After n of N batches a candidate is at about n / N of its mean; it is stopped when that is
        # above the aim.
        share = aim / means[position] if means[position] > aim else 1.0
        goals[position] = math.floor(len(found.batches) * share) + 1
    return goals


class _Found:
    """What is known so far. Candidates are named by their positions."""

    def __init__(
        self,
        measure: Measure,
        kept: Sequence[int],
        batches: Sequence[int],
        lengths: Sequence[int],
        walks_on: bool,
        beside: int,
    ) -> None:
        self.measure, self.kept, self.batches = measure, kept, batches
        self.windows = sum(batches)
        self.tokens = [0, *accumulate(lengths)]
        """That count in the first so many windows."""
        self._walks_on, self._beside = walks_on, beside
        self.sums: list[list[float]] = [[] for _ in kept]
        """Of each candidate, the sums of the windows it has walked: always the first ones."""
        self.candidates = list(range(len(kept)))
        self.alive = [*self.candidates]
        self.batches_done = [0] * len(kept)
        self._cost = 0

    def walk(self, goals: Mapping[int, int]) -> None:
        """Take each candidate that is not stopped to so many batches in all, in one wave (or none,
        if all are there).
        """
        jobs: list[Job] = []
        for batch, windows in enumerate(self.batches):
            positions = tuple(p for p in self.alive if self.batches_done[p] <= batch < goals[p])
            if positions:
                jobs.append((batch, positions))
                self._cost += windows * self._forwards(positions)
        for (_, positions), sums_WC in zip(jobs, self.measure(jobs) if jobs else [], strict=True):
            self._check(positions, sums_WC)
            for position, sums_W in zip(positions, sums_WC.T, strict=True):
                self.sums[position] += sums_W.tolist()
                self.batches_done[position] += 1

    def _forwards(self, positions: Sequence[int]) -> int:
        return block_forwards(len(self.kept), positions, self._walks_on, self._beside)

    def stop(self) -> None:
        """Stop the candidates that can no longer be the lowest."""
        complete = [self.at_least(position) for position in self.alive if self.complete(position)]
        if complete:
            self.alive = [
                position for position in self.alive if self.at_least(position) <= min(complete)
            ]

    def complete(self, position: int) -> bool:
        return len(self.sums[position]) == self.windows

    def at_least(self, position: int) -> float:
        """The score if it were 0 on the windows still to walk. It is rounded like the
        complete sum, so it is never above it.
        """
        return math.fsum(self.sums[position]) / self.tokens[-1]

    def mean(self, position: int) -> float:
        """Of the tokens met; 0 as long as none of them counts."""
        sums = self.sums[position]
        return math.fsum(sums) / max(1, self.tokens[len(sums)])

    @property
    def means(self) -> dict[int, float]:
        return {position: self.mean(position) for position in self.candidates}

    def ranking(self) -> Ranking:
        (windows,) = {len(self.sums[position]) for position in self.alive}
        known = [p for p in self.candidates if p in self.alive or self.complete(p)]
        scores = {self.kept[p]: self.mean(p) for p in known}
        others = [p for p in self.candidates if p not in known]
        stopped = {
            self.kept[p]: Stopped(self.at_least(p), self.mean(p), len(self.sums[p])) for p in others
        }
        depth = len(self.kept)
        passes = len(self.candidates) if self._walks_on else 1
        cost = Cost(
            self._cost,
            self.windows * self._forwards(self.candidates),
            self.windows * (self._beside + depth * passes),
        )
        return Ranking(scores, stopped, windows, cost)

    def _check(self, positions: Sequence[int], sums_WC: np.ndarray) -> None:
        if bad := [
            p
            for p, fine in zip(positions, np.isfinite(sums_WC).all(axis=0), strict=True)
            if not fine
        ]:
            reason = "NaN or Inf in the model's weights, or an overflow in its arithmetic"
            which = f"{len(bad)} of {len(self.kept)} blocks, such as block {self.kept[bad[0]]}"
            raise FloatingPointError(f"the scores of {which}, are nan: {reason}")
