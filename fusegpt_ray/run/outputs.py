"""What lies below an output URI: finished models, runs, and what dead runs left. Only looks; light:
no torch.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, Literal

from fusegpt_ray.errors import UserError, blaming
from fusegpt_ray.run.begun import BEGUN, begun
from fusegpt_ray.run.begun import MODEL as MODEL
from fusegpt_ray.run.lease import Standing
from fusegpt_ray.run.notes import CHECKPOINT, NOTES
from fusegpt_ray.store import storage
from fusegpt_ray.store.manifest import KEY, MANIFEST, Manifest
from fusegpt_ray.store.records import DamagedRecord, opened
from fusegpt_ray.uris import refuse_secret

DEAD_AFTER = 600.0
"""Seconds without a heartbeat after which a run counts as dead."""
IDENTITY = "identity.json"
State = Literal["alive", "unfinished", "published", "remains"]
"""Of a run: at work; dead, but the same command goes on; dead after it published everything; dead
while its folder was removed."""
_NAMES = rf"identity|heartbeat|({'|'.join(('round', 'heal', 'lease', *NOTES))})-\d+"
RUN_FILE = re.compile(
    rf"\.?(({_NAMES})\.json|{BEGUN}|metrics-\d+\.jsonl)(\.[0-9a-f]{{8}})?|blocks/.+"
)
"""What a run writes into its folder."""
GENERATED = "generated-{}"
"""The folder of a text that a dense model wrote (`preparing/generation.py`), by what shaped it."""
GENERATED_FILE = re.compile(r"\.?part-\d{6}\.json(\.[0-9a-f]{8})?")
CURVES = ".tensorboard"
"""How the folder of TensorBoard's files ends; before it, the run's name."""
CURVES_FILE = re.compile(r"\.?events\.out\.tfevents\.[^/]+")
COMPARISONS = "compare"
"""The folder in which comparisons have theirs; see `comparison/`."""
FAMILIES = "family"
"""The folder in which families have theirs; see `family/`."""
SHARED_FOLDER, TRAINING_FOLDER = "measured", "blocks"
"""In that of a comparison or family: what cells share, and files that live while it works."""
COMPARISON_FILE = re.compile(
    r"\.?(table\.(md|csv|json)|perplexity\.png|report\.html|family\.json|index\.html|leaderboard\.md"
    r"|measured/\.?[a-z]+-[0-9a-f]{32}\.json)(\.[0-9a-f]{8})?|blocks/.+"
)
MODEL_FILE = re.compile(r"[^/]+\.safetensors(\.index\.json|\.[0-9a-f]{8})?|config\.json")
"""Of a model, or of one whose writer was killed in the middle of a file."""


@dataclass(frozen=True)
class File:
    """One file, as the store lists it."""

    size: int
    modified: float
    """When it was written, in seconds since 1970; 0 where the store does not tell."""


@dataclass(frozen=True)
class Folder:
    """A folder and all files below it, by relative path."""

    uri: str
    files: Mapping[str, File]

    @classmethod
    def look(cls, uri: str) -> Folder:
        return cls(uri, {name: _file(info) for name, info in storage.below(uri).items()})

    @property
    def name(self) -> str:
        return self.uri.rsplit("/", 1)[-1]

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files.values())

    @property
    def finished(self) -> bool:
        return MANIFEST in self.files

    @property
    def half(self) -> bool:
        """It looks like a model that was never finished. Whose, a run beside it tells
        (`Run.begun`).
        """
        return (
            bool(MODEL.fullmatch(self.name))
            and not self.finished
            and any(MODEL_FILE.fullmatch(name) for name in self.files)
        )

    @property
    def generated(self) -> bool:
        """It is a text that a dense model wrote."""
        named = re.fullmatch(GENERATED.format("[0-9a-f]{16}"), self.name)
        return bool(named and self.files) and all(map(GENERATED_FILE.fullmatch, self.files))

    @property
    def curves(self) -> bool:
        """It holds TensorBoard's files of a run, and nothing else."""
        ours = bool(self.files) and all(map(CURVES_FILE.fullmatch, self.files))
        return self.name.endswith(CURVES) and ours

    @property
    def finished_comparison(self) -> bool:
        """A comparison or family has written here what it writes in the end."""
        return not {"table.md", "leaderboard.md"}.isdisjoint(self.files)

    @property
    def comparison(self) -> bool:
        """It is what a comparison or family wrote beside the models, and nothing else."""
        return bool(self.files) and all(map(COMPARISON_FILE.fullmatch, self.files))

    def part(self, name: str) -> Folder:
        """A folder in it."""
        inside = f"{name}/"
        files = {
            file.removeprefix(inside): about
            for file, about in self.files.items()
            if file.startswith(inside)
        }
        return Folder(storage.join(self.uri, name), files)

    @property
    def run(self) -> Run | None:
        """The run whose folder this is; one with anything else in it is not a run's."""
        ours = self.files and all(RUN_FILE.fullmatch(name) for name in self.files)
        return Run(self) if self.name.endswith(".run") and ours else None

    def silent(self) -> float:
        """Seconds since something was last written here."""
        return time.time() - max((file.modified for file in self.files.values()), default=0.0)


