"""The events of a run, as lines of JSON beside its journal. Light: no torch.

Each process that works under the run's name has a file of its own, `metrics-000001.jsonl`, numbered
by its lease. In a local folder each event is appended at once, so that not even a SIGKILL loses it.
Object stores cannot append, so the whole small file is written again, in the thread that sends the
heartbeats: a slow store holds up nothing, and what a store that fails did not take comes with the
next heartbeat. What an earlier process left is never written again.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from fusegpt_ray.store import storage
from fusegpt_ray.store.fence import Fence, nobody_else
from fusegpt_ray.store.local import write_from
from fusegpt_ray.store.records import finite

NAME = "metrics-{:06d}.jsonl"
_FILE = re.compile(r"metrics-(\d{6,})\.jsonl")


class MetricsLog:
    """The events that one process has heard of (see `report.Listener`)."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._written, self._bytes = 0, 0
        self._folder, self._number = "", 0
        self._fence: Fence = nobody_else
        self._at_once = False
        self._turn = threading.Lock()

    def __call__(self, event: str, values: Mapping[str, Any]) -> None:
        line = {"time": round(time.time(), 3), "event": event, **values}
        self._lines.append(json.dumps(finite(line)) + "\n")
        if self._at_once:
            # A disk that is full, or a name that is lost: whoever needs them finds out itself.
            with contextlib.suppress(Exception):
                self._fence()
                self.write()

    def begin(self, folder: str, number: int, fence: Fence = nobody_else) -> None:
        """Where it is written: a run's folder, and the number of the lease.

        Args:
            fence: raises once the folder is another's.
        """
        self._folder, self._number, self._fence = folder, number, fence
        self._at_once = "://" not in folder

    def end(self) -> None:
        """Nothing more is written by itself."""
        self._at_once = False

    def write(self) -> None:
        """If there is anything new. Tried once.

        Raises:
            OSError: the store failed.
        """
        with self._turn:
            lines = tuple(self._lines)  # others go on adding to it
            if len(lines) == self._written:
                return
            file = storage.join(self._folder, NAME.format(self._number))
            if "://" in file:
                storage.write(file, "".join(lines).encode(), retry_for=0)
            else:
                if not storage.exists(file):  # the first time, or somebody removed it
                    self._written, self._bytes = 0, 0
                new = "".join(lines[self._written :]).encode()
                write_from(file, self._bytes, new)
                self._bytes += len(new)
            self._written = len(lines)

    def whole(self, say: Callable[[str], None]) -> bytes:
        """All that this process and those before it heard, in order."""
        earlier = b""
        try:
            for name in storage.names(self._folder):
                found = _FILE.fullmatch(name)
                if found and int(found[1]) < self._number:
                    heard = storage.read(storage.join(self._folder, name))
                    earlier += heard[: heard.rfind(b"\n") + 1]  # a full disk may tear the last
        except OSError as error:
            say(f"WARNING: events of earlier processes are left out of the metrics: {error}")
        return earlier + "".join(self._lines).encode()
