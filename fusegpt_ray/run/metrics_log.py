"""The events of a run, as lines of JSON beside its journal. Light: no torch.

Each process that works under the run's name has a file of its own, `metrics-000001.jsonl`, numbered
by its lease. Object stores cannot append, so the whole small file is written again, in the thread
that gives the signs of life: a slow store holds up nothing, and what a store that fails did not
take comes with the next sign. What an earlier process left is never written again.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

from fusegpt_ray.store import storage

NAME = "metrics-{:06d}.jsonl"
_FILE = re.compile(r"metrics-(\d{6,})\.jsonl")


class MetricsLog:
    """The events that one process has heard of (see `report.Listener`)."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._written = 0
        self._folder, self._number = "", 0

    def __call__(self, event: str, values: Mapping[str, Any]) -> None:
        line = {"time": round(time.time(), 3), "event": event, **values}
        self._lines.append(json.dumps(_finite(line)) + "\n")

    def begin(self, folder: str, number: int) -> None:
        """Where it is written: a run's folder, and the number of the lease."""
        self._folder, self._number = folder, number

    def write(self) -> None:
        """If there is anything new. Tried once.

        Raises:
            OSError: the store failed.
        """
        lines = tuple(self._lines)  # others go on adding to it
        if len(lines) > self._written:
            file = storage.join(self._folder, NAME.format(self._number))
            storage.write(file, "".join(lines).encode(), retry_for=0)
            self._written = len(lines)

    def whole(self, say: Callable[[str], None]) -> bytes:
        """All that this process and those before it heard, in order."""
        earlier = b""
        try:
            for name in storage.names(self._folder):
                found = _FILE.fullmatch(name)
                if found and int(found[1]) < self._number:
                    earlier += storage.read(storage.join(self._folder, name))
        except OSError as error:
            say(f"WARNING: events of earlier processes are left out of the metrics: {error}")
        return earlier + "".join(self._lines).encode()


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: they become null."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value if not isinstance(value, float) or math.isfinite(value) else None