@dataclass(frozen=True)
class Run:
    """A run that has not removed its folder: alive, dead, or dead after it had published
    everything.
    """

    folder: Folder

    @property
    def name(self) -> str:
        return self.folder.name.removesuffix(".run")

    @property
    def begun(self) -> list[str]:
        """The folders of the models that it has begun to publish and perhaps not finished."""
        return begun(self.folder.uri, self.folder.files)

    @cached_property
    def standing(self) -> Standing | None:
        """Its owner; None where that cannot be read."""
        with suppress(OSError):
            return Standing.look(self.folder.uri)
        return None

    @cached_property
    def heartbeat(self) -> Mapping[str, Any]:
        """The last heartbeat of its owner; empty if there is none that can be read."""
        heartbeat = self.standing.heartbeat if self.standing else {}
        return heartbeat if isinstance(heartbeat.get("time"), float) else {}

    @cached_property
    def rounds(self) -> list[Mapping[str, Any]]:
        """The records of the rounds it has finished, up to the first that cannot be trusted."""
        done: list[Mapping[str, Any]] = []
        while record := (self.body(f"round-{len(done) + 1:03d}.json") or {}).get("round"):
            done.append(record)
        return done

    @cached_property
    def epochs_saved(self) -> int:
        """Epochs of the round it is, or was, working on that its last training checkpoint spares
        it.
        """
        record = self.checkpoint(f"round-{len(self.rounds) + 1:03d}")
        return len(record.get("losses", ()))

    def checkpoint(self, blocks: str) -> dict[str, Any]:
        """What the last training checkpoint of these blocks ("round-001") tells; empty if there is
        none.
        """
        return self.body(f"blocks/{blocks}/checkpoints/{CHECKPOINT}") or {}

    def body(self, name: str) -> dict[str, Any] | None:
        """What one of its records says; None if there is none that can be trusted."""
        if name not in self.folder.files:
            return None
        try:
            return opened(storage.read(storage.join(self.folder.uri, name)))
        except (OSError, DamagedRecord):
            return None

    def silent(self) -> float:
        """Seconds since its last heartbeat, or since anything else was written to its folder."""
        return min(self.folder.silent(), time.time() - self.heartbeat.get("time", 0.0))

    def state(self, age: float = DEAD_AFTER) -> State:
        """What has become of it; `age`: seconds without a heartbeat after which it counts as
        dead, unless its process is seen to live on this machine.
        """
        lives = self.standing is not None and self.standing.owner.lives()
        if "ended" not in self.heartbeat and (lives or self.silent() < age):
            return "alive"
        if IDENTITY not in self.folder.files:
            return "remains"
        wanted = self.heartbeat.get("models", [])
        return "published" if wanted and len(self.published) == len(wanted) else "unfinished"

    @cached_property
    def published(self) -> dict[str, Mapping[str, Any]]:
        """The manifests of the models that it has published, by name."""
        parent, this = self.folder.uri.rsplit("/", 1)[0], self.heartbeat.get("run")
        found = {}
        for name in self.heartbeat.get("models", []):
            with suppress(UserError):  # it is not finished, or damaged
                found[name] = Manifest.read(storage.join(parent, name)).data
        return {name: data for name, data in found.items() if data.get("run", "") == this}


