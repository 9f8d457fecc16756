"""Times in turns: who is called how often and in which order, by a clock that is set by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fusegpt_ray.measuring.timing import Spread, Stopwatch, in_turns, ratios


def test_works_take_turns_and_warm_ups_do_not_count() -> None:
    called: list[str] = []

    def work(name: str) -> Callable[[], int]:
        def call() -> int:
            called.append(name)
            return len(called)

        return call

    assert in_turns([work("a"), work("b")], runs=3, warm_ups=2) == [[5, 7, 9], [6, 8, 10]]
    assert "".join(called) == "ab" * 5


def test_a_lap_ends_when_the_device_has_done_its_work() -> None:
    happened: list[str] = []
    now = 0.0

    def spend(what: str, time: float) -> Callable[[], None]:
        def call() -> None:
            nonlocal now
            happened.append(what)
            now += time

        return call

    def clock() -> float:
        happened.append("clock")
        return now

    watch = Stopwatch(spend("wait", 5), clock)
    for work in (spend("prefill", 2), spend("decode", 3)):
        watch.mark()
        work()
    watch.mark()
    assert watch.laps == [7, 8]  # what the device did before the first mark is not counted
    assert happened == [
        *("wait", "clock", "prefill", "wait", "clock", "decode", "wait", "clock"),
    ]


def test_ratios_are_of_the_same_turn() -> None:
    """A machine that becomes twice as slow changes no ratio."""
    assert ratios([1.0, 2.0, 2.0], [0.5, 1.0, 1.0]) == [2, 2, 2]
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2, 1, 3)
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        ratios([1.0, 2.0], [1.0])
