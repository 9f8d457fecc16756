"""A run's sign of life: a small file in its folder that says when, where and at what it was last seen. Light: no torch."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

from fusegpt_ray.errors import UserError
from fusegpt_ray.store import storage

HEARTBEAT = "heartbeat.json"
EVERY = 60.0
"""Seconds between two signs."""


class Heartbeat:
    """While the block lasts, a thread writes `facts` and what `doing` says to the folder, over and over.

    A sign that cannot be written is left out: it tells of the run and must not end it. If an exception ends the block, a last sign
    names it.
    """

    def __init__(self, folder: str, doing: Callable[[], str], facts: Mapping[str, Any], every: float = EVERY) -> None:
        self._file, self._doing, self._facts, self._every = storage.join(folder, HEARTBEAT), doing, facts, every
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._beat()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        if kind:
            self._beat(ended=kind.__name__)

    def _beat_on(self) -> None:
        while not self._stop.wait(self._every):
            self._beat()

    def _beat(self, **more: str) -> None:
        sign = {"time": time.time(), "host": socket.gethostname(), "pid": os.getpid(), "doing": self._doing(), **self._facts, **more}
        with contextlib.suppress(Exception):  # of whatever kind the store raises
            storage.write(self._file, json.dumps(sign).encode(), patience=0)


def wait_until_alone(folder: str, name: str, say: Callable[[str], None]) -> None:
    """Return once no other process works on the run in this folder: at once, or when its last sign has grown old.

    Raises:
        UserError: another process does, and gives a new sign.
    """
    first = _life(folder)
    if first is None or time.time() - first["time"] > 2 * EVERY:
        return
    say(f"a run of this name was alive on {first['host']} (process {first['pid']}) a moment ago; waiting to see whether it still is")
    until = time.monotonic() + 2 * EVERY
    while time.monotonic() < until:
        time.sleep(EVERY / 30)
        now = _life(folder)
        if now is None:
            return
        if now["time"] != first["time"]:
            problem = f"a run of this name is at work on {now['host']} (process {now['pid']}): {now['doing']}"
            raise UserError("output.name", name, problem, "wait for it, stop it, or choose another output.name")


def _life(folder: str) -> dict[str, Any] | None:
    """The last sign of a process that may be alive and is not this one."""
    try:
        sign = dict(storage.read_json(storage.join(folder, HEARTBEAT)))
    except (FileNotFoundError, ValueError):
        return None
    if "ended" in sign or not {"time", "host", "pid", "doing"} <= set(sign):
        return None
    if sign["host"] != socket.gethostname():
        return sign
    return sign if sign["pid"] != os.getpid() and _runs(sign["pid"]) else None


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
