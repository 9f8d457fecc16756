"""SIGTERM, which Kubernetes, `ray job stop` and notices of preemption send: the process ends as
after Ctrl-C, at once, or after what is under way has been saved.

- Whoever can save what it has learned holds the end up while it works (`saving_first`), looks
  whether one was asked for (`came`), saves, and raises `Terminated`.
- `GRACE` seconds after the signal, or with a second one, the process ends with or without that.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from fusegpt_ray.errors import Terminated

GRACE = 20.0
"""Seconds: Kubernetes gives 30 by default, and a cloud's notice of preemption at least as many."""

_came = threading.Event()
_savers: list[object] = []
"""Who holds the end up. Only appended to and removed from, which no signal can interrupt."""


@contextmanager
def sigterm_stops() -> Iterator[None]:
    """While the block lasts, SIGTERM raises `Terminated` in the main thread. Once it is raised,
    more of them must not disturb the end.
    """

    def second() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    timer = threading.Timer(GRACE, second)
    timer.daemon = True

    def stop(number: int, frame: object) -> None:
        if _savers and not _came.is_set():
            _came.set()
            timer.start()
            return
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    if threading.current_thread() is not threading.main_thread():  # it alone may decide
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        timer.cancel()
        _came.clear()
        signal.signal(signal.SIGTERM, before)


def came() -> bool:
    """Whether SIGTERM has come, and waits for those who save."""
    return _came.is_set()


@contextmanager
def saving_first() -> Iterator[None]:
    """While the block lasts, SIGTERM waits for it. In another thread than the main one, the main
    thread is told once all such blocks have ended.

    Raises:
        Terminated: SIGTERM came, whatever else the block raised.
    """
    mine = object()
    _savers.append(mine)
    try:
        yield
    finally:
        _savers.remove(mine)
        if came():
            _end()
            raise Terminated


def _end() -> None:
    if threading.current_thread() is not threading.main_thread():
        if not _savers:
            os.kill(os.getpid(), signal.SIGTERM)
        return
    while _savers:  # other threads save; the second SIGTERM ends this, too
        time.sleep(0.05)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
