"""Finds what dead runs and pulls left, and removes it when told to: never a finished model, never
a live run. Light: no torch.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fusegpt_ray.errors import UserError
from fusegpt_ray.run.begun import begun, remove_half
from fusegpt_ray.run.lease import EVERY, HEARTBEAT, LEASE, Owner, Standing, claim
from fusegpt_ray.run.outputs import (
    COMPARISONS,
    CURVES,
    DEAD_AFTER,
    FAMILIES,
    GENERATED,
    IDENTITY,
    MODEL,
    RUN_FILE,
    SHARED_FOLDER,
    TRAINING_FOLDER,
    Folder,
    Outputs,
    Run,
)
from fusegpt_ray.store import storage
from fusegpt_ray.store.comparison import TABLE
from fusegpt_ray.store.family import BOARD
from fusegpt_ray.store.manifest import KEY, MANIFEST, PULLING
from fusegpt_ray.uris import refuse_ambiguous

LEAST_AGE = 3 * EVERY
"""Seconds: of a live run, two heartbeats in a row may be late."""


@dataclass(frozen=True)
class Leftover:
    """Something that a run or a pull left, or that one of them still works on."""

    uri: str
    size: int = field(compare=False)  # a run's notes go with the half models before it
    what: str
    """What it is, in words."""
    dead: bool
    """It may be removed."""
    folder: bool = True
    """It is a folder, not a file."""


def leftovers(uri: str, age: float = DEAD_AFTER, unfinished: bool = False) -> list[Leftover]:
    """What could be removed below an output URI, and what could not be and why.

    `age`: seconds without a heartbeat after which a run counts as dead. `unfinished`: runs that
    could go on may be removed as well.

    Raises:
        UserError: it is not a folder in which models and runs lie, or its name could mean another
            place (see `uris.py`); or `age` is so short that live runs count as dead.
    """
    if not age >= LEAST_AGE:
        problem = f"a live run sends a heartbeat only every {EVERY:.0f} s, and one may come late"
        fix = f"give at least {LEAST_AGE / 60:g}, in minutes"
        raise UserError("--age", age / 60, problem, fix)
    refuse_ambiguous(KEY, uri)
    there = Outputs.look(uri)
    for name in (MANIFEST, IDENTITY):
        if name in there.files:
            raise UserError(
                KEY,
                there.uri,
                f"a single model or run (it holds {name})",
                "give the folder it lies in",
            )
    return list(_leftovers(there, age, unfinished))


def clean(
    uri: str,
    age: float = DEAD_AFTER,
    unfinished: bool = False,
    found: Sequence[Leftover] | None = None,
) -> list[Leftover]:
    """Remove what may be removed, each after a second look at it; returns what was removed.

    Args:
        found: what `leftovers` has just found there, if it was asked.
    """
    removed = []
    for item in leftovers(uri, age, unfinished) if found is None else found:
        if not item.dead:
            continue
        of_run = item.uri.endswith(".run")
        owned = Standing.look(item.uri) if of_run else None  # before the second look at it
        if item not in _leftovers(_around(uri, item), age, unfinished):
            continue
        if of_run:
            if not claim(item.uri, owned, Owner.this()):
                continue  # somebody goes on with it
            remove_run(item.uri)
        elif MODEL.fullmatch(item.uri.rsplit("/", 1)[-1]):
            remove_half(item.uri)
        else:
            storage.remove(item.uri, recursive=item.folder)
        removed.append(item)
    return removed


def _around(uri: str, item: Leftover) -> Outputs:
    """What decides about it, as it is now: itself, and what is of the same run; of a text all runs,
    which may need it; of what a comparison or family has, the runs of its cells.
    """
    own, *inside = item.uri.removeprefix(storage.absolute(uri).rstrip("/") + "/").split("/")

    def decides(name: str) -> bool:
        if name == own:
            return True
        if own in (COMPARISONS, FAMILIES):
            return name.endswith(".run") and name.startswith(f"{inside[0]}-")
        if own.startswith(GENERATED.format("")):
            return name.endswith(".run")
        return _run_of(own) in (name, _run_of(name))

    return Outputs.look(uri, decides)


def _run_of(name: str) -> str:
    """The name of the run to which a folder of this name belongs."""
    model = MODEL.fullmatch(name)
    ending = ".run" if name.endswith(".run") else CURVES
    return model["name"] if model else name.removesuffix(ending)


def remove_run(folder: str, keep_lease: bool = False) -> None:
    """Remove what a run wrote into its folder, and the half models that it has begun. Only the
    owner of its name may call this.

    The identity is removed after all records, so that no other run finds records that it did not
    write. The lease is removed last: until then nobody else may begin.
    """
    for model in begun(folder, storage.names(folder)):  # while a note tells that they are ours
        remove_half(model)
    storage.remove(storage.join(folder, "blocks"), recursive=True)
    ours = [name for name in storage.names(folder) if RUN_FILE.fullmatch(name)]
    leases = [name for name in ours if LEASE.fullmatch(name)]
    last = [name for name in (IDENTITY, HEARTBEAT) if name in ours]
    for name in reversed(ours):  # a kill in between leaves the rounds from the first one on
        if name not in (*leases, *last):
            storage.remove(storage.join(folder, name))
    for name in last[:1] if keep_lease else (*last, *leases):
        storage.remove(storage.join(folder, name))
    if not keep_lease and not storage.is_remote(folder):
        storage.remove_empty([Path(storage.filesystem(folder)[1])])


def _leftovers(there: Outputs, age: float, unfinished: bool) -> Iterator[Leftover]:
    runs = {run.name: run for folder in there.folders if (run := folder.run)}
    models = (MODEL.fullmatch(folder.name) for folder in there.folders)
    named = {folder.name.removesuffix(".run") for folder in there.folders}
    named |= {match["name"] for match in models if match}
    # Half models first: if this stops in between, the run's folder beside them still tells what
    # they are.
    for folder in sorted(there.folders, key=lambda folder: folder.run is not None):
        if folder.half:
            name = MODEL.fullmatch(folder.name)["name"]  # type: ignore[index]
            yield Leftover(folder.uri, folder.size, *_half(folder, runs.get(name), age))
        elif run := folder.run:
            yield Leftover(folder.uri, folder.size, *_run(run, age, unfinished))
        elif folder.generated:
            needed = next((run for run in runs.values() if not _run(run, age, unfinished)[1]), None)
            what = "a text that a dense model wrote"
            if needed:
                what += f", perhaps for the run {needed.name}"
            yield Leftover(folder.uri, folder.size, what, not needed and folder.silent() >= age)
        elif folder.curves:
            if folder.name.removesuffix(CURVES) not in named:
                what = "curves, with no run or model of that name beside them"
                yield Leftover(folder.uri, folder.size, what, folder.silent() >= age)
        elif folder.name.endswith(".part") and PULLING in folder.files and "://" not in folder.uri:
            busy = _locked(folder.uri) or folder.silent() < age
            yield Leftover(
                folder.uri, folder.size, "being pulled" if busy else "a pull that stopped", not busy
            )
    for folder in there.comparisons:
        yield from _comparison(folder, list(runs.values()), age, unfinished)
    for name, file in there.files.items():
        probe = Folder(storage.join(there.uri, name), {name: file})
        if name.endswith(".write-test") and file.size == 0 and probe.silent() >= age:
            yield Leftover(probe.uri, 0, "a probe of the output", True, folder=False)


def _half(folder: Folder, run: Run | None, age: float) -> tuple[str, bool]:
    if run is None or folder.uri not in run.begun:
        return "no finished model, but no run here has noted that it began it: not ours", False
    if run.state(age) == "alive":
        return "a model that is being written", False
    return "a model that was never finished", True


def _run(run: Run, age: float, unfinished: bool) -> tuple[str, bool]:
    match run.state(age):
        case "alive":
            return f"a live run ({run.heartbeat.get('doing', 'just started')})", False
        case "remains":
            return "what is left of a run that was being removed", True
        case "published":
            return "a run whose models are all published", True
        case _:
            return f"an unfinished run, can be resumed (rounds done: {len(run.rounds)})", unfinished


def _comparison(
    folder: Folder, runs: Sequence[Run], age: float, unfinished: bool
) -> Iterator[Leftover]:
    """What it, or a family, needs while it works, and what an unfinished one goes on from; tables
    stay.
    """
    kind = "family" if folder.uri.split("/")[-2:-1] == [FAMILIES] else "comparison"
    cells = [run for run in runs if run.name.startswith(f"{folder.name}-")]
    alive = any(run.state(age) == "alive" for run in cells)
    dead = not alive and folder.silent() >= age
    if (training := folder.part(TRAINING_FOLDER)).files:
        what = f"files of training workers, of a {kind}"
        yield Leftover(training.uri, training.size, what, dead)
    if folder.finished_comparison:
        return
    may_go = dead and unfinished
    if (shared := folder.part(SHARED_FOLDER)).files:
        what = f"measurements that runs share, of a {kind} that can be resumed"
        yield Leftover(shared.uri, shared.size, what, may_go)
    for name in {TABLE, BOARD} & folder.files.keys():
        what = f"what is known so far of a {kind} that can be resumed"
        size, uri = folder.files[name].size, storage.join(folder.uri, name)
        yield Leftover(uri, size, what, may_go, folder=False)


def _locked(folder: str) -> bool:
    """A pull on this machine is filling it."""
    directory = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(directory)
    return False
