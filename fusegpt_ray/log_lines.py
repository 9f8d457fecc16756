"""What a run shows, as lines of JSON on stderr for those who collect logs: `FUSEGPT_LOG=json`."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any, TextIO

from rich.console import Console

from fusegpt_ray.errors import UserError
from fusegpt_ray.report import Display
from fusegpt_ray.run.metrics_log import finite

VARIABLE = "FUSEGPT_LOG"


class LogLines(Display):
    """A line for everything that is said, and for every event (see `docs/output.md`): {"time",
    "event", "run", "round", "stage", …}. An event's own values follow; what is said has "message".
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__(Console(file=sys.stderr, quiet=True))
        self._stream = stream or sys.stderr
        self._run, self._round = "", 0

    def say(self, text: str) -> None:
        self._write("said", {"message": text})

    def tell(self, event: str, **values: Any) -> None:
        super().tell(event, **values)
        if event == "run":
            self._run, self._round = str(values.get("name")), 0
        if event != "stage":  # which is said as well
            self._write(event, values)

    def round_begins(self, number: int, rounds: int, blocks: int) -> None:
        self._round = number
        super().round_begins(number, rounds, blocks)

    def _write(self, event: str, values: dict[str, Any]) -> None:
        where = {"run": self._run, "round": self._round, "stage": self._stage}
        line = {"time": round(time.time(), 3), "event": event} | where
        told = {"run_id" if key == "run" else key: value for key, value in values.items()}
        print(json.dumps(finite(line | told)), file=self._stream, flush=True)


def asked() -> bool:
    """Whether the environment asks for lines of JSON.

    Raises:
        UserError: it asks for something else.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", "json"):
        raise UserError(VARIABLE, wanted, "not a format of logs", "set it to json, or unset it")
    return bool(wanted)
