"""Who owns a run's name: exactly one process, decided by the store's exclusive create.

A lease is a small file in the run's folder, `lease-000001.json`: created once, never changed, it
names its owner. The owner renews it by a heartbeat, `heartbeat.json`. A newcomer watches the
last lease. When neither it nor its heartbeat has changed for `EXPIRY` seconds by the newcomer's own
clock (those of two machines need not agree), or it is known to have ended, the newcomer creates
the next lease; of several that try, one succeeds. Whoever finds that the last lease is not its
own has lost the name and writes nothing more: it looks before every record. So a late heartbeat, on
a busy machine, costs the run its name but never its bytes. Light: no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fusegpt_ray.errors import StorageError, UserError
from fusegpt_ray.run.metrics_log import MetricsLog
from fusegpt_ray.store import storage
from fusegpt_ray.store.records import DamagedRecord, opened, sealed

HEARTBEAT = "heartbeat.json"
LEASE = re.compile(r"lease-(\d{6,})\.json")
EVERY = 20.0
"""Seconds between two heartbeats."""
EXPIRY = 120.0
"""Seconds without a heartbeat, as a newcomer observes them, after which a lease has expired."""
Say = Callable[[str], None]


class OwnedByAnother(UserError):
    """Another run owns the name: this one must stop and write nothing more."""


@dataclass(frozen=True)
class Owner:
    """A process that works, or worked, under a run's name."""

    id: str
    host: str
    machine: str
    """Tells apart machines, their boots, and containers; empty where that is not known."""
    pid: int
    born: int
    """When the process began: another may get its number later."""
    since: str
    """When it took the name."""

    @classmethod
    def this(cls) -> Owner:
        """This process, anew for each name that it takes."""
        machine = _machine()
        born = _life(os.getpid())[1] if machine else 0
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        return cls(secrets.token_hex(8), socket.gethostname(), machine, os.getpid(), born, since)

    def __str__(self) -> str:
        since = f", since {self.since}" if self.since else ""
        return f"{self.host} (process {self.pid}{since})"

    def lives(self) -> bool | None:
        """Whether its process still runs, as far as this machine can tell."""
        if not self.machine or self.machine != _machine() or self.pid == os.getpid():
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # it is another user's
            pass
        try:
            state, born = _life(self.pid)
        except OSError:
            return None
        if born != self.born or state in "ZX":
            return False
        return None if state in "Tt" else True  # a stopped process may never go on


@dataclass(frozen=True)
class Standing:
    """The last lease of a run's folder, and its owner's last heartbeat."""

    generation: int
    owner: Owner
    heartbeat: Mapping[str, Any]
    """Empty if there is none."""

    @classmethod
    def look(cls, folder: str) -> Standing | None:
        """Nothing where nobody has ever had the name, or its last owner has finished."""
        last, heartbeat = _last(folder), read_heartbeat(folder)
        if last is None:
            return _without_lease(heartbeat)
        generation, owner = last
        return cls(generation, owner, heartbeat if heartbeat.get("owner") == owner.id else {})

    @property
    def doing(self) -> str:
        return str(self.heartbeat.get("doing") or "just started")

    @property
    def over(self) -> bool:
        """The owner said that it ended, or its process is known to be gone."""
        return "ended" in self.heartbeat or self.owner.lives() is False


@dataclass(frozen=True)
class Fence:
    """Asked before every write of a run, by whichever of its processes writes (so it is small)."""

    folder: str
    owner: str
    """The id."""

    def check(self) -> None:
        """
        Raises:
            OwnedByAnother: the name has another owner by now.
        """
        last = _last(self.folder)
        if last and last[1].id == self.owner:
            return
        there = Standing.look(self.folder)
        if there is None:
            problem = f"{self.folder} is gone: another run finished there, or somebody removed it"
            fix = f"look what is there (fusegpt status {_place(self.folder)}) before you go on"
        else:
            problem = f"this run lost its name to one on {there.owner}: {there.doing}"
            rule = f"a run that sends no heartbeat for {EXPIRY:.0f} s is taken for dead"
            fix = f"leave it to that run ({rule}; fusegpt status {_place(self.folder)} shows it)"
        raise OwnedByAnother("output.name", _name(self.folder), problem, fix)


