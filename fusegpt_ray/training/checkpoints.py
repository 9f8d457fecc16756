"""Training checkpoints: what the training of a span has learned so far. A killed run goes on from
the last one and ends with the same bytes.

- Each worker writes its own part of the state as a safetensors file. A sealed record, written after
  all of them, names the files that count, with their checksums; other files mean nothing.
- A file is read once, piece by piece into the memory that it then stays in, and what is checked is
  what is then loaded.
- Workers decide together whether a checkpoint is due, because their clocks differ, and whether the
  last one is good.
- A checkpoint counts only for the same span of the same stack, trained in the same way. If it
  passed fewer windows at once than was asked, memory had run out with more. Training that goes on
  from it begins with as few, and so ends as if it had never stopped.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fusegpt_ray.errors import UserError
from fusegpt_ray.run.notes import CHECKPOINT
from fusegpt_ray.store import storage
from fusegpt_ray.store.checkpoint import read_header, read_tensors
from fusegpt_ray.store.ranges import EndedEarly
from fusegpt_ray.store.records import DamagedRecord, FileRecord, checksum, opened, sealed
from fusegpt_ray.store.writer import entries_of, write_safetensors
from fusegpt_ray.training.stepper import Stepper
from fusegpt_ray.training.validation import Validation

LOSSES = "losses"
"""In a worker's file: those of the steps after the last whole part, on this worker."""
Log = Callable[[str], None]
"""Takes a line for the person who waits."""


@dataclass
class Progress:
    """How far a training has come."""

    means: list[float] = field(default_factory=list)
    """Mean losses of the whole parts."""
    losses: list[torch.Tensor] = field(default_factory=list)
    """Of the steps since then, on this worker: scalars on the device."""
    held_out: list[float] = field(default_factory=list)
    """See `Validation`."""
    seconds: float = 0.0
    """That it took until now."""

    def in_words(self, parts: int) -> str:
        steps = len(self.losses)
        some = f" and {steps} step{'s' * (steps > 1)}" if steps else ""
        return f"part {len(self.means)} of {parts}{some}"


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
        fewer._write(Progress(), {})
        return fewer

    def restore(
        self, stepper: Stepper, parts: int, log: Log, validation: Validation | None = None
    ) -> Progress:
        """Load the last checkpoint, if there is a good one.

        Called by all workers at once; where one finds damage, all begin anew.
        """
        so_far, state = Progress(), dict[str, torch.Tensor]()
        good, anew = True, "training from the beginning"
        try:
            so_far, state = self._read(stepper.worker, log)
        except DamagedRecord as error:
            good = False
            log(f"WARNING: {error}; {anew}")
        found = stepper.gather([len(so_far.means), len(so_far.losses), good])
        if any(row != [*found[0][:2], True] for row in found):
            if stepper.worker == 0:
                if good:
                    log(f"WARNING: not every worker finds the training checkpoint good; {anew}")
                self._write(Progress(), {})  # keeps the number of windows at once
            return Progress()
        if state:
            stepper.load(state)
            if validation:
                validation.load(so_far.held_out, state, stepper)
            so_far.losses = [loss.to(stepper.device) for loss in so_far.losses]
            if stepper.worker == 0:
                log(f"  going on after {so_far.in_words(parts)}")
        return so_far

    def due(self, since: float) -> bool:
        """Whether the last checkpoint or the beginning, at that monotonic time, is long enough ago,
        by this worker's clock.
        """
        return time.monotonic() - since >= 60 * self.minutes

    def save(
        self, stepper: Stepper, so_far: Progress, validation: Validation | None = None
    ) -> None:
        """Make a checkpoint. Called by all workers at once."""
        self.fence()
        state = stepper.state()
        if validation:
            state |= validation.state(moved=bool(so_far.losses))
        if so_far.losses:
            state[LOSSES] = torch.stack(so_far.losses)
        file, _ = write_safetensors(self._uri(so_far, stepper.worker), entries_of(state))
        # Once the rows are here, so are all files.
        rows = stepper.gather([file.size, *bytes.fromhex(file.sha256)])
        if stepper.worker == 0:
            names = (self._name(so_far, worker) for worker in range(len(rows)))
            records = (FileRecord(size, bytes(digest).hex()) for size, *digest in rows)
            self._write(so_far, dict(zip(names, records, strict=True)))

    def _record(self) -> dict[str, Any] | None:
        """
        Raises:
            DamagedRecord: there is one, and it is not what was written.
        """
        uri = storage.join(self.folder, CHECKPOINT)
        try:
            return opened(storage.read(uri))
        except FileNotFoundError:
            return None
        except DamagedRecord as error:
            raise DamagedRecord(f"{uri} is damaged ({error})") from error

    def _read(self, worker: int, log: Log) -> tuple[Progress, dict[str, torch.Tensor]]:
        """How far training has come, and this worker's state, if there is a checkpoint of this
        owner.

        Raises:
            DamagedRecord: it cannot be trusted.
        """
        nothing = Progress(), dict[str, torch.Tensor]()
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
        if not record["files"]:
            return nothing
        name = next(name for name in record["files"] if name.endswith(_of(worker)))
        uri = storage.join(self.folder, name)
        state = _state(uri, FileRecord.from_json(record["files"][name]))
        losses = [*state.pop(LOSSES, torch.empty(0))]
        return Progress(record["losses"], losses, record["held_out"], record["seconds"]), state

    def _write(self, so_far: Progress, files: Mapping[str, FileRecord]) -> None:
        """Replace the record, then remove the files that it does not name."""
        self.fence()
        body = {
            "owner": dict(self.owner),
            "micro_batch": self.micro_batch,
            "losses": so_far.means,
            "held_out": so_far.held_out,
            "seconds": so_far.seconds,
            "files": {name: file.to_json() for name, file in files.items()},
        }
        storage.write(storage.join(self.folder, CHECKPOINT), sealed(body))
        for name in storage.names(self.folder):
            if name not in (CHECKPOINT, *files):
                storage.remove(storage.join(self.folder, name))

    def _name(self, so_far: Progress, worker: int) -> str:
        """Files of another set-up, or after another step, have other names, so that none is
        overwritten while a record counts on it.
        """
        owner = checksum(self._whose())[:8]
        steps = f"-step-{len(so_far.losses):06d}" if so_far.losses else ""
        return f"part-{len(so_far.means):03d}{steps}-{owner}{_of(worker)}"

    def _uri(self, so_far: Progress, worker: int) -> str:
        return storage.join(self.folder, self._name(so_far, worker))

    def _whose(self) -> dict[str, Any]:
        return {**self.owner, "micro_batch": self.micro_batch}


def _state(uri: str, written: FileRecord) -> dict[str, torch.Tensor]:
    """The tensors of a worker's file, held once.

    Raises:
        DamagedRecord: it is not what was written.
    """
    other = DamagedRecord(f"{uri} is not what was written")
    try:
        if storage.size(uri) != written.size:
            raise other
        refs = read_header(uri, "")
        (head,) = storage.read_ranges(uri, [(0, min(ref.begin for ref in refs.values()))])
        digest = hashlib.sha256(head)
        state = read_tensors(refs, digest.update)
    except FileNotFoundError as error:
        raise DamagedRecord(f"{uri} is missing") from error
    except (UserError, EndedEarly) as error:  # no safetensors, or it has shrunk since
        raise other from error
    if digest.hexdigest() != written.sha256:
        raise other
    return state


def _of(worker: int) -> str:
    """The end of the name of a worker's file."""
    return f"-worker-{worker}.safetensors"
