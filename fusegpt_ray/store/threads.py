"""Threads for files: hashing, reading and writing leave Python's lock to others, so that several of
them go on at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

A = TypeVar("A")
R = TypeVar("R")

AT_ONCE = 8
"""Files that a process reads through at the same time."""


def at_once(function: Callable[[A], R], items: Iterable[A], threads: int = AT_ONCE) -> Iterator[R]:
    """`function` of each item, in order, of several at the same time.

    After an exception nothing new is begun.
    """
    with ThreadPoolExecutor(threads, thread_name_prefix="at-once") as pool:
        yield from pool.map(function, items)


def one_ahead(load: Callable[[A], R], items: Iterable[A]) -> Iterator[R]:
    """`load` of each item, in order; another thread loads the next while the last is used."""
    waiting = iter(items)
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as other:
        coming = [other.submit(load, item) for item in islice(waiting, 1)]
        while coming:
            loaded = coming.pop().result()
            coming = [other.submit(load, item) for item in islice(waiting, 1)]
            yield loaded
