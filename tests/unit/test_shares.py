"""How work is cut for replicas: nothing is lost or done twice, and the longest share gets as short as cutting can make it."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusegpt_ray.importance.search import Job, search
from fusegpt_ray.importance.shares import balance, cost, cut, in_turn, joined
from fusegpt_ray.sections import Importance


@st.composite
def waves(draw: st.DrawFn) -> tuple[list[Job], list[int], int]:
    """Jobs, windows of each batch, depth."""
    depth, count, size = draw(st.integers(1, 12)), draw(st.integers(1, 6)), draw(st.integers(1, 4))
    batches = [size] * (count - 1) + [draw(st.integers(1, size))]
    candidates = st.lists(st.integers(0, depth - 1), min_size=1, unique=True).map(
        lambda found: tuple(sorted(found))
    )
    return (
        [
            (batch, draw(candidates))
            for batch in draw(st.sets(st.integers(0, count - 1), min_size=1))
        ],
        batches,
        depth,
    )


def everything(batches: int, depth: int) -> list[Job]:
    return [(batch, tuple(range(depth))) for batch in range(batches)]


def loads(shares: list[list[Job]], batches: list[int], depth: int) -> list[int]:
    return [sum(cost(part, batches, depth) for part in share) for share in shares]


def taking_turns(parts: list[Job], batches: list[int], depth: int, replicas: int) -> int:
    """When the last of so many equal replicas is done, each taking the next part when it is free."""
    free = [0] * replicas
    for part in parts:
        free[free.index(min(free))] += cost(part, batches, depth)
    return max(free)


@settings(max_examples=300, deadline=None)
@given(waves(), st.integers(1, 40))
def test_shares_are_the_jobs(wave: tuple[list[Job], list[int], int], replicas: int) -> None:
    jobs, batches, depth = wave
    shares = cut(jobs, batches, depth, replicas)
    assert len(shares) <= replicas
    assert all(shares)
    parts = [part for share in shares for part in share]
    assert sorted((batch, p) for batch, own in parts for p in own) == sorted(
        (batch, p) for batch, own in jobs for p in own
    )
    assert all(own for _, own in parts)
    whole = [cost(job, batches, depth) for job in jobs]
    uncut = max(sum(whole[n] for n in share) for share in balance(whole, replicas))
    longest = max(loads(shares, batches, depth))
    assert math.ceil(sum(whole) / replicas) <= longest <= uncut
    if len(parts) > len(jobs):
        assert longest < uncut, "nothing is cut in vain"
    assert taking_turns(in_turn(shares, batches, depth), batches, depth, replicas) == longest
    assert sorted(in_turn(shares, batches, depth)) == sorted(parts)


@settings(max_examples=100, deadline=None)
@given(waves(), st.integers(1, 20), st.randoms())
def test_parts_join_to_the_sums_of_their_jobs(
    wave: tuple[list[Job], list[int], int], replicas: int, random
) -> None:
    jobs, batches, depth = wave
    tables = [
        np.random.default_rng(batch).random((windows, depth))
        for batch, windows in enumerate(batches)
    ]
    parts = [part for share in cut(jobs, batches, depth, replicas) for part in share]
    random.shuffle(parts)
    found = dict(joined(jobs, ((part, tables[part[0]][:, list(part[1])]) for part in parts)))
    assert found.keys() == set(jobs)
    assert all(
        np.array_equal(sums, tables[batch][:, list(positions)])
        for (batch, positions), sums in found.items()
    )


def test_a_job_comes_when_the_last_of_its_parts_has() -> None:
    jobs: list[Job] = [(0, (0, 1)), (1, (0, 1))]
    seen: list[str] = []

    def parts():
        for part in [(0, (1,)), (1, (0, 1)), (0, (0,))]:
            seen.append(f"part of {part[0]}")
            yield part, np.array([[10.0 * part[0] + position for position in part[1]]])

    for (batch, _), sums in joined(jobs, parts()):
        seen.append(f"job {batch}")
        assert sums.tolist() == [[10.0 * batch, 10.0 * batch + 1]]
    assert seen == ["part of 0", "part of 1", "job 1", "part of 0", "job 0"]


@pytest.mark.parametrize("replicas", [1, 2, 4, 8])
def test_windows_come_first(replicas: int) -> None:
    """Where batches divide evenly, no candidates are split: it would only walk the full model again."""
    jobs = everything(8, 32)
    assert sorted(part for share in cut(jobs, [4] * 8, 32, replicas) for part in share) == jobs


def test_candidates_come_second() -> None:
    """Eight batches of 4 windows on 32 blocks: 528 block-forwards a window, 32 of them the full model's walk."""
    jobs, batches = everything(8, 32), [4] * 8
    longest = {
        replicas: max(loads(cut(jobs, batches, 32, replicas), batches, 32)) // 4
        for replicas in (8, 12, 16, 32, 64, 128, 256)
    }
    assert longest[8] == 528
    assert longest[12] <= 1.02 * (8 * 528 + 11 * 32) / 12  # every replica but one ends within a job
    assert longest[16] == 32 + 496 / 2
    assert longest[32] == 32 + 496 / 4
    assert longest[256] == 32 + 31, (
        "the walk of the first candidate, beside the full model, is the end of it"
    )
    assert all(longest[few] >= longest[more] for few, more in pairwise(longest))


def test_a_single_batch_is_for_all_replicas() -> None:
    """The first look of a run."""
    shares = cut([(0, tuple(range(16)))], [4], 16, 4)
    assert len(shares) == 4
    assert max(loads(shares, [4], 16)) == 4 * (16 + 120 / 4)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(0, 1000))
def test_a_search_on_parts_finds_the_same(replicas: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    table_WN = (1 + generator.random(9)) * generator.gamma(20, 1 / 20, (14, 9))
    tables = np.split(table_WN, range(4, 14, 4))
    batches = list(map(len, tables))

    def measure(jobs: list[Job]) -> list[np.ndarray]:
        parts = in_turn(cut(jobs, batches, 9, replicas), batches, 9)
        found = dict(joined(jobs, ((part, tables[part[0]][:, list(part[1])]) for part in parts)))
        return [found[job] for job in jobs]

    def whole(jobs: list[Job]) -> list[np.ndarray]:
        return [tables[batch][:, list(positions)] for batch, positions in jobs]

    assert search(measure, range(9), batches, 7, Importance()) == search(
        whole, range(9), batches, 7, Importance()
    )
