"""Scoring on workers: however its jobs are divided into tasks, and whatever is known before, the
ranking is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backwards import Backwards
from hypothesis import given
from hypothesis import strategies as st
from models import DEPTH, token_windows

from fusegpt_ray.importance.ranking import Ranking
from fusegpt_ray.importance.scoring import score, split_evenly
from fusegpt_ray.importance.search import Job
from fusegpt_ray.importance.sums import Sums
from fusegpt_ray.model.source import Source
from fusegpt_ray.recipe.sections import Importance
from fusegpt_ray.workers.base import Setup
from fusegpt_ray.workers.local import LocalWorkers

WINDOWS_WT = token_windows(7, 9).numpy()
SETTINGS = Importance(windows=7, batch=2)
"""Four batches, the last of which has a single window."""
FULL = SETTINGS.model_copy(update={"all": True})


class SeveralReplicas(Backwards):
    """Divides and orders tasks as several replicas would, and computes them in this process."""

    def __init__(self, setup: Setup, replicas: int, streams: bool) -> None:
        super().__init__(setup)
        self.replicas = replicas
        self._streams = streams
        self.tasks: list[int] = []
        """How many there were in each wave."""
        self.costs: list[list[float]] = []

    @property
    def streams(self) -> bool:
        return self._streams

    def map(
        self,
        function: Callable[..., Any],
        tasks: Sequence[tuple[Any, ...]],
        batch_size: int,
        costs: Sequence[float] | None = None,
    ) -> Iterator[tuple[int, Any]]:
        assert costs is not None and len(costs) == len(tasks)
        self.tasks.append(len(tasks))
        self.costs.append(list(costs))
        yield from super().map(function, tasks, batch_size, costs)


@pytest.fixture
def workers(checkpoint: Callable[[str], Path]) -> Callable[..., SeveralReplicas]:
    def make(replicas: int = 1, streams: bool = False) -> SeveralReplicas:
        source = Source.find(str(checkpoint("llama")), None)
        setup = Setup(source, source.stack(), importance=SETTINGS)
        return SeveralReplicas(setup, replicas, streams)

    return make


def scored(workers: LocalWorkers, settings: Importance = SETTINGS, **known: Any) -> Ranking:
    return score(workers, workers.setup.dense, WINDOWS_WT, settings, **known)


@pytest.mark.parametrize("replicas", [1, 2, 3, 9])
@pytest.mark.parametrize(
    "settings",
    [SETTINGS, FULL, *(SETTINGS.model_copy(update={"metric": m}) for m in ("kl", "loss", "bi"))],
    ids=["exact", "all", "kl", "loss", "bi"],
)
def test_the_number_of_replicas_changes_no_bit(
    workers: Callable[..., SeveralReplicas], replicas: int, settings: Importance
) -> None:
    several, one = workers(replicas, streams=True), workers()
    assert scored(several, settings) == scored(one, settings)
    later = one.setup.dense.drop(1)
    assert score(several, later, WINDOWS_WT, settings) == score(one, later, WINDOWS_WT, settings)


def test_replicas_that_stream_get_one_task_a_wave_and_others_one_a_batch(
    workers: Callable[..., SeveralReplicas],
) -> None:
    streaming, resident = workers(2, streams=True), workers(2)
    scored(streaming, FULL)
    scored(resident, FULL)
    assert streaming.tasks == [2]
    assert resident.tasks == [4]
    assert resident.costs[0] == sorted(resident.costs[0], reverse=True), "the costliest comes first"
    for costs in (*streaming.costs, *resident.costs):
        assert sum(costs) == len(WINDOWS_WT) * DEPTH * (DEPTH + 1) / 2


def test_the_block_found_is_that_of_the_full_table(
    workers: Callable[..., SeveralReplicas],
) -> None:
    full, exact = scored(workers(), FULL), scored(workers())
    assert full.lowest == exact.lowest == min(full.scores, key=full.scores.__getitem__)
    assert exact.scores.items() <= full.scores.items()
    assert exact.batch_size == full.batch_size == SETTINGS.batch


def test_what_is_known_is_not_measured_again(workers: Callable[..., SeveralReplicas]) -> None:
    sums, first = Sums(), workers(2, streams=True)
    ranking = scored(first, sums=sums)
    assert first.tasks
    again = workers()
    assert scored(again, sums=Sums(dict(sums.known))) == ranking
    assert again.tasks == []


def test_the_last_ranking_saves_the_first_look(workers: Callable[..., SeveralReplicas]) -> None:
    first, second = workers(), workers()
    ranking = scored(first)
    again = scored(second, last=ranking)
    assert again.lowest == ranking.lowest
    assert again.scores[again.lowest] == ranking.scores[ranking.lowest]
    assert len(second.tasks) < len(first.tasks)


def test_fewer_windows_at_once_when_memory_runs_out(
    workers: Callable[..., SeveralReplicas], monkeypatch: pytest.MonkeyPatch
) -> None:
    short = workers()
    whole = short.map

    def map_(function: Any, tasks: Any, batch_size: int, costs: Any = None) -> Any:
        if batch_size > 1:
            raise MemoryError("out of memory")
        return whole(function, tasks, batch_size, costs)

    monkeypatch.setattr(short, "map", map_)
    sums = Sums()
    ranking = scored(short, FULL, sums=sums)
    assert ranking.batch_size == 1
    assert {batch_size for batch_size, *_ in sums.known} == {1}
    full = scored(workers(), FULL)
    assert ranking.scores == pytest.approx(full.scores, rel=1e-5)


def job(number: int) -> Job:
    return number, (number,)


@given(st.lists(st.integers(0, 50), max_size=12), st.integers(1, 6))
def test_groups_hold_every_job_once_and_are_about_equal(costs: list[int], parts: int) -> None:
    jobs = [job(number) for number in range(len(costs))]
    groups = split_evenly(jobs, costs, parts)
    assert sorted(job for group in groups for job in group) == jobs
    assert len(groups) == min(parts, len(jobs))
    loads = [sum(costs[number] for number, _ in group) for group in groups]
    if loads:
        # Graham's bound of a greedy division: no group is further above the others than one job.
        assert max(loads) - min(loads) <= max(costs)


def test_the_costliest_jobs_are_kept_apart() -> None:
    jobs = [job(number) for number in range(5)]
    assert split_evenly(jobs, [1, 9, 2, 8, 3], 2) == [[job(1), job(2), job(0)], [job(3), job(4)]]
    assert split_evenly(jobs, [5] * 5, 9) == [[job(number)] for number in range(5)]
    assert split_evenly([], [], 3) == []


def test_a_sum_that_is_not_finite_is_refused(
    workers: Callable[..., SeveralReplicas], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = workers()
    whole = broken.map

    def map_(*arguments: Any) -> Iterator[tuple[int, tuple[list[np.ndarray], int]]]:
        for number, (found, read) in whole(*arguments):
            yield number, ([sums_WC * np.nan for sums_WC in found], read)

    monkeypatch.setattr(broken, "map", map_)
    with pytest.raises(FloatingPointError, match="5 of 5 blocks"):
        scored(broken)
