"""Savepoints: what the fine-tuning of a group has learned so far, from which a killed run goes on and ends with the same bytes.

Notable:
- each worker keeps its own part of the state in a safetensors file; a sealed record, written after all of them, names those that
  count, with their checksums. A file that the record does not name is nothing;
- a file is read once, whole, and what is checked is what is then loaded;
- workers decide together whether a savepoint is due (their clocks differ) and whether one is good;
- a savepoint counts only for the same group of the same stack, trained in the same way. If it passed fewer windows at once than was
  asked, memory had run out with more: whoever goes on begins with as few, and ends as if never stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import safetensors.torch
import torch

from fusegpt_ray.fusion.round import Round
from fusegpt_ray.store import storage
from fusegpt_ray.store.checkpoint import Entry, write_safetensors
from fusegpt_ray.store.records import DamagedRecord, FileRecord, checksum, opened, sealed

RECORD = "savepoint.json"
Say = Callable[[str], None]
"""Takes a line for the person who waits."""


class Learner(Protocol):
    """What learns, as one of several workers or alone."""

    @property
    def worker(self) -> int:
        """Its number, from 0."""

    def state(self) -> dict[str, torch.Tensor]:
        """All of this worker's that its next steps depend on: the tensors themselves, not copies."""

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from such a state. All workers at once."""

    def gather(self, row: list[int]) -> list[list[int]]:
        """The rows of all workers, in their order. All workers at once."""


def folder_of(round_folder: str) -> str:
    """Where the savepoints of a round lie: as long as its record is not committed."""
    return storage.join(round_folder, "savepoints")


@dataclass(frozen=True)
class Savepoints:
    """Those of one group."""

    folder: str
    minutes: float
    """At least so many between two of them."""
    owner: Mapping[str, Any]
    """Whose they are: all whose change would alter what the files hold, or the bits that come of it."""
    micro_batch: int
    """Windows that pass a worker's group at once."""
    fence: Callable[[], None]
    """As that of the round."""
    seconds: float = 0.0
    """What fine-tuning took until the last of them."""

    @classmethod
    def of(cls, job: Round, minutes: float, micro_batch: int, **setup: str | int) -> Savepoints:
        """Those of the group of `job`; `micro_batch` as the recipe asks. Where one is there already, with what it tells."""
        owner = {
            "after": job.origin,
            "donor": job.donor,
            "micro_batch_asked": micro_batch,
            "torch": torch.__version__,
            **setup,
        }
        this = cls(folder_of(job.folder), minutes, owner, micro_batch, job.fence)
        try:
            record = this._record()
        except DamagedRecord:  # the workers find it, too, and say so
            record = None
        if record is None or record["owner"] != owner:
            return this
        return replace(this, micro_batch=record["micro_batch"], seconds=record["seconds"])

    def trying(self, micro_batch: int) -> Savepoints:
        """For an attempt with so many windows at once. That there are fewer is noted before it begins: with more, memory ran out."""
        if micro_batch == self.micro_batch:
            return self
        fewer = replace(self, micro_batch=micro_batch, seconds=0.0)
        fewer._write([], 0.0, {})
        return fewer

    def restore(self, learner: Learner, epochs: int, say: Say) -> tuple[list[float], float]:
        """Load the last savepoint, if there is a good one: losses of the epochs that it spares, and the seconds they took.

        All workers at once; where one finds damage, all begin anew.
        """
        losses, seconds, state = list[float](), 0.0, dict[str, torch.Tensor]()
        good = True
        try:
            losses, seconds, state = self._read(learner.worker, say)
        except DamagedRecord as error:
            good = False
            say(f"WARNING: {error}; fine-tuning this group from its beginning")
        found = learner.gather([len(losses), good])
        if found != [[len(losses), True]] * len(found):
            if learner.worker == 0:
                if good:
                    say(
                        "WARNING: not every worker finds the savepoint good; fine-tuning this group from its beginning"
                    )
                self._write([], 0.0, {})  # with how many windows at once stays known
            return [], 0.0
        if losses:
            learner.load(state)
            if learner.worker == 0:
                say(f"  going on after epoch {len(losses)} of {epochs}")
        return losses, seconds

    def due(self, learner: Learner, since: float) -> bool:
        """Whether the last savepoint, or the beginning, is long enough ago (`since`, a monotonic time) for all workers."""
        waited = time.monotonic() - since >= 60 * self.minutes
        return all(flag for (flag,) in learner.gather([waited]))

    def keep(self, learner: Learner, losses: list[float], seconds: float) -> None:
        """Make a savepoint after the epochs with these losses, which took so many seconds. All workers at once."""
        self.fence()
        tensors = learner.state()
        entries = [
            Entry(name, value.dtype, tuple(value.shape), partial(torch.Tensor.cpu, value))
            for name, value in tensors.items()
        ]
        file, _ = write_safetensors(self._uri(len(losses), learner.worker), entries)
        rows = learner.gather(
            [file.size, *bytes.fromhex(file.sha256)]
        )  # from here on all of them are there
        if learner.worker == 0:
            records = [FileRecord(size, bytes(digest).hex()) for size, *digest in rows]
            self._write(
                losses,
                seconds,
                {self._name(len(losses), worker): record for worker, record in enumerate(records)},
            )

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

    def _read(self, worker: int, say: Say) -> tuple[list[float], float, dict[str, torch.Tensor]]:
        """Losses, seconds and this worker's state, if there is a savepoint of this owner.

        Raises:
            DamagedRecord: it cannot be trusted.
        """
        record = self._record()
        if record is None:
            return [], 0.0, {}
        theirs, ours = (
            _whose(record["owner"], record["micro_batch"]),
            _whose(self.owner, self.micro_batch),
        )
        if theirs != ours:
            if worker == 0:
                others = ", ".join(
                    f"{key} {theirs.get(key)}, not {value}"
                    for key, value in ours.items()
                    if theirs.get(key) != value
                )
                say(
                    f"  a savepoint of another set-up is left aside ({others}); fine-tuning this group from its beginning"
                )
            return [], 0.0, {}
        losses = record["losses"]
        if not losses:
            return [], 0.0, {}
        uri = self._uri(len(losses), worker)
        try:
            data = storage.read(uri)
        except FileNotFoundError as error:
            raise DamagedRecord(f"{uri} is missing") from error
        if FileRecord.of(data).to_json() != record["files"][self._name(len(losses), worker)]:
            raise DamagedRecord(f"{uri} is not what was written")
        return losses, record["seconds"], safetensors.torch.load(data)

    def _write(self, losses: list[float], seconds: float, files: Mapping[str, FileRecord]) -> None:
        """Put the record in place of the last one, then remove what it does not name."""
        told = {name: file.to_json() for name, file in files.items()}
        self.fence()
        body = {
            "owner": dict(self.owner),
            "micro_batch": self.micro_batch,
            "losses": losses,
            "seconds": seconds,
            "files": told,
        }
        storage.write(storage.join(self.folder, RECORD), sealed(body))
        for name in storage.names(self.folder):
            if name not in (RECORD, *files):
                storage.remove(storage.join(self.folder, name))

    def _name(self, epoch: int, worker: int) -> str:
        """No other set-up's file has this name, so that none is overwritten while a record counts on it."""
        return f"epoch-{epoch:03d}-{checksum(_whose(self.owner, self.micro_batch))[:8]}-worker-{worker}.safetensors"

    def _uri(self, epoch: int, worker: int) -> str:
        return storage.join(self.folder, self._name(epoch, worker))


def _whose(owner: Mapping[str, Any], micro_batch: int) -> dict[str, Any]:
    return {**owner, "micro_batch": micro_batch}