class Lease:
    """One process's ownership of a run's name. While the block lasts, a thread renews it, and
    writes what is new of the run's events (where they are not written at once).

    A heartbeat that cannot be written is left out: it tells of the run and must not end it. If an
    exception ends the block, a last heartbeat names it, and the next run need not wait. After a
    block that ends well nothing is written: by then the run's folder has been removed.
    """

    def __init__(
        self,
        folder: str,
        owner: Owner,
        doing: Callable[[], str],
        facts: Callable[[], Mapping[str, Any]],
        log: MetricsLog,
    ) -> None:
        self.folder, self.fence = folder, Fence(folder, owner.id)
        self._owner, self._doing, self._facts, self._log = owner, doing, facts, log
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    @classmethod
    def take(
        cls,
        folder: str,
        say: Say,
        doing: Callable[[], str] = str,
        facts: Callable[[], Mapping[str, Any]] = dict,
        log: MetricsLog | None = None,
    ) -> Lease:
        """Own the name: at once, or when its last owner has ended or its lease has expired.

        Args:
            doing, facts: what heartbeats tell.

        Raises:
            OwnedByAnother: a process that is alive owns it, or was faster.
        """
        while True:
            last = _wait(folder, say)
            owner = Owner.this()
            claim(folder, last, owner)
            now = Standing.look(folder)  # what is there tells who won
            if now and now.owner.id == owner.id:
                log = log or MetricsLog()
                lease = cls(folder, owner, doing, facts, log)
                log.begin(folder, now.generation, lease.fence.check)
                return lease
            if now:
                raise _at_work(folder, now)

    def __enter__(self) -> Self:
        self._beat()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
        if kind:
            self._beat(ended=kind.__name__)

    def stop(self) -> None:
        """Send no more heartbeats, so that none comes after the removal of the run's folder."""
        self._stop.set()
        self._thread.join()
        self._log.end()

    @contextlib.contextmanager
    def creating(self) -> Iterator[None]:
        """What the block creates exclusively is this run's.

        Raises:
            OwnedByAnother: the name is lost, or another run created the same.
        """
        self.fence.check()
        try:
            yield
        except FileExistsError as error:
            self.fence.check()
            problem = f"another run, which was taken for dead, wrote the same meanwhile ({error})"
            fix = "run the same command again once that run has stopped: it finds what was finished"
            raise OwnedByAnother("output.name", _name(self.folder), problem, fix) from error

    def _renew(self) -> None:
        while not self._stop.wait(EVERY):
            self._beat()

    def _beat(self, **more: str) -> None:
        owner = {"owner": self._owner.id, "host": self._owner.host, "pid": self._owner.pid}
        told = {"time": time.time(), **owner, "doing": self._doing(), **more}
        with contextlib.suppress(Exception):  # whatever the store raises; or the name is lost
            self.fence.check()
            file = storage.join(self.folder, HEARTBEAT)
            storage.write(file, json.dumps({**self._facts(), **told}).encode(), retry_for=0)
            self._log.write()


def claim(folder: str, last: Standing | None, owner: Owner) -> bool:
    """Create the lease that follows `last`; whether nobody else was faster."""
    try:
        storage.create(_file(folder, last.generation + 1 if last else 1), sealed(asdict(owner)))
    except FileExistsError:
        return False
    return True


def _wait(folder: str, say: Say) -> Standing | None:
    """The last lease, once it binds nobody any more.

    Raises:
        OwnedByAnother: its owner is alive.
    """
    first = Standing.look(folder)
    if first is None or first.over:
        return first
    if first.owner.lives():
        raise _at_work(folder, first)
    began = time.monotonic()
    seen = f"a run of this name was alive on {first.owner}"
    say(f"{seen}; waiting up to {EXPIRY:.0f} s to see whether it still is")
    while True:
        waited = time.monotonic() - began  # known before the look, which then covers all of it
        now = Standing.look(folder)
        if now is None or now.over:
            return now
        if now != first:
            raise _at_work(folder, now)
        if waited >= EXPIRY:
            return now
        time.sleep(EVERY / 10)


def _at_work(folder: str, owned: Standing) -> OwnedByAnother:
    problem = f"a run of this name is at work on {owned.owner}: {owned.doing}"
    shown = f"fusegpt status {_place(folder)} shows it"
    fix = f"wait for it ({shown}), stop it, or choose another output.name"
    return OwnedByAnother("output.name", _name(folder), problem, fix)


def _last(folder: str) -> tuple[int, Owner] | None:
    """The last lease: its generation, and whose it is."""
    while found := [int(m[1]) for name in storage.names(folder) if (m := LEASE.fullmatch(name))]:
        generation = max(found)
        try:
            return generation, Owner(**opened(storage.read(_file(folder, generation))))
        except FileNotFoundError:  # it has just been removed
            continue
        except (DamagedRecord, TypeError):
            unknown = "a machine unknown (its lease is damaged)"
            return generation, Owner("", unknown, "", 0, 0, "")
    return None


def _without_lease(heartbeat: Mapping[str, Any]) -> Standing | None:
    """A folder of a version before leases: its heartbeat alone tells whose it is."""
    if not {"host", "pid"} <= heartbeat.keys():
        return None
    return Standing(0, Owner("", heartbeat["host"], "", heartbeat["pid"], 0, ""), heartbeat)


def read_heartbeat(folder: str) -> dict[str, Any]:
    """The last heartbeat, whoever sent it; empty if there is none that can be read."""
    try:
        heartbeat = storage.read_json(storage.join(folder, HEARTBEAT))
    except StorageError:
        raise
    except (OSError, ValueError, RecursionError):  # none, or none that can be read
        return {}
    return heartbeat if isinstance(heartbeat, dict) else {}


def _file(folder: str, generation: int) -> str:
    return storage.join(folder, f"lease-{generation:06d}.json")


def _name(folder: str) -> str:
    return folder.rsplit("/", 1)[-1].removesuffix(".run")


def _place(folder: str) -> str:
    return folder.rsplit("/", 1)[0]


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return ""


def _life(pid: int) -> tuple[str, int]:
    """A process's state, and its beginning in ticks since the boot: no clock that is set alters it.

    (psutil tells the beginning by the wall clock only.)
    """
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], int(fields[19])
