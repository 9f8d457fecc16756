"""What a command shows, as lines of JSON for those who collect logs: `FUSEGPT_LOG=json`."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console

from fusegpt_ray.errors import UserError
from fusegpt_ray.store.records import finite
from fusegpt_ray.terminal.display import Display

VARIABLE = "FUSEGPT_LOG"


class _Warnings(logging.Handler):
    """What modules without a display warn of: said as a line, too."""

    def __init__(self, lines: LogLines) -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.say(record.getMessage())


class LogLines(Display):
    """A line for everything that is said, and for every event (see `docs/output.md`): {"time",
    "event", "run", "run_id", "round", "stage", …}. An event's own values follow; what is said has
    "message". Each run of a command has an object of its own, and these may work at the same time.
    """

    def __init__(self, stream: TextIO | None = None, run: str = "") -> None:
        """
        Args:
            run: its name; empty: what the command itself says, for no run or for several.
        """
        # On a terminal, too, where a person would see a bar in the place of some lines.
        super().__init__(Console(file=sys.stderr, quiet=True, force_terminal=False))
        self._stream = stream or sys.stderr
        self._run, self._run_id, self._round = run, "", 0
        self._warnings = _Warnings(self)

    def __enter__(self) -> Self:
        if not self._run:  # a run's own would say the same again
            logging.getLogger("fusegpt_ray").addHandler(self._warnings)
        return super().__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        logging.getLogger("fusegpt_ray").removeHandler(self._warnings)
        super().__exit__(kind, error, trace)

    def of_run(self, name: str) -> LogLines:
        return LogLines(self._stream, name)

    def beside(self, title: str) -> LogLines:
        return self  # its lines have the run's name in any case

    def say(self, text: str) -> None:
        self._write("said", {"message": text})

    def tell(self, event: str, **values: Any) -> None:
        super().tell(event, **values)
        self._run_id = values.get("run", self._run_id)
        if event != "stage":  # which is said as well
            self._write(event, values)

    def round_begins(self, number: int, rounds: int, blocks: int) -> None:
        self._round = number
        super().round_begins(number, rounds, blocks)

    def _write(self, event: str, values: dict[str, Any]) -> None:
        line = {
            "time": round(time.time(), 3),
            "event": event,
            "run": self._run,
            "run_id": self._run_id,
            "round": self._round,
            "stage": self._stage,
        }
        line |= {"run_id" if key == "run" else key: value for key, value in values.items()}
        # At once: a line's end that came by itself could come behind another thread's line.
        self._stream.write(json.dumps(finite(line)) + "\n")
        self._stream.flush()


def asked() -> bool:
    """Whether the environment asks for lines of JSON.

    Raises:
        UserError: it asks for something else.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", "json"):
        raise UserError(VARIABLE, wanted, "not a format of logs", "set it to json, or unset it")
    return bool(wanted)
