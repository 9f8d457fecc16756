"""Scoring a stack on workers: the search decides what to measure, model replicas measure it.

Shapes: W windows, T tokens, C candidates.

A task is one or several batches of windows, each with its candidates. A window's sums depend on its
batch alone, and what is measured does not depend on the number of replicas, so neither does the
result.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import numpy as np

from fusegpt_ray.errors import UserError
from fusegpt_ray.importance.metrics import METRICS
from fusegpt_ray.importance.ranking import Ranking
from fusegpt_ray.importance.search import Job, block_forwards, search
from fusegpt_ray.importance.sums import Sums
from fusegpt_ray.importance.sweep import Part, sweep
from fusegpt_ray.model.memory import find_batch_size
from fusegpt_ray.model.rows import as_rows, as_tensor
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.recipe.sections import Importance
from fusegpt_ray.samples import Batch, counting, cut, lengths
from fusegpt_ray.workers.base import Workers


def score(
    workers: Workers,
    stack: Stack,
    windows: Batch,
    settings: Importance,
    last: Ranking | None = None,
    sums: Sums | None = None,
    candidates: Collection[int] | None = None,
) -> Ranking:
    """Find the block to remove.

    Args:
        last: the last round's ranking, which saves a wave (see `search.py`).
        sums: what a killed attempt has measured. New measurements are added to it.
        candidates: dense numbers of the blocks that may go; None: all.

    Raises:
        FloatingPointError: a sum is not finite.
        MemoryError: not even a single window fits.
        UserError: none of the tokens counts.
    """
    batches = cut(windows, range(settings.batch, len(windows), settings.batch))
    sizes, depth = [len(batch) for batch in batches], len(stack)
    spec, known, bytes_read = settings.spec, sums or Sums(), 0
    dense = _dense_beside(workers, stack) if spec.against == "dense" else None
    beside = 0 if dense is None else len(dense)
    counted = lengths(windows, settings.tokens, spec.skipped, spec.predicts)
    if not sum(counted):
        problem = "the calibration has no such tokens"
        raise UserError("importance.tokens", settings.tokens, problem, "use all")

    def cost(job: Job) -> int:
        batch, positions = job
        return sizes[batch] * block_forwards(depth, positions, spec.walks_on, beside)

    def attempt(batch_size: int) -> Ranking:
        def measure(jobs: list[Job]) -> Iterator[tuple[Job, np.ndarray]]:
            nonlocal bytes_read
            # Replicas that read the weights for each walk should walk once. Others take the next
            # job when they have finished one, the longest first.
            parts = workers.replicas if workers.streams else len(jobs)
            groups = split_evenly(jobs, [cost(job) for job in jobs], parts)
            tasks = [
                (stack, [(batches[batch], c) for batch, c in group], settings, dense)
                for group in groups
            ]
            costs = [sum(map(cost, group)) for group in groups]
            for number, (found, read) in workers.map(sweep_batches, tasks, batch_size, costs):
                bytes_read += read
                yield from zip(groups[number], found, strict=True)

        ask = known.recalled(batch_size, measure)
        return search(ask, stack.kept, sizes, counted, settings, last, beside, candidates)

    ranking, batch_size = find_batch_size(attempt, settings.batch, settings.batch, "scoring")
    return replace(ranking, batch_size=batch_size, bytes_read=bytes_read)


def _dense_beside(workers: Workers, stack: Stack) -> Stack | None:
    """The dense model, unless the stack is just that."""
    dense = workers.setup.dense
    return None if stack.blocks == dense.blocks else dense


def split_evenly(jobs: Sequence[Job], costs: Sequence[int], parts: int) -> list[list[Job]]:
    """The jobs in at most so many groups of about the same cost, the costliest job first.

    Longest processing time first: each job, from the costliest on, goes to the cheapest group.
    """
    groups: list[list[Job]] = [[] for _ in range(min(parts, len(jobs)))]
    loads = [(0, number) for number in range(len(groups))]
    for job in sorted(range(len(jobs)), key=lambda job: -costs[job]):
        load, number = loads[0]
        groups[number].append(jobs[job])
        heapq.heapreplace(loads, (load + costs[job], number))
    return groups


def sweep_batches(
    runner: Runner,
    stack: Stack,
    parts: Sequence[tuple[Batch, tuple[int, ...]]],
    settings: Importance,
    dense: Stack | None,
) -> tuple[list[np.ndarray], int]:
    """The task: for each batch of windows and its candidates, the metric's sums, [W, C] float64;
    and the bytes of blocks that were read for them.
    """
    before = runner.weights.bytes_read
    which = settings.tokens, settings.spec.predicts
    tensors = [Part(as_rows(w), c, as_tensor(counting(w, *which))) for w, c in parts]
    walked = sweep(runner, stack, tensors, METRICS[settings.metric], dense)
    return [sums_WC.numpy() for sums_WC in walked], runner.weights.bytes_read - before
