"""What cells of a comparison that work at the same time rest on: threads that end with what started
them, and values that are made once. Whole cells do so in tests/integration/test_compare_on_ray.py.
"""

from __future__ import annotations

import io
import sys
import threading
from typing import Any

import pytest
import transformers
from desk import Desk
from rich.console import Console
from test_compare import asked

from fusegpt_ray.comparison.cells import Comparison
from fusegpt_ray.errors import UserError
from fusegpt_ray.model import config
from fusegpt_ray.run.shared import Shared
from fusegpt_ray.scheduling.threads import Threads
from fusegpt_ray.terminal.display import Display

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


def test_what_is_kept_of_a_threads_work_is_told_by_the_main_thread() -> None:
    def endless(number: int) -> None:
        try:
            while True:
                threading.Event().wait(0.01)
        except KeyboardInterrupt as stop:
            stop.add_note(f"Kept {number % 2}.")
            raise

    def stopped() -> None:
        with Threads() as threads:
            threads.start(endless, range(3))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stop:
        stopped()
    assert sorted(stop.value.__notes__) == ["Kept 0.", "Kept 1."], "each once"


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


def test_one_display_hears_of_several_threads() -> None:
    """Each takes the others' bar away; threads take turns often, so that they meet in between."""
    usual = sys.getswitchinterval()
    show, wrong = Display(Console(file=io.StringIO())), list[Exception]()
    began = threading.Barrier(4)

    def tell() -> None:
        began.wait(PATIENCE)
        try:
            for number in range(300):
                show.stage("starting")
                show.part(number, 300)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=tell) for _ in range(4)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
    finally:
        sys.setswitchinterval(usual)
    assert wrong == []


def test_transformers_speaks_as_before_once_no_thread_is_to_be_quiet() -> None:
    """The second one comes while the first one is quiet, and ends after it."""
    before, inside, met = transformers.logging.get_verbosity(), threading.Event(), list[int]()

    def second() -> None:
        with config._quiet():
            met.append(transformers.logging.get_verbosity())
            inside.set()

    other = threading.Thread(target=second)
    with config._quiet():
        other.start()
        assert not inside.wait(0.1), "its way of being quiet would be what it found"
    other.join(PATIENCE)
    assert met and transformers.logging.get_verbosity() == before


@pytest.mark.parametrize("at_once", [0, "many", 1.5])
def test_a_number_that_is_none_is_refused(desk: Desk, at_once: Any) -> None:
    section = {"methods": ["mi"], "at_once": at_once}
    with pytest.raises(UserError, match=r"compare\.at_once"):
        Comparison.parse(asked(desk) | {"compare": section})