@dataclass(frozen=True)
class Outputs:
    """All that is directly below an output URI and could be ours."""

    uri: str
    folders: tuple[Folder, ...]
    """Finished and half models, runs, their curves, generated texts, and half-pulled folders."""
    files: Mapping[str, File]
    comparisons: tuple[Folder, ...] = ()
    """And families."""

    @classmethod
    def look(cls, uri: str, into: Callable[[str], bool] = lambda name: True) -> Outputs:
        """
        Args:
            into: chooses by name the folders that are looked into; others are as if not there.

        Raises:
            UserError: there is no such folder, or it cannot be reached.
            StorageError: the store fails, and its user cannot mend that.
        """
        refuse_secret(KEY, uri)
        uri = storage.absolute(uri).rstrip("/")
        try:
            storage.filesystem(uri)[0].invalidate_cache()
            with blaming(KEY, uri):
                _, path, entries = storage.entries(uri)
        except UserError:
            raise
        except NotADirectoryError:
            entries = None
        except (ValueError, ImportError, PermissionError) as error:
            raise UserError(
                KEY, uri, f"cannot be reached ({error})", "check the URI and your rights"
            ) from error
        if entries is None:
            raise UserError(
                KEY, uri, "no such folder", "give an output.uri that a run has written to"
            )
        names = sorted(
            entry["name"].rstrip("/").rsplit("/", 1)[-1]
            for entry in entries
            if entry["type"] == "directory"
        )
        names = [name for name in names if into(name)]
        ends, text = (".run", ".part", CURVES), GENERATED.format("")
        ours = [
            name
            for name in names
            if MODEL.fullmatch(name) or name.endswith(ends) or name.startswith(text)
        ]
        found = [entry for entry in entries if entry["type"] == "file"]
        # A file is listed as if it lay in itself.
        files = {
            entry["name"].rsplit("/", 1)[-1]: _file(entry)
            for entry in found
            if entry["name"] != path
        }
        folders = tuple(Folder.look(storage.join(uri, name)) for name in ours)
        kinds = [kind for kind in (COMPARISONS, FAMILIES) if kind in names]
        comparisons = tuple(found for kind in kinds for found in _comparisons(uri, kind))
        return cls(uri, folders, files, comparisons)


def beside(folder: str, run: object) -> list[Mapping[str, Any]]:
    """The manifests of the other models in the same place that this run has published; none where
    that place may not be listed, or the folder's name is not a model's.
    """
    place, _, own = storage.absolute(folder).rstrip("/").rpartition("/")
    named = MODEL.fullmatch(own)
    if not named or not isinstance(run, str):
        return []
    try:
        names = storage.folders(place)
    except (PermissionError, ValueError, NotImplementedError):  # the hub lists no repositories
        return []
    found = []
    for name in names:
        other = MODEL.fullmatch(name)
        if name != own and other and other["name"] == named["name"]:
            with suppress(UserError):  # it is not finished, or damaged
                found.append(Manifest.read(storage.join(place, name)).data)
    return [data for data in found if data.get("run") == run]


def _comparisons(uri: str, kind: str) -> tuple[Folder, ...]:
    every = Folder.look(storage.join(uri, kind))
    names = dict.fromkeys(file.partition("/")[0] for file in every.files if "/" in file)
    found = (every.part(name) for name in names)
    return tuple(folder for folder in found if folder.comparison)


def _file(info: Mapping[str, Any]) -> File:
    """Stores call the time of writing by different names."""
    when = next(
        (
            info[key]
            for key in ("mtime", "LastModified", "last_modified", "updated", "created")
            if info.get(key)
        ),
        0.0,
    )
    if isinstance(when, str):
        when = datetime.fromisoformat(when)
    return File(
        int(info.get("size") or 0), when.timestamp() if isinstance(when, datetime) else float(when)
    )
