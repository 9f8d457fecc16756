"""What the program does at SIGTERM stays while Ray, which has a handler of its own, is started."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator

import pytest

from fusegpt_ray.cli import _sigterm_stops
from fusegpt_ray.distributed.connection import _own_sigterm
from fusegpt_ray.errors import Terminated


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
    with _sigterm_stops(), pytest.raises(Terminated):
        moment()


def test_another_exit_passes() -> None:
    with _sigterm_stops(), pytest.raises(SystemExit) as left, _own_sigterm():
        sys.exit(3)
    assert left.value.code == 3
