"""A run's memory: one small immutable record a round in `<output.uri>/<name>.run/`, from which the
same command goes on.

What a round wrote is trusted only through its record, which is created last, holds its own checksum
and those of the files it points at, and is never changed. The folder lives as long as the run: a
finished run's records are in the manifests of what it published.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusegpt_ray.errors import GOES_ON, BudgetSpent, StorageError, UserError
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.run.budget import Budget
from fusegpt_ray.run.done import Done as Done
from fusegpt_ray.run.done import let_go_of, needed_files, numbers, record_file, records
from fusegpt_ray.run.housekeeping import remove_run
from fusegpt_ray.run.identity import differences
from fusegpt_ray.run.lease import Lease, OwnedByAnother
from fusegpt_ray.run.metrics_log import MetricsLog
from fusegpt_ray.run.notes import NOTES, Note, note_file
from fusegpt_ray.store import storage
from fusegpt_ray.store.fence import Fence, nobody_else
from fusegpt_ray.store.records import DamagedRecord, damage, opened, sealed
from fusegpt_ray.store.threads import at_once

ANEW = "use that run's recipe, data and model, another output.name, or --restart, which forgets it"
"""What to do where another run is in the folder."""
_GOES_ON = ("round-", "heal-", "sums-", "scores-", "search-")
"""How files begin from which it is worth to go on. Perplexities and samples alone are not: they are
soon measured again, and a run that fails so early leaves nothing."""


@dataclass
class Journal:
    """The records of one run, in a folder of their own. Only the owner of the run's name writes
    (see `owned`).
    """

    folder: str
    lease: Lease | None = None
    saved: bool = False
    """Whether something is saved from which the same command goes on."""
    ours: bool = False
    """Whether no round is done and nothing in the folder comes from an earlier attempt."""
    budget: Budget | None = None

    @classmethod
    def of(cls, recipe: Recipe) -> Journal:
        folder = f"{recipe.output.name}.run"
        return cls(storage.join(storage.absolute(recipe.output.uri), folder))

    @property
    def blocks_folder(self) -> str:
        """Where the rounds' new blocks lie."""
        return storage.join(self.folder, "blocks")

    def round_folder(self, number: int) -> str:
        """Where the new blocks of one round lie."""
        return storage.join(self.blocks_folder, f"round-{number:03d}")

    def checkpoints_folder(self, number: int) -> str:
        """Where a round's training checkpoints lie, until it is committed."""
        return storage.join(self.round_folder(number), "checkpoints")

    @property
    def started(self) -> bool:
        return storage.exists(self._identity)

    @property
    def exists(self) -> bool:
        """Whether anything is in the folder."""
        return bool(storage.names(self.folder))

    @property
    def fence(self) -> Fence:
        """To be called before a write; it raises `OwnedByAnother` when the name is lost."""
        return self.lease.fence.check if self.lease else nobody_else

    def creating(self) -> AbstractContextManager[None]:
        """A context for creating what no other run may create (see `Lease.creating`)."""
        return self.lease.creating() if self.lease else nullcontext()

    @contextmanager
    def owned(
        self,
        say: Callable[[str], None],
        doing: Callable[[], str],
        facts: Callable[[], Mapping[str, Any]],
        log: MetricsLog | None = None,
    ) -> Iterator[Journal]:
        """This journal for writing: while the block lasts, no other run has the name.

        An exception that ends the block gets a note if the same command can go on from what is
        saved. If nothing is saved, or if the user made a mistake and no round is done, nothing
        stays of a run that began here.

        Raises:
            OwnedByAnother: another run has the name, or took it over.
        """
        folders = storage.missing_folders(self.folder)
        with Lease.take(self.folder, say, doing, facts, log) as lease:
            names = storage.names(self.folder)
            saved = any(name.startswith(_GOES_ON) for name in names)
            journal = Journal(self.folder, lease, saved, "identity.json" not in names, self.budget)
            try:
                yield journal
            except BaseException as error:
                journal._ends(error, folders)
                raise

    def _ends(self, error: BaseException, folders: list[Path]) -> None:
        """Removes what an exception that ends the run leaves, or notes that it can be resumed."""
        if isinstance(error, OwnedByAnother):
            return  # something here is another run's, which may still go on
        try:
            self.fence()
            if not self.saved or (isinstance(error, UserError) and self.ours):
                self.remove()
                storage.remove_empty(folders)
                return
        except OwnedByAnother as lost:
            if not isinstance(error, Exception):
                return
            raise lost from error
        except StorageError as failed:
            error.add_note(f"what the run left was not looked at: {failed}")
        # These would end the run in the same way again: they need another recipe.
        if self.saved and not isinstance(error, UserError | FloatingPointError | BudgetSpent):
            error.add_note(GOES_ON)

    def begin(self, this: Mapping[str, Any], say: Callable[[str], None] = lambda _: None) -> None:
        """Start the run of this identity, or go on with it. Another run that has finished no round
        is forgotten.

        Raises:
            UserError: another run is in this folder; the message shows what differs, key by key.
        """
        self.fence()
        try:
            storage.create(self._identity, sealed(this))
        except FileExistsError:
            self.check(this)
            if self._other(this):
                say("an earlier attempt of another recipe had finished no round: beginning anew")
                self.clear()
                with self.creating():
                    storage.create(self._identity, sealed(this))

    def check(self, this: Mapping[str, Any], fix: str = ANEW) -> None:
        """
        Raises:
            UserError: another run with finished rounds is here, as far as `this` part of an
                identity tells.
        """
        if numbers(self.folder) and (problem := self._other(this)):
            name = self.folder.rsplit("/", 1)[-1].removesuffix(".run")
            raise UserError("output.name", name, problem, fix)

    def _other(self, this: Mapping[str, Any]) -> str:
        """How the run that is here differs from this (part of an) identity, in words."""
        if not self.started:
            return ""
        try:
            there = opened(storage.read(self._identity))
        except DamagedRecord as error:
            damaged = f"its identity.json is damaged ({error})"
            return f"an unfinished run is in {self.folder}, and {damaged}"
        theirs = {key: there.get(key) for key in this}
        found = [
            f"{key} = {old!r}, this one has {new!r}"
            for key, old, new in differences(theirs, json.loads(json.dumps(this)))
        ]
        return f"an unfinished run in {self.folder} has " + "; and ".join(found) if found else ""

    def commit(self, number: int, done: Done) -> None:
        """Record round `number` (from 1) as done, then remove its training checkpoints."""
        with self.creating():
            storage.create(record_file(self.folder, number), sealed(done.to_json()))
        self.saved, self.ours = True, False
        self._forget_checkpoints(number)

    def healed_folder(self, rounds: int) -> str:
        """Where the healed blocks lie of the model after so many rounds."""
        return storage.join(self.blocks_folder, f"heal-{rounds:03d}")

    def commit_healed(self, rounds: int, key: str, healed: Done) -> None:
        """Record that this model is healed, then remove the training checkpoints.

        Args:
            key: names the rounds before and the healing.
        """
        with self.creating():
            body = {"key": key, **healed.to_json()}
            storage.write(self._healed_file(rounds), sealed(body))
        self._forget_healing(rounds)

    def healed(self, rounds: int, key: str, say: Callable[[str], None]) -> Done | None:
        """What `commit_healed` recorded under this key, if all of it is still there."""
        file = self._healed_file(rounds)
        if not storage.exists(file):
            return None
        try:
            body = opened(storage.read(file))
        except DamagedRecord as error:
            say(f"WARNING: {file} is damaged ({error}); healing again")
            return None
        if body["key"] != key:
            return None
        healed = Done.from_json(body)
        damages = at_once(lambda file: damage(*file), [*healed.files.items()])
        if problem := next(filter(None, damages), None):
            say(f"WARNING: a file of {file} {problem}; healing again")
            return None
        self._forget_healing(rounds)  # what a kill just after the record may have left
        return healed

    def keep(self, kind: Note, number: int, note: Any) -> None:
        """Note something about round `number` before it is done, so that a kill does not lose it.
        A later note takes its place.
        """
        self.fence()
        storage.write(self._note(kind, number), sealed({"note": note}))
        self.saved |= f"{kind}-" in _GOES_ON
        self.pause()

    def pause(self) -> None:
        """Everything so far is saved: raises BudgetSpent where the run is to stop."""
        if self.budget and self.saved:
            self.budget.check()

    def pause_training(self, folder: str, part: int) -> None:
        """The same after a part of a training whose checkpoints are in `folder`."""
        if self.budget:
            self.budget.check_training(folder, part)

    def kept(self, kind: Note, number: int, say: Callable[[str], None]) -> Any:
        """What `keep` noted, or None."""
        file = self._note(kind, number)
        if not storage.exists(file):
            return None
        try:
            return opened(storage.read(file))["note"]
        except DamagedRecord as error:
            say(f"WARNING: {file} is damaged ({error}); measuring again")
            return None

    def forget(self, kind: Note, number: int) -> None:
        storage.remove(self._note(kind, number))

    def rounds(self, wanted: Iterable[int], say: Callable[[str], None]) -> list[Done]:
        """The rounds done so far, in order, as far as they can be trusted.

        The records are checked, and the files that are still needed for the models after the last
        round and after the rounds `wanted`. The first damaged or missing one ends the list: `say`
        tells which, and its record and all later ones are removed.

        Raises:
            UserError: a model is asked for of which this run no longer has the blocks.
        """
        done, problem = records(self.folder)
        good: set[str] = set()
        while done:
            written = {
                uri: (number, record)
                for number, d in enumerate(done, 1)
                for uri, record in d.files.items()
            }
            needed = needed_files(done, {len(done), *wanted}) & written.keys()
            unseen = [(uri, written[uri][1]) for uri in sorted(needed - good)]
            damages = at_once(lambda file: damage(*file), unseen)
            found = zip((uri for uri, _ in unseen), damages, strict=True)
            bad = next(((uri, what) for uri, what in found if what), None)
            if bad is None:
                break
            good |= {uri for uri in needed if uri < bad[0]}
            problem = f"{bad[0]} {bad[1]}"
            if bad[0] not in needed_files(done, {len(done)}) and not storage.exists(bad[0]):
                raise let_go_of(bad[0], len(done))
            done = done[: written[bad[0]][0] - 1]
        if problem:
            say(f"WARNING: {problem}; going back to the end of round {len(done)}")
            self.fence()
            for number in numbers(self.folder):
                if number > len(done):
                    storage.remove(record_file(self.folder, number))
                    for kind in NOTES:
                        self.forget(kind, number + 1)  # of the stack after it
        if done:  # what a kill just after its commit may have left
            self._forget_checkpoints(len(done))
            self.let_go(done, wanted)
        return done

    def let_go(self, done: Sequence[Done], wanted: Iterable[int]) -> None:
        """Remove block files that no later step needs.

        The run goes on from the model after the last of these rounds. It goes back to the one
        before if that round's record or files are damaged. And it publishes those after the rounds
        `wanted`.
        """
        needed = needed_files(done, {len(done), len(done) - 1, *wanted})
        superseded = {uri for round in done for uri in round.files} - needed
        if superseded:
            there = {
                storage.join(self.blocks_folder, name) for name in storage.below(self.blocks_folder)
            }
            for uri in sorted(superseded & there):
                self.fence()
                storage.remove(uri)

    def clear(self) -> None:
        """Forget the run, but keep the name."""
        self.fence()
        remove_run(self.folder, keep_lease=True)
        self.saved, self.ours = False, True
        if self.budget:
            self.budget.forget()

    def remove(self) -> None:
        """Forget the run and give up its name, once all its models are published."""
        self.fence()
        if self.lease:
            self.lease.stop()
        remove_run(self.folder)

    def _healed_file(self, rounds: int) -> str:
        return storage.join(self.folder, f"heal-{rounds:03d}.json")

    def _forget_healing(self, rounds: int) -> None:
        folder = storage.join(self.healed_folder(rounds), "checkpoints")
        storage.remove(folder, recursive=True)

    def _forget_checkpoints(self, number: int) -> None:
        storage.remove(self.checkpoints_folder(number), recursive=True)

    @property
    def _identity(self) -> str:
        return storage.join(self.folder, "identity.json")

    def _note(self, kind: Note, number: int) -> str:
        return storage.join(self.folder, note_file(kind, number))
