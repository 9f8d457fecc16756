"""A tracker in a process of its own: what its library prints, which of its runs is active, and an
exit that waits for its service without limit, are then not ours. One JSON value a line: a request,
then its answer. No torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from io import RawIOBase
from typing import Any, TextIO

from fusegpt_ray.tracking.trackers import TRACKERS, About, Tracker

ALONE = 60
"""Seconds that are left to a tracker once the process that asks is dead."""


class TrackerFailed(Exception):
    """What went wrong over there, in words."""


class Apart:
    """A tracker over there. One thread asks; any may call `kill`, and then the asking one is told
    that the process has ended.
    """

    def __init__(self, name: str) -> None:
        """
        Raises:
            OSError: the process cannot be started.
        """
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, name],
            env=os.environ | {"PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # no Ctrl-C there, and what the library starts can be killed
        )

    def begin(self, about: About) -> str:
        """Begin, or go on with, a run; where its curves can be seen.

        Raises:
            TrackerFailed: as every request.
        """
        return str(self._ask("begin", about=asdict(about)))

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._ask("log", values=dict(values), step=step)

    def close(self, well: bool) -> None:
        self._ask("close", well=well)

    def wait(self) -> None:
        """Until the process has ended: it is asked nothing more."""
        self._process.communicate()

    def kill(self) -> None:
        """It, and what its library has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _ask(self, verb: str, **values: Any) -> Any:
        requests, answers = self._process.stdin, self._process.stdout
        assert requests and answers
        try:
            requests.write(json.dumps([verb, values]).encode() + b"\n")
            requests.flush()
        except BrokenPipeError:
            raise TrackerFailed("its process has ended") from None
        if not (line := answers.readline()):
            raise TrackerFailed("its process has ended")
        answer, error = json.loads(line)
        if error:
            raise TrackerFailed(error)
        return answer


def _serve(name: str, requests: TextIO, answers: RawIOBase) -> None:
    """Until told to close, or until nobody is left who asks."""
    tracker: Tracker | None = None
    for line in requests:
        verb, values = json.loads(line)
        answer = error = None
        try:
            if verb == "begin":
                tracker = TRACKERS[name](About(**values["about"]))
                answer = tracker.where
            else:
                getattr(tracker, verb)(**values)
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
        with contextlib.suppress(BrokenPipeError):  # whoever asked has died meanwhile
            answers.write(json.dumps([answer, error]).encode() + b"\n")
        if verb == "close":
            return
    if tracker:
        signal.alarm(ALONE)
        tracker.close(well=False)


def _main() -> None:
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what a library prints is for a person
    _serve(sys.argv[1], requests, answers)


if __name__ == "__main__":
    _main()
