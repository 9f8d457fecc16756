"""What a run notes of its work, of every kind there is, goes with the run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from left_behind import OLD, aged

from fusegpt_ray.run.housekeeping import clean
from fusegpt_ray.run.journal import Journal
from fusegpt_ray.run.notes import NOTES, Note
from fusegpt_ray.run.status import status


@contextmanager
def noted(folder: Path, kind: Note) -> Iterator[Journal]:
    """A run that has noted this, of the whole of it and of its first round."""
    with Journal(str(folder / "demo.run")).owned(print, str, dict) as journal:
        journal.begin({"a": 1})
        for number in (0, 1):
            journal.keep(kind, number, {"b": 2})
        yield journal


@pytest.mark.parametrize("kind", NOTES)
def test_after_the_end_nothing_is_left(tmp_path: Path, kind: Note) -> None:
    with noted(tmp_path, kind) as journal:
        journal.remove()
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("kind", NOTES)
def test_a_run_that_begins_anew_knows_nothing_of_it(tmp_path: Path, kind: Note) -> None:
    with noted(tmp_path, kind) as journal:
        journal.clear()
        assert [journal.kept(kind, number, print) for number in (0, 1)] == [None, None]
        journal.remove()


@pytest.mark.parametrize("kind", NOTES)
def test_a_dead_run_that_noted_it_is_seen_and_cleaned(tmp_path: Path, kind: Note) -> None:
    with noted(tmp_path, kind):
        pass  # as after a kill: nothing is tidied up
    aged(tmp_path)
    (seen,) = status(str(tmp_path))["runs"]
    assert (seen["name"], seen["state"]) == ("demo", "unfinished")
    (removed,) = clean(str(tmp_path), age=OLD / 2, unfinished=True)
    assert removed.uri.endswith("/demo.run")
    assert [*tmp_path.iterdir()] == []
