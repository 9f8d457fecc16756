"""Training checkpoints: what the training of a span has learned so far. A killed run goes on from
the last one and ends with the same bytes.

- Each worker writes its own part of the state as a safetensors file. A sealed record, written after
  all of them, names the files that count, with their checksums; other files mean nothing.
- A file is read once, whole, and what is checked is what is then loaded.
- Workers decide together whether a checkpoint is due, because their clocks differ, and whether the
  last one is good.
- A checkpoint counts only for the same span of the same stack, trained in the same way. If it
  passed fewer windows at once than was asked, memory had run out with more. Training that goes on
  from it begins with as few, and so ends as if it had never stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import safetensors.torch
import torch

from fusegpt_ray.store import storage
from fusegpt_ray.store.records import DamagedRecord, FileRecord, checksum, opened, sealed
from fusegpt_ray.store.writer import entries_of, write_safetensors
from fusegpt_ray.training.stepper import Stepper
from fusegpt_ray.training.validation import Validation

RECORD = "checkpoint.json"
Log = Callable[[str], None]
"""Takes a line for the person who waits."""


@dataclass(frozen=True)
class Checkpoints:
    """The training checkpoints of one span, in a folder of their own."""

    folder: str
    minutes: float
    """At least so many pass between two of them."""
    owner: Mapping[str, Any]
    """Everything that would change what the files hold, or the bits that come of them."""
    micro_batch: int
    """Windows that pass a worker's span at once."""
    fence: Callable[[], None]
    """Called before every write: it raises where another run writes here."""
    seconds: float = 0.0
    """How long training took until the last one."""

    @classmethod
    def find(
        cls,
        folder: str,
        minutes: float,
        owner: Mapping[str, Any],
        micro_batch: int,
        fence: Callable[[], None],
    ) -> Checkpoints:
        """The checkpoints of this owner, with what the last one tells, if there is one.

        Args:
            micro_batch: as the recipe asks.
        """
        owner = {**owner, "micro_batch_asked": micro_batch, "torch": torch.__version__}
        this = cls(folder, minutes, owner, micro_batch, fence)
        try:
            record = this._record()
        except DamagedRecord:  # the workers find it, too, and say so
            record = None
        if record is None or record["owner"] != owner:
            return this
        return replace(this, micro_batch=record["micro_batch"], seconds=record["seconds"])

    def with_micro_batch(self, micro_batch: int) -> Checkpoints:
        """For an attempt with so many windows at once.

        That there are fewer is noted before the attempt begins: with more, memory ran out.
        """
        if micro_batch == self.micro_batch:
            return self
        fewer = replace(self, micro_batch=micro_batch, seconds=0.0)
        fewer._write([], 0.0, {})
        return fewer

    def restore(
        self, stepper: Stepper, parts: int, log: Log, validation: Validation | None = None
    ) -> tuple[list[float], float]:
        """Load the last checkpoint, if there is a good one.

        Called by all workers at once; where one finds damage, all begin anew.

        Returns:
            The losses of the parts that need not be repeated, and the seconds these took.
        """
        losses, seconds, state = list[float](), 0.0, dict[str, torch.Tensor]()
        held_out = list[float]()
        good, anew = True, "training from the beginning"
        try:
            losses, held_out, seconds, state = self._read(stepper.worker, log)
        except DamagedRecord as error:
            good = False
            log(f"WARNING: {error}; {anew}")
        found = stepper.gather([len(losses), good])
        if found != [[len(losses), True]] * len(found):
            if stepper.worker == 0:
                if good:
                    log(f"WARNING: not every worker finds the training checkpoint good; {anew}")
                self._write([], 0.0, {})  # keeps the number of windows at once
            return [], 0.0
        if losses:
            stepper.load(state)
            if validation:
                validation.load(held_out, state, stepper)
            if stepper.worker == 0:
                log(f"  going on after part {len(losses)} of {parts}")
        return losses, seconds

    def due(self, stepper: Stepper, since: float) -> bool:
        """Whether, on all workers, the last checkpoint or the beginning is long enough ago.

        Args:
            since: a monotonic time.
        """
        waited = time.monotonic() - since >= 60 * self.minutes
        return all(flag for (flag,) in stepper.gather([waited]))

    def save(
        self,
        stepper: Stepper,
        losses: list[float],
        seconds: float,
        validation: Validation | None = None,
    ) -> None:
        """Make a checkpoint after the parts with these losses, which took so many seconds.

        Called by all workers at once.
        """
        self.fence()
        state = stepper.state() | (validation.state() if validation else {})
        entries = entries_of(state)
        file, _ = write_safetensors(self._uri(len(losses), stepper.worker), entries)
        # Once the rows are here, so are all files.
        rows = stepper.gather([file.size, *bytes.fromhex(file.sha256)])
        if stepper.worker == 0:
            names = (self._name(len(losses), worker) for worker in range(len(rows)))
            records = (FileRecord(size, bytes(digest).hex()) for size, *digest in rows)
            files = dict(zip(names, records, strict=True))
            self._write(losses, seconds, files, validation.losses if validation else [])

    def _record(self) -> dict[str, Any] | None:
        """
        Raises:
            DamagedRecord: there is one, and it is not what was written.
        """
        uri = storage.join(self.folder, RECORD)
        try:
            return opened(storage.read(uri))
        except FileNotFoundError:
            return None
        except DamagedRecord as error:
            raise DamagedRecord(f"{uri} is damaged ({error})") from error

    def _read(
        self, worker: int, log: Log
    ) -> tuple[list[float], list[float], float, dict[str, torch.Tensor]]:
        """Losses, held-out losses, seconds and this worker's state, if there is a checkpoint of
        this owner.

        Raises:
            DamagedRecord: it cannot be trusted.
        """
        nothing = list[float](), list[float](), 0.0, dict[str, torch.Tensor]()
        record = self._record()
        if record is None:
            return nothing
        theirs, ours = {**record["owner"], "micro_batch": record["micro_batch"]}, self._whose()
        if theirs != ours:
            if worker == 0:
                others = ", ".join(
                    f"{key} {theirs.get(key)}, not {value}"
                    for key, value in ours.items()
                    if theirs.get(key) != value
                )
                log(
                    f"  a training checkpoint of another set-up is left aside ({others}); "
                    "training from the beginning"
                )
            return nothing
        losses = record["losses"]
        if not losses:
            return nothing
        uri = self._uri(len(losses), worker)
        try:
            data = storage.read(uri)
        except FileNotFoundError as error:
            raise DamagedRecord(f"{uri} is missing") from error
        if FileRecord.of(data).to_json() != record["files"][self._name(len(losses), worker)]:
            raise DamagedRecord(f"{uri} is not what was written")
        return losses, record["held_out"], record["seconds"], safetensors.torch.load(data)

    def _write(
        self,
        losses: list[float],
        seconds: float,
        files: Mapping[str, FileRecord],
        held_out: Sequence[float] = (),
    ) -> None:
        """Replace the record, then remove the files that it does not name."""
        self.fence()
        body = {
            "owner": dict(self.owner),
            "micro_batch": self.micro_batch,
            "losses": losses,
            "held_out": list(held_out),
            "seconds": seconds,
            "files": {name: file.to_json() for name, file in files.items()},
        }
        storage.write(storage.join(self.folder, RECORD), sealed(body))
        for name in storage.names(self.folder):
            if name not in (RECORD, *files):
                storage.remove(storage.join(self.folder, name))

    def _name(self, part: int, worker: int) -> str:
        """Files of another set-up have other names, so that none is overwritten while a record
        counts on it.
        """
        owner = checksum(self._whose())[:8]
        return f"part-{part:03d}-{owner}-worker-{worker}.safetensors"

    def _uri(self, part: int, worker: int) -> str:
        return storage.join(self.folder, self._name(part, worker))

    def _whose(self) -> dict[str, Any]:
        return {**self.owner, "micro_batch": self.micro_batch}
