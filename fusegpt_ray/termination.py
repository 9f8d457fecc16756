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

_came, _heard = threading.Event(), threading.Event()
"""Whether the signal has come, and whether the main thread has been told that it is to end."""
_savers: list[object] = []
"""Who holds the end up. Only appended to and removed from, which no signal can interrupt."""


@contextmanager
def sigterm_stops() -> Iterator[None]:
    """While the block lasts, SIGTERM raises `Terminated` in the main thread. Once it is raised,
    more of them must not disturb the end.
    """
    reminders: list[threading.Thread] = []

    def remind() -> None:
        """Sends it again once all have saved, or `GRACE` is over: until it is heard, because one
        that comes just before the main thread begins to wait for something does not wake it."""
        until = time.monotonic() + GRACE
        while not _heard.wait(0.05):
            if not _savers or time.monotonic() > until:
                os.kill(os.getpid(), signal.SIGTERM)

    def stop(number: int, frame: object) -> None:
        if _savers and not _came.is_set():
            _came.set()
            reminders.append(threading.Thread(target=remind, daemon=True))
            reminders[0].start()
            return
        _hear()
        raise Terminated

    if threading.current_thread() is not threading.main_thread():  # it alone may decide
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        for thread in reminders:
            _hear()
            thread.join()
        _came.clear()
        _heard.clear()
        signal.signal(signal.SIGTERM, before)


def came() -> bool:
    """Whether SIGTERM has come, and waits for those who save."""
    return _came.is_set()


@contextmanager
def saving_first() -> Iterator[None]:
    """While the block lasts, SIGTERM waits for it, in whichever thread; the main thread is told
    once all such blocks have ended.

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
            if threading.current_thread() is threading.main_thread():
                while _savers:  # other threads save; the second SIGTERM ends this, too
                    time.sleep(0.05)
                _hear()
            raise Terminated


def _hear() -> None:
    """In the main thread: from here on it ends, and is told no more."""
    _heard.set()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
