"""Cells of a comparison that work at the same time, each set of workers in a thread of this one
process: what fails in one set leaves the others alone. Sets on Ray: test_compare_on_ray.py.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from desk import Desk
from stopped_runs import Watching
from test_compare import asked
from test_compare_at_once import PATIENCE

from fusegpt_ray.comparison.cells import Comparison
from fusegpt_ray.comparison.run import compare
from fusegpt_ray.compressing.compression import Compression
from fusegpt_ray.scheduling import slots
from fusegpt_ray.workers.room import Need, ResourcePool, Room

METHODS = ("mi", "angular", "last")
WARNING = "WARNING: a set of workers is given up"


class Counting(Watching):
    """Keeps how far its bar was."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[tuple[int, int]] = []

    def part(self, number: int, parts: int) -> None:
        self.parts.append((number, parts))


def _room_for_two(setups: Sequence[Any], *asked: Any) -> AbstractContextManager[ResourcePool]:
    return nullcontext(ResourcePool(Room([Need()] * len(setups), at_once=2)))


class Sets:
    """Two sets of workers in one process, with faults at chosen places. The first set is that of
    the thread that asks. The second one does not end its first cell before the first set has come
    to its fault, and the first set does not begin before the second one has a cell.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = {True: 0, False: 0}
        """How often, by whether it is the first set."""
        self.begun = {True: 0, False: 0}
        self.opening: Callable[[bool, int], bool] = lambda first, number: False
        """Whether it fails: of which set, and how often it was opened."""
        self.working: Callable[[bool, int], bool] = lambda first, number: False
        """Whether the cell fails, likewise."""
        self.closing = False
        """Whether the first set cannot be closed."""
        self._at_work, self._fault = threading.Event(), threading.Event()
        # On Ray models are at work in other processes; in one, building one disturbs threads.
        self._turn = threading.Lock()
        opens, publishes = slots.open_workers, Compression.publish_all

        def open_workers(setup: Any, show: Any) -> Any:
            first = self._first()
            self.opened[first] += 1
            if self.opening(first, self.opened[first]):
                self._fault.set()
                raise RuntimeError("the node is gone")
            return self._closed_badly(opens(setup, show)) if first else opens(setup, show)

        def publish_all(compression: Compression, restart: bool) -> Any:
            first = self._first()
            self.begun[first] += 1
            if first:
                assert self._at_work.wait(PATIENCE)
            else:
                self._at_work.set()
                assert self._fault.wait(PATIENCE)
            if self.working(first, self.begun[first]):
                raise RuntimeError("the node was lost")
            with self._turn:
                return publishes(compression, restart)

        monkeypatch.setattr(slots, "room_for_sets", _room_for_two)
        monkeypatch.setattr(slots, "open_workers", open_workers)
        monkeypatch.setattr(Compression, "publish_all", publish_all)

    def _first(self) -> bool:
        return threading.current_thread() is threading.main_thread()

    def _closed_badly(self, workers: Any) -> Any:
        sets = self

        class Closed(type(workers)):  # type: ignore[misc]
            def __exit__(self, *error: object) -> None:
                super().__exit__(*error)
                if sets.closing:
                    sets._fault.set()
                    raise RuntimeError("workers cannot be ended")

        workers.__class__ = Closed
        return workers


@pytest.fixture
def sets(monkeypatch: pytest.MonkeyPatch) -> Sets:
    return Sets(monkeypatch)


def carried_out(desk: Desk, methods: tuple[str, ...] = METHODS) -> tuple[Counting, dict[str, Any]]:
    show = Counting()
    section = {"methods": [*methods], "sparsities": [0.2]}  # a cell for each method
    result = compare(Comparison.parse(asked(desk) | {"compare": section}), show)
    assert show.parts[-1] == (len(methods), len(methods))  # the bar of ended cells is full
    return show, result


def warned(show: Counting) -> list[str]:
    return [line for line in show.said if line.startswith(WARNING)]


def test_a_set_that_cannot_be_closed_leaves_the_others_working(desk: Desk, sets: Sets) -> None:
    """The second set still works on its only cell then."""
    sets.closing = True
    show, result = carried_out(desk, METHODS[:2])
    assert result["failed"] == [] and len(result["rows"]) == 2
    assert sets.begun == {True: 1, False: 1}
    assert len(warned(show)) == 1 and "RuntimeError: workers cannot be ended" in warned(show)[0]


def test_a_set_that_cannot_be_opened_again_leaves_its_cells_to_the_others(
    desk: Desk, sets: Sets
) -> None:
    sets.working = lambda first, number: first
    sets.opening = lambda first, number: first and number > 1
    show, result = carried_out(desk)
    assert {row["problem"] for row in result["failed"]} == {"RuntimeError: the node was lost"}
    assert len({row["method"] for row in result["failed"]}) == 1  # the first set's own
    assert sets.opened[True] == 2 and sets.begun == {True: 1, False: 2}
    assert len(warned(show)) == 1


def test_where_all_sets_are_given_up_the_first_one_tries_again(desk: Desk, sets: Sets) -> None:
    """What the first set could not open workers for is left to the end; the second one ends."""
    sets.working = lambda first, number: number == 1
    sets.opening = lambda first, number: number == 2
    show, result = carried_out(desk)
    failed, done = ({row["method"] for row in result[key]} for key in ("failed", "rows"))
    assert len(failed) == 2 and len(done) == 1
    assert sets.opened == {True: 3, False: 1} and sets.begun == {True: 2, False: 1}
    assert len(warned(show)) == 1


def test_a_cell_that_fails_before_its_work_has_ended_as_well(
    desk: Desk, sets: Sets, monkeypatch: pytest.MonkeyPatch
) -> None:
    begins = Compression.begin

    def begin(plan: Any, *rest: Any) -> Compression:
        if plan.recipe.method == "last":
            sets._fault.set()
            raise RuntimeError("no texts")
        return begins(plan, *rest)

    monkeypatch.setattr(Compression, "begin", begin)
    show, result = carried_out(desk)
    assert {row["problem"] for row in result["failed"]} == {"RuntimeError: no texts"}
    assert show.parts == [(number, 3) for number in (1, 2, 3)] and not warned(show)


def test_what_joins_while_one_works_is_used_by_the_next_one(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A room for one of three, which becomes a room for two when the first one has begun: that
    does not go on before another one is at work. Nothing is asked for once none waits.
    """

    class Growing(ResourcePool):
        gpus, asked = 1.0, list[int]()

        def now(self) -> Room:
            return Room([Need(1)] * 3, 3, Need(self.gpus, 99))

        def ask(self, sets: Sequence[tuple[Need, Any]]) -> None:
            self.asked.append(len(sets))

    place, begun, turn = Growing(Room([])), list[str](), threading.Lock()
    second, opened = threading.Event(), list[tuple[int, float]]()
    opens, publishes = slots.open_workers, Compression.publish_all

    def open_workers(setup: Any, show: Any) -> Any:
        opened.append((setup.sets, setup.cluster.gpus_per_replica))
        return opens(setup, show)

    def publish_all(compression: Compression, restart: bool) -> Any:
        with turn:
            begun.append(compression.plan.recipe.method)
        if len(begun) == 1:
            place.gpus = 2
            assert second.wait(PATIENCE)
        second.set()
        with turn:
            return publishes(compression, restart)

    monkeypatch.setattr(slots, "room_for_sets", lambda *_: nullcontext(place))
    monkeypatch.setattr(slots, "open_workers", open_workers)
    monkeypatch.setattr(Compression, "publish_all", publish_all)
    show, result = carried_out(desk)
    assert result["failed"] == [] and len(result["rows"]) == 3
    assert opened == [(1, 1.0), (2, 1.0)], "on GPUs, even if there should be none at the moment"
    assert "up to 2 cells at once" in show.said
    assert place.asked[0] == 3 and place.asked[-1] == 0 and max(place.asked) == 3


def test_what_an_ended_cell_held_is_let_go(
    desk: Desk, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its run, and the windows that all runs of its model share once none of them is left."""
    begins, held, alive = Compression.begin, list[weakref.ref[Any]](), list[int]()

    def begin(*arguments: Any) -> Compression:
        gc.collect()
        alive.append(sum(ref() is not None for ref in held))
        begun = begins(*arguments)
        held.extend([weakref.ref(begun), weakref.ref(begun.windows.tokens_WT)])
        return begun

    monkeypatch.setattr(Compression, "begin", begin)
    other = Desk.make(desk.folder / "second", checkpoint("llama-tied"))
    models = [{"name": "a", "source": str(desk.model)}, {"name": "b", "source": str(other.model)}]
    section = {"methods": ["mi", "last"], "sparsities": [0.2], "models": models}
    result = compare(Comparison.parse(asked(desk) | {"compare": section}), Watching())
    assert result["failed"] == [] and len(result["rows"]) == 4
    # Both cells of a model draw their texts before the first one works: they share the windows.
    assert alive == [0, 2, 0, 2]
