"""A run's memory: one small immutable record a round in `<output.uri>/<name>.run/`, from which the same command goes on.

What a round wrote is trusted only through its record, which is created last, holds its own checksum and those of the files it points
at, and is never changed. The folder lives as long as the run: a finished run's records are in the manifests of what it published.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import torch

from fusegpt_ray.errors import UserError
from fusegpt_ray.fusion import savepoint
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.recipe import Recipe
from fusegpt_ray.run.housekeeping import remove_run
from fusegpt_ray.store import storage
from fusegpt_ray.store.records import DamagedRecord, FileRecord, damage, opened, sealed

METHOD_VERSION = 2
"""Raised whenever the same recipe would give another model than before."""
Note = Literal["sums", "scores"]
"""Of a round that is under way: what its scoring has measured so far, and what it found."""


def identity(recipe: Recipe, windows_sha256: str, dense: Stack, dtype: torch.dtype) -> dict[str, Any]:
    """What a run may not change and still be resumed: all of the recipe that shapes the result, the data and the model.

    Reads all of a local model's weights once, for their checksums; an object store is asked for its own.
    """
    refs = [ref for block in dense.blocks for ref in block.weights.values()] + list(dense.trunk.values())
    files = {uri.rsplit("/", 1)[-1]: storage.fingerprint(uri) for uri in sorted({ref.file for ref in refs})}
    return {
        **settings(recipe),
        "arithmetic": str(dtype).removeprefix("torch."),
        "windows_sha256": windows_sha256,
        "model": {"config": dict(dense.config), "files": files},
    }


def settings(recipe: Recipe) -> dict[str, Any]:
    """The part of the identity that needs neither data nor model."""
    shaping = recipe.model_dump(mode="json", exclude={"cluster", "output", "evaluation", "sparsity"})
    return {"method_version": METHOD_VERSION, "recipe": shaping}


@dataclass(frozen=True)
class Done:
    """A round that is finished."""

    record: Mapping[str, Any]
    """What the manifest tells of it."""
    stack: Stack
    """The model after it."""
    files: Mapping[str, FileRecord]
    """What it wrote, by URI."""

    def to_json(self) -> dict[str, Any]:
        files = {uri: file.to_json() for uri, file in self.files.items()}
        return {"round": dict(self.record), "stack": self.stack.to_json(), "files": files}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        files = {uri: FileRecord.from_json(file) for uri, file in data["files"].items()}
        return cls(data["round"], Stack.from_json(data["stack"]), files)


@dataclass(frozen=True)
class Journal:
    """The records of one run, at a folder of their own."""

    folder: str

    @classmethod
    def of(cls, recipe: Recipe) -> Journal:
        return cls(storage.join(storage.absolute(recipe.output.uri), f"{recipe.output.name}.run"))

    @property
    def blocks_folder(self) -> str:
        """Where the rounds' new blocks lie."""
        return storage.join(self.folder, "blocks")

    def round_folder(self, number: int) -> str:
        """Where those of one round lie, and until it is committed its savepoints."""
        return storage.join(self.blocks_folder, f"round-{number:03d}")

    @property
    def started(self) -> bool:
        return storage.exists(self._identity)

    def begin(self, this: Mapping[str, Any]) -> bool:
        """Start, or go on with, the run of this identity; whether it was started here.

        Raises:
            UserError: another run is in this folder; the message shows what differs, key by key.
        """
        try:
            storage.create(self._identity, sealed(this))
        except FileExistsError:
            self.check(this)
            return False
        return True

    @contextmanager
    def begun(self, this: Mapping[str, Any]) -> Iterator[None]:
        """`begin`; and if the block ends with a user's mistake before its first round is done, nothing of a run started here stays."""
        folders = storage.missing_folders(self.folder)
        started = self.begin(this)
        try:
            yield
        except UserError:
            if started and not self._numbers():
                self.remove()
                storage.remove_empty(folders)
            raise

    def check(self, this: Mapping[str, Any]) -> None:
        """Raise as `begin` does if another run is here, as far as `this` part of an identity tells."""
        if not self.started:
            return
        name = self.folder.rsplit("/", 1)[-1].removesuffix(".run")
        fix = "use the recipe, data and model of that run, choose another output.name, or remove that folder"
        try:
            there = opened(storage.read(self._identity))
        except DamagedRecord as error:
            problem = f"an unfinished run is in {self.folder}, and its identity.json is damaged ({error})"
            raise UserError("output.name", name, problem, fix) from error
        theirs = {key: there.get(key) for key in this}
        found = [f"{key} = {old!r}, this one has {new!r}" for key, old, new in _differences(theirs, json.loads(json.dumps(this)))]
        if found:
            raise UserError("output.name", name, f"an unfinished run in {self.folder} has " + "; and ".join(found), fix)

    def commit(self, number: int, done: Done) -> None:
        """Record round `number` (from 1) as done; only then do its savepoints go."""
        storage.create(self._file(number), sealed(done.to_json()))
        self._forget_savepoints(number)

    def keep(self, kind: Note, number: int, note: Any) -> None:
        """Note something about round `number` before it is done, so that a kill does not cost it. A later note takes its place."""
        storage.write(self._note(kind, number), sealed({"note": note}))

    def kept(self, kind: Note, number: int, say: Callable[[str], None]) -> Any:
        """What `keep` noted, or None."""
        file = self._note(kind, number)
        if not storage.exists(file):
            return None
        try:
            return opened(storage.read(file))["note"]
        except DamagedRecord as error:
            say(f"WARNING: {file} is damaged ({error}); scoring again")
            return None

    def forget(self, kind: Note, number: int) -> None:
        storage.remove(self._note(kind, number))

    def rounds(self, wanted: Iterable[int], say: Callable[[str], None]) -> list[Done]:
        """The rounds done so far, in order, as far as they can be trusted.

        Checked are the records, and the files that the model after the last round and those after the rounds `wanted` still need. The
        first damaged or missing one ends the list: `say` tells which, and it and all later records are removed.
        """
        done, problem = self._records()
        good: set[str] = set()
        while done:
            written = {uri: (number, record) for number, d in enumerate(done, 1) for uri, record in d.files.items()}
            needed = {uri for n in {len(done), *wanted} if 0 < n <= len(done) for uri in _files(done[n - 1].stack)} & set(written)
            found = ((uri, damage(uri, written[uri][1])) for uri in sorted(needed - good))
            bad = next(((uri, what) for uri, what in found if what), None)
            if bad is None:
                break
            good |= {uri for uri in needed if uri < bad[0]}
            problem = f"{bad[0]} {bad[1]}"
            done = done[: written[bad[0]][0] - 1]
        if problem:
            say(f"WARNING: {problem}; going back to the end of round {len(done)}")
            for number in self._numbers():
                if number > len(done):
                    storage.remove(self._file(number))
                    for kind in get_args(Note):
                        self.forget(kind, number + 1)  # of the stack after it
        if done:
            self._forget_savepoints(len(done))  # which a kill just after its commit may have left
        return done

    def remove(self) -> None:
        """Forget the run, once all its models are published."""
        remove_run(self.folder)

    def _forget_savepoints(self, number: int) -> None:
        storage.remove(savepoint.folder_of(self.round_folder(number)), recursive=True)

    @property
    def _identity(self) -> str:
        return storage.join(self.folder, "identity.json")

    def _file(self, number: int) -> str:
        return storage.join(self.folder, f"round-{number:03d}.json")

    def _note(self, kind: Note, number: int) -> str:
        return storage.join(self.folder, f"{kind}-{number:03d}.json")

    def _numbers(self) -> list[int]:
        names = [name for name in storage.names(self.folder) if name.startswith("round-")]
        return sorted(int(name.removeprefix("round-").removesuffix(".json")) for name in names)

    def _records(self) -> tuple[list[Done], str]:
        """The records that can be read, from the first on, and what is wrong with the next one."""
        done: list[Done] = []
        for number in self._numbers():
            if number != len(done) + 1:
                return done, f"{self._file(len(done) + 1)} is missing"
            try:
                done.append(Done.from_json(opened(storage.read(self._file(number)))))
            except DamagedRecord as error:
                return done, f"{self._file(number)} is damaged ({error})"
        return done, ""


def _files(stack: Stack) -> set[str]:
    """All files a stack points at, besides its trunk's."""
    refs = [ref for block in stack.blocks for ref in block.weights.values()]
    for block in stack.blocks:
        if block.terms:
            refs += [ref for part in (block.terms.base, block.terms.learned, *block.terms.donors) for ref in part.values()]
    return {ref.file for ref in refs}


def _differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two JSON values differ: key path, old and new value."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))
    elif old != new:
        yield path, old, new
