"""What cells of a comparison that work at the same time rest on: threads that end with what started
them, and values that are made once. Whole cells do so in tests/integration/test_compare_on_ray.py.
"""

from __future__ import annotations

import threading
from typing import Any

import pytest
from desk import Desk
from test_compare import asked

from fusegpt_ray.comparison.cells import Comparison
from fusegpt_ray.comparison.slots import Threads
from fusegpt_ray.errors import UserError
from fusegpt_ray.run.shared import Shared

PATIENCE = 60
"""Seconds after which something that should happen at once has not happened at all."""


def test_threads_end_with_the_block_that_started_them() -> None:
    ended = []

    def endless(number: int) -> None:
        try:
            while True:
                threading.Event().wait(0.01)
        finally:
            ended.append(number)

    def stopped() -> None:
        with Threads() as threads:
            threads.start(endless, range(3))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        stopped()
    assert sorted(ended) == [0, 1, 2]


def test_what_several_threads_ask_for_is_made_once() -> None:
    """All of them ask while the first one makes it; where making fails, another tries."""
    shared, made, got = Shared(), list[int](), list[int]()
    makes = threading.Event()

    def make() -> int:
        made.append(len(made))
        makes.wait(PATIENCE)
        if len(made) == 1:
            raise UserError("key", None, "the first one fails", "try again")
        return made[-1]

    def ask() -> None:
        try:
            got.append(shared.once("what", {}, make))
        except UserError:
            got.append(-1)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    makes.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert made == [0, 1] and sorted(got) == [-1, 1, 1, 1]


@pytest.mark.parametrize("at_once", [0, "many", 1.5])
def test_a_number_that_is_none_is_refused(desk: Desk, at_once: Any) -> None:
    section = {"methods": ["mi"], "at_once": at_once}
    with pytest.raises(UserError, match=r"compare\.at_once"):
        Comparison.parse(asked(desk) | {"compare": section})
