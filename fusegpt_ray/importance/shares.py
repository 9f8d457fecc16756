"""How scoring is cut into shares for replicas. Numbers only: the simulator in `benchmarks/` uses the same functions.

It is cut at whole batches of windows first. Only where these would leave replicas with less to do than others are the candidates
of a batch split as well, because every further part walks the full model again: N block-forwards more for each of its windows.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from fusegpt_ray.importance.search import Job, block_forwards


def cost(job: Job, batches: Sequence[int], depth: int) -> int:
    """Block-forwards of a job, or of a part of one, in a model of so many blocks; `batches`: windows of each."""
    batch, positions = job
    return batches[batch] * block_forwards(depth, positions)


def balance(costs: Sequence[int], replicas: int) -> list[list[int]]:
    """The numbers of jobs for each replica that gets some, of about the same cost: the dearest first, each to who has least."""
    shares: list[list[int]] = [[] for _ in range(replicas)]
    loads = [(0, replica) for replica in range(replicas)]
    for job in sorted(range(len(costs)), key=lambda job: -costs[job]):
        load, replica = loads[0]
        shares[replica].append(job)
        heapq.heapreplace(loads, (load + costs[job], replica))
    return [share for share in shares if share]


def cut(jobs: Sequence[Job], batches: Sequence[int], depth: int, replicas: int) -> list[list[Job]]:
    """The jobs of a wave for each replica that gets some: whole ones, or parts of them wherever that shortens the longest share.

    The parts of a job are jobs of the same batch, each with some of its candidates.
    """
    costs = [cost(job, batches, depth) for job in jobs]
    best = [[jobs[number] for number in share] for share in balance(costs, replicas)]
    # The shortest longest share is searched for between an even split, were cutting free, and whole jobs.
    low, high = math.ceil(sum(costs) / replicas), _longest(best, batches, depth) - 1
    while low <= high:
        limit = (low + high) // 2
        shares = _fill(jobs, batches, depth, replicas, limit)
        if shares is None:
            low = limit + 1
        else:
            best, high = shares, _longest(shares, batches, depth) - 1
    return best


def in_turn(shares: Iterable[Sequence[Job]], batches: Sequence[int], depth: int) -> list[Job]:
    """All parts, for replicas that take the next one whenever they are done with one.

    They are in the order in which they would begin, had each replica its own share: so replicas of the same speed take just as long
    as the longest share, and a slow one takes less.
    """
    begins: list[tuple[int, Job]] = []
    for share in shares:
        done = 0
        for part in sorted(share, key=lambda part: -cost(part, batches, depth)):
            begins.append((done, part))
            done += cost(part, batches, depth)
    return [part for _, part in sorted(begins, key=lambda item: item[0])]


def joined(
    jobs: Iterable[Job], parts: Iterable[tuple[Job, np.ndarray]]
) -> Iterator[tuple[Job, np.ndarray]]:
    """The jobs with their sums [windows, candidates], each as soon as the last of its parts has come. `jobs`: one a batch."""
    wanted = dict(jobs)
    columns: dict[int, dict[int, np.ndarray]] = defaultdict(dict)
    for (batch, positions), sums_WC in parts:
        columns[batch] |= zip(positions, sums_WC.T, strict=True)
        if len(columns[batch]) == len(wanted[batch]):
            found = columns.pop(batch)
            yield (
                (batch, wanted[batch]),
                np.stack([found[position] for position in wanted[batch]], axis=1),
            )


def _fill(
    jobs: Sequence[Job], batches: Sequence[int], depth: int, replicas: int, limit: int
) -> list[list[Job]] | None:
    """Shares of at most `limit` each, one filled after the other: what of a job does not fit goes to the next one. None: too many."""
    shares: list[list[Job]] = [[]]
    room = limit
    for batch, positions in sorted(jobs, key=lambda job: -cost(job, batches, depth)):
        left = sorted(positions)  # the dearest first
        while left:
            part = _first_that_fit(left, depth, room // batches[batch] - depth)
            if part:
                shares[-1].append((batch, tuple(part)))
                room -= cost((batch, tuple(part)), batches, depth)
                left = [position for position in left if position not in set(part)]
            elif not shares[-1] or len(shares) == replicas:
                return None
            else:
                shares.append([])
                room = limit
    return shares


def _first_that_fit(positions: Sequence[int], depth: int, room: int) -> list[int]:
    """Candidates that take at most `room` block-forwards a window, the dear ones first; none if that saves the others nothing."""
    part, taken = [], 0
    for position in positions:
        own = depth - 1 - position
        if taken + own <= room:
            part.append(position)
            taken += own
    return part if taken or len(part) == len(positions) else []


def _longest(shares: Iterable[Iterable[Job]], batches: Sequence[int], depth: int) -> int:
    return max(sum(cost(part, batches, depth) for part in share) for share in shares)
