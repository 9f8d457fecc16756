"""Turns in which the processes of a node load a model, where its memory is too small for all of
them to do so at once.

Processes that start together load together. On its way to a GPU a trunk is in the host's memory for
a while, once as it is stored and once as it is computed with; and where a node's memory is nearly
full, Ray's memory monitor kills the process that it takes for the cause.
"""

from __future__ import annotations

import fcntl
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fusegpt_ray.model.memory import free_bytes
from fusegpt_ray.store.scratch import make_own

SHARE = 0.5
"""Of the host's free memory: what all who load at the same time may take."""
PAUSE = 0.1
"""Seconds between two tries."""

_LOG = logging.getLogger(__name__)


@contextmanager
def turn(needed: int, processes: int) -> Iterator[None]:
    """While the block lasts, this process may load; others wait where the memory does not allow
    more. One always may. A process that is killed gives its turn back.

    Args:
        needed: bytes of the host's memory that a load takes for a while.
        processes: how many of the node may load at the same time.
    """
    if processes < 2 or _at_once(needed) >= processes:
        yield
        return
    folder = Path(tempfile.gettempdir(), f"fusegpt-ray-{os.geteuid()}", "loading")
    try:
        for path in (folder.parent, folder):
            make_own(path)
    except OSError as error:
        _LOG.warning("processes of this node load without turns: %s", error)
        yield
        return
    while (place := _taken(folder, _at_once(needed))) is None:
        time.sleep(PAUSE)
    try:
        yield
    finally:
        os.close(place)


def _at_once(needed: int) -> int:
    """How many processes may load now; what others have taken by now is no longer free."""
    return max(1, int(SHARE * free_bytes(torch.device("cpu")) / max(1, needed)))


def _taken(folder: Path, places: int) -> int | None:
    """The locked file of one of so many places, if one is free."""
    for number in range(places):
        file = os.open(folder / str(number), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
        else:
            return file
    return None
