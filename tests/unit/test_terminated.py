"""SIGTERM ends the program at once, or after what is under way has been saved, within a bound; and
what the program does at it stays while Ray, which has a handler of its own, is started.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from fusegpt_ray import termination
from fusegpt_ray.distributed.connection import _own_sigterm
from fusegpt_ray.errors import Terminated
from fusegpt_ray.termination import came, saving_first, sigterm_stops


def rays(number: int, frame: object) -> None:
    """As `ray.init` installs it."""
    sys.exit(number)


@pytest.fixture(autouse=True)
def _handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    assert signal.getsignal(signal.SIGTERM) is before, "it is put back"


def while_ray_starts() -> None:
    with _own_sigterm():
        signal.signal(signal.SIGTERM, rays)
        signal.raise_signal(signal.SIGTERM)


def once_ray_has_started() -> None:
    with _own_sigterm():
        signal.signal(signal.SIGTERM, rays)
    signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("moment", [while_ray_starts, once_ray_has_started])
def test_it_stops_the_command(moment: Callable[[], None]) -> None:
    with sigterm_stops(), pytest.raises(Terminated):
        moment()


def test_another_exit_passes() -> None:
    with sigterm_stops(), pytest.raises(SystemExit) as left, _own_sigterm():
        sys.exit(3)
    assert left.value.code == 3


def told() -> None:
    signal.raise_signal(signal.SIGTERM)


def in_vain() -> None:
    told()
    raise MemoryError


def told_twice() -> None:
    told()
    told()
    pytest.fail("it went on")


def too_long() -> None:
    told()
    time.sleep(30)
    pytest.fail("it went on")


def ended(work: Callable[[], None]) -> None:
    """What saves what it has learned is ended by SIGTERM."""
    with pytest.raises(Terminated):
        saved_first(work)


def saved_first(work: Callable[[], None]) -> None:
    with saving_first():
        work()


def test_who_saves_is_waited_for() -> None:
    saved = []

    def save() -> None:
        told()
        assert came()
        saved.append("what was learned")

    with sigterm_stops():
        ended(save)
        told()  # it does not disturb the end
    assert saved
    assert not came()


@pytest.mark.parametrize("work", [in_vain, told_twice, too_long])
def test_it_ends_whatever_becomes_of_the_saving(
    work: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(termination, "GRACE", 0.05 if work is too_long else 30.0)
    with sigterm_stops():
        ended(work)


def test_other_threads_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a family's members: the main thread has nothing to save, and is told at once, even
    where a signal comes just before it begins to wait.
    """
    monkeypatch.setattr(termination, "GRACE", 60.0)
    here, go_on, saved = threading.Event(), threading.Event(), []

    def save() -> None:
        here.set()
        go_on.wait(30)
        saved.append("what was learned")

    with sigterm_stops():
        thread = threading.Thread(target=ended, args=(save,))
        thread.start()
        here.wait(30)
        told()
        assert came()
        go_on.set()
        with pytest.raises(Terminated):
            time.sleep(30)
        # Ray's end puts the signal's handler back, and the rest of ours is not to be cut short.
        again = []
        signal.signal(signal.SIGTERM, lambda *_: again.append("once more"))
        time.sleep(0.3)
        assert not again
        thread.join(30)
    assert saved
