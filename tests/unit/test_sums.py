"""Scoring that is killed goes on with the sums that it had measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from desk import Desk
from stopped_runs import Watching, published, recipe, run_folder

from fusegpt_ray.compressing import rounds
from fusegpt_ray.importance import scoring
from fusegpt_ray.importance.search import Job
from fusegpt_ray.importance.sums import Sums
from fusegpt_ray.importance.sweep import Part, sweep
from fusegpt_ray.pipeline import compress


def measured(asked: list[Job]) -> Callable[[list[Job]], Iterator[tuple[Job, np.ndarray]]]:
    """Something to measure with, the last job first; `asked` hears of every job."""

    def measure(jobs: list[Job]) -> Iterator[tuple[Job, np.ndarray]]:
        for job in reversed(jobs):
            asked.append(job)
            yield job, np.array([[job[0] + position / 3 for position in job[1]]])

    return measure


def test_what_is_known_is_not_asked_again_and_comes_in_order() -> None:
    asked: list[Job] = []
    sums = Sums()
    first = sums.recalled(4, measured(asked))([(0, (1, 2)), (1, (1,))])
    assert asked == [(1, (1,)), (0, (1, 2))]
    again = sums.recalled(4, measured(asked))([(1, (1,)), (2, (0,)), (0, (1, 2))])
    assert asked[2:] == [(2, (0,))]
    assert np.array_equal(again[0], first[1]) and np.array_equal(again[2], first[0])


@pytest.mark.parametrize(
    ("rows", "job"), [(2, (0, (1, 2))), (4, (1, (1, 2))), (4, (0, (1,))), (4, (0, (2, 1)))]
)
def test_other_arithmetic_or_another_job_is_measured(rows: int, job: Job) -> None:
    sums, asked = Sums(), list[Job]()
    sums.recalled(4, measured([]))([(0, (1, 2))])
    sums.recalled(rows, measured(asked))([job])
    assert asked == [job]


def test_json_keeps_every_bit() -> None:
    sums = Sums({(4, 0, (1, 2)): np.array([[1 / 3, 2.0**-1060], [1e300, 0.1]])})
    (key, values), *_ = Sums.known_from(json.loads(json.dumps(sums.to_json()))).items()
    assert key == (4, 0, (1, 2))
    assert values.tobytes() == sums.known[key].tobytes()


@pytest.fixture
def swept(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Windows × candidates of every sweep; `deadly` of them may be done before the user presses
    Ctrl-C.
    """
    found: list[int] = []

    def counting(runner: object, stack: object, parts: list[Part], *how: object) -> list[object]:
        if len(found) == counting.deadly:  # type: ignore[attr-defined]
            counting.deadly = -1  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        found.append(sum(len(part.windows) * len(part.positions) for part in parts))
        return sweep(runner, stack, parts, *how)

    counting.deadly = -1  # type: ignore[attr-defined]
    monkeypatch.setattr(scoring, "sweep", counting)
    monkeypatch.setattr(rounds, "KEEP_SECONDS", 0.0)
    return found


def test_a_killed_scoring_does_not_measure_twice(
    desk: Desk, swept: list[int], tmp_path: Path
) -> None:
    """Killed at every share of work of a round's scoring in turn: the same work in all, and the
    same model.
    """
    compress(recipe(desk, sparsity=0.2), Watching())
    expected, total = published(desk), list(swept)
    assert len(total) >= 3, "the scoring comes in several shares"
    for kill in range(1, len(total)):
        other = Desk.make(tmp_path / f"killed-{kill}", desk.model)
        swept.clear()
        scoring.sweep.deadly = kill
        with pytest.raises(KeyboardInterrupt):
            compress(recipe(other, sparsity=0.2), Watching())
        assert (run_folder(other) / "sums-001.json").exists()
        compress(recipe(other, sparsity=0.2), Watching())
        assert swept == total
        assert published(other) == expected


def test_damaged_sums_are_told_and_measured_again(desk: Desk, swept: list[int]) -> None:
    scoring.sweep.deadly = 2
    with pytest.raises(KeyboardInterrupt):
        compress(recipe(desk, sparsity=0.2), Watching())
    (run_folder(desk) / "sums-001.json").write_text('{"sha256":"0","body":{"note":[]}}')
    show = Watching()
    compress(recipe(desk, sparsity=0.2), show)
    assert any(
        "sums-001.json is damaged" in line for line in show.said if line.startswith("WARNING")
    )


@pytest.fixture
def desk(checkpoint: Callable[[str], Path], tmp_path: Path) -> Desk:
    return Desk.make(tmp_path, checkpoint("llama"))
