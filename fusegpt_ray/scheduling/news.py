"""What is known of jobs, written into one file for whoever follows it from anywhere."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from typing import Any

from fusegpt_ray.errors import StorageError
from fusegpt_ray.store import storage
from fusegpt_ray.terminal.display import Display


class News:
    """Written whenever a job begins to work or has ended; by several threads."""

    def __init__(self, file: str, told: Callable[[], Mapping[str, Any]], show: Display) -> None:
        self.file, self.show = file, show
        self._told, self._writing = told, threading.Lock()

    def write(self) -> None:
        """What is lost with a store that fails is only the news."""
        try:
            with self._writing:
                storage.write(self.file, as_json(self._told()))
        except StorageError as error:
            name = self.file.rpartition("/")[2]
            self.show.say(f"WARNING: {name} could not be written ({error})")


def as_json(told: Mapping[str, Any]) -> bytes:
    """A file of JSON that people may read, too."""
    return (json.dumps(told, indent=1, ensure_ascii=False) + "\n").encode(errors="replace")
