"""Sets of blocks that could be removed, found without training anything: by each metric greedily,
as the best run of consecutive blocks, or with none beside another.

Shapes: W windows, B windows of a batch, T tokens, D hidden size, N blocks, K blocks to remove.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import torch

from fusegpt_ray.importance.metrics import macro_influence
from fusegpt_ray.importance.ranking import Ranking, lowest
from fusegpt_ray.importance.scoring import score
from fusegpt_ray.model.memory import find_batch_size
from fusegpt_ray.model.removable import ANY, Removable
from fusegpt_ray.model.rows import as_rows, as_tensor
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.recipe.sections import Importance
from fusegpt_ray.recipe.specs import METRIC_SPECS, Counting
from fusegpt_ray.samples import Batch, counting, cut
from fusegpt_ray.workers.base import Workers

Removal = tuple[int, ...]
"""Dense numbers of blocks, in the order in which they go."""


def removal(
    way: str,
    workers: Workers,
    dense: Stack,
    windows: Batch,
    settings: Importance,
    count: int,
    removable: Removable = ANY,
) -> Removal | None:
    """So many blocks to remove that may go, or None where there is no such set.

    Args:
        way: one of `sections.Candidate`. A metric: the block of the lowest score goes, and the rest
            is scored again. `run`: the least of `run_distances`. `spaced`: as the recipe's metric,
            but no block beside one that went.

    Raises:
        FloatingPointError: a sum is not finite.
        MemoryError: not even a single window fits.
    """
    if way == "run":
        runs = [dense.kept[first : first + count] for first in range(len(dense) - count + 1)]
        able = [first for first, run in enumerate(runs) if removable.allows(run, dense.kept)]
        if not able:
            return None
        distances = run_distances(workers, dense, windows, settings, count)
        return runs[min(able, key=distances.__getitem__)]
    if way == "spaced":
        settings = settings.model_copy(update={"all": True, "racing": None})
        return _greedy(workers, dense, windows, settings, count, removable, _apart)
    assert way in METRIC_SPECS, way
    settings = settings.model_copy(update={"metric": way})
    return _greedy(workers, dense, windows, settings, count, removable, _any)


Choose = Callable[[Ranking, Sequence[int]], int | None]
"""The next block to remove, after those."""


def _any(ranking: Ranking, gone: Sequence[int]) -> int | None:
    return ranking.lowest


def _apart(ranking: Ranking, gone: Sequence[int]) -> int | None:
    near = {number + step for number in gone for step in (-1, 1)}
    free = {number: value for number, value in ranking.scores.items() if number not in near}
    return lowest(free) if free else None


def _greedy(
    workers: Workers,
    dense: Stack,
    windows: Batch,
    settings: Importance,
    count: int,
    removable: Removable,
    choose: Choose,
) -> Removal | None:
    stack, gone, last = dense, list[int](), None
    while len(gone) < count:
        candidates = removable.among(stack.kept)
        last = score(workers, stack, windows, settings, last, candidates=candidates)
        number = choose(last, gone)
        if number is None:
            return None
        gone.append(number)
        stack = stack.drop(number)
    return tuple(gone)


Distance = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""(states entering, states leaving [B, T, D], which tokens count) → of each window [B]."""


def run_distances(
    workers: Workers,
    dense: Stack,
    windows: Batch,
    settings: Importance,
    count: int,
    distance: Distance = macro_influence,
) -> np.ndarray:
    """How far states are apart that enter and leave each run of `count` consecutive blocks, summed
    over windows: [N − K + 1] float64, by the run's first position.

    Args:
        distance: defined at the top of a module. By default 1 − cos, summed over tokens: Block
            Influence of a run.

    Raises:
        FloatingPointError: a sum is not finite.
        MemoryError: not even a single window fits.
    """
    batches = cut(windows, range(settings.batch, len(windows), settings.batch))
    tasks = [(dense, batch, count, settings.tokens, distance) for batch in batches]

    def attempt(batch_size: int) -> np.ndarray:
        found = dict(workers.map(_distances, tasks, batch_size))
        return np.sum([found[number] for number in range(len(tasks))], axis=0)

    sums, _ = find_batch_size(attempt, settings.batch, settings.batch, "finding a run of blocks")
    if not np.isfinite(sums).all():
        raise FloatingPointError("the distance between two blocks' states is not finite")
    return sums


def _distances(
    runner: Runner, stack: Stack, windows: Batch, count: int, tokens: Counting, distance: Distance
) -> np.ndarray:
    """The task: see `run_distances`."""
    sums, states = list[float](), deque[torch.Tensor](maxlen=count + 1)
    counted_BT = as_tensor(counting(windows, tokens))
    for h_BTD in runner.walk(stack, as_rows(windows)):
        states.append(h_BTD.clone())  # the walk writes over it
        if len(states) > count:
            sums.append(distance(states[0], states[-1], counted_BT).sum().item())
    return np.array(sums)
