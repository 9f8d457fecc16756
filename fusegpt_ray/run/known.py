"""What a run has measured of the dense model's blocks, and never measures again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fusegpt_ray.run.journal import Journal
from fusegpt_ray.run.notes import Note
from fusegpt_ray.run.shared import Shared
from fusegpt_ray.store.records import checksum


@dataclass
class Known:
    """JSON values of one kind, kept in the journal of the run, however often it is stopped."""

    journal: Journal
    note: Note
    """Under which they are kept."""
    run: str
    """Names the run: its model, arithmetic and batches. What another measured does not count…"""
    shared: Shared
    measuring: Mapping[str, Any]
    """… unless it is shared: what it was measured with."""
    say: Callable[[str], None]
    _values: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        noted = self.journal.kept(self.note, 0, self.say)
        self._values = noted if isinstance(noted, dict) else {}  # older versions noted bare lists

    def measured(self, what: str, key: Mapping[str, Any], measure: Callable[[], Any]) -> Any:
        """What is known under this key, which says all that it depends on beside `measuring`; else
        what `measure` finds.
        """
        name = checksum({"run": self.run, **key})
        if name not in self._values:
            every = {**self.measuring, **key}
            self._values[name] = self.shared.measured(what, every, measure, self.say)
            self.journal.keep(self.note, 0, self._values)
        return self._values[name]
