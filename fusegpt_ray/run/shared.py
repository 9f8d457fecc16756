"""What several runs of one model have in common, and do once, also where they work at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fusegpt_ray.store import storage
from fusegpt_ray.store.records import DamagedRecord, checksum, opened, sealed

T = TypeVar("T")


@dataclass
class Shared:
    """What is made once for all runs. A run by itself shares with nobody."""

    folder: str | None = None
    """Where measurements are kept for later processes, one record each; None: nowhere."""
    _made: dict[str, Any] = field(default_factory=dict)
    _making: dict[str, threading.Lock] = field(default_factory=dict)

    def once(self, what: str, key: Mapping[str, Any], make: Callable[[], T]) -> T:
        """What `make` made for the first that asked. The key is all that it depends on. Who asks in
        the meantime waits; if `make` raises, the next one tries.
        """
        name = checksum({"what": what, **key})
        with self._making.setdefault(name, threading.Lock()):  # as a whole, so it is one lock
            if name not in self._made:
                self._made[name] = make()
            made: T = self._made[name]
        return made

    def forget(self) -> None:
        """Let go of all that was made. What was measured stays in the folder."""
        self._made.clear()

    def measured(
        self,
        what: str,
        key: Mapping[str, Any],
        measure: Callable[[], Any],
        say: Callable[[str], None],
    ) -> Any:
        """The same for a JSON value, which is kept in the folder, too. A damaged record is told and
        measured again.
        """

        def make() -> Any:
            if self.folder is None:
                return measure()
            file = storage.join(self.folder, f"{what}-{checksum(dict(key))[:32]}.json")
            if storage.exists(file):
                try:
                    return opened(storage.read(file))["value"]
                except DamagedRecord as error:
                    say(f"WARNING: {file} is damaged ({error}); measuring again")
            value = measure()
            storage.write(file, sealed({"value": value}))
            return value

        return self.once(what, key, make)
