"""Processes that live and do not answer: one rule for all that are asked for what takes moments.

Ray tells of a process that has ended, and of a machine that is gone. It does not tell of a process
that is stopped, or whose GPU or shared folder never comes back. So whoever asks for something that
takes moments (to make room, to take a message) waits for `TIMEOUT` seconds, and then counts the
process as lost.

This is no rule for work. Nobody knows how long a task may take, and a slow one must not be taken
for one that hangs: see `replicas.py`, where others do it as well, and `meeting.py`, where training
workers send heartbeats.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray

from fusegpt_ray.distributed.meeting import TIMEOUT


class SilentError(RuntimeError):
    """A process does not answer, and Ray knows of no end of it."""

    def __init__(self, who: str, advice: str) -> None:
        """`advice`: what is done about it, and what a person can do."""
        problem = f"has not answered for {TIMEOUT:g} s, and Ray knows of no end of it"
        super().__init__(f"{who} {problem}: {advice}")


def unanswered(calls: Sequence[ray.ObjectRef]) -> list[ray.ObjectRef]:
    """Those of the calls that have no answer after `TIMEOUT` seconds; a process that has ended is
    an answer. The seconds are counted one by one: those in which this process was stopped itself,
    and could not hear, are no silence.
    """
    left = list(calls)
    for _ in range(max(1, round(TIMEOUT))):
        if left:
            _, left = ray.wait(left, num_returns=len(left), timeout=1)
    return left


def answer(call: ray.ObjectRef, who: str, advice: str) -> Any:
    """What the call returned.

    Raises:
        SilentError: nothing, in time.
        Exception: what it raised, or what Ray says of a lost process.
    """
    if unanswered([call]):
        raise SilentError(who, advice)
    return ray.get(call)
