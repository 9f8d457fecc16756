"""`fusegpt.json`, last file of a published model, checked before use. Light: no torch."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

from fusegpt_ray.errors import UserError
from fusegpt_ray.store import storage
from fusegpt_ray.store.foreign import KEY as KEY
from fusegpt_ray.store.foreign import read_foreign
from fusegpt_ray.store.public import public
from fusegpt_ray.store.records import FileRecord
from fusegpt_ray.uris import shown

MANIFEST = "fusegpt.json"
METRICS = "metrics.jsonl"
"""In a published model: the events of the run that made it."""
FORMAT = 1
PULLING = ".fusegpt-pull"
"""Marks a folder that `fusegpt pull` is filling."""
_DEEPEST = 8
"""Folders in folders, the file itself among them, that a model has."""


def encoded(manifest: Mapping[str, Any]) -> bytes:
    """As its file holds it."""
    return (json.dumps(manifest, indent=1) + "\n").encode()


@dataclass(frozen=True)
class Manifest:
    """What a published model says of itself."""

    raw: bytes
    data: Mapping[str, Any]
    files: Mapping[str, FileRecord]
    """By path ("additional_chat_templates/tool.jinja"), which never leaves the model's folder."""

    @property
    def size(self) -> int:
        return sum(record.size for record in self.files.values())

    def public(self) -> Manifest:
        """For everybody: of places on its maker's machines, their names alone."""
        data = public(self.data)
        if data == self.data:
            return self
        return replace(self, data=data, raw=encoded(data))

    @classmethod
    def recipe_of(cls, folder: str) -> dict[str, Any] | None:
        """That which made the model in `folder`; None if there is no finished model of ours."""
        if not storage.exists(storage.join(folder, MANIFEST)):
            return None
        try:
            made_by = cls.read(folder).data.get("recipe")
        except UserError:  # it is not a manifest of ours
            return None
        return made_by if isinstance(made_by, dict) else None

    @classmethod
    def read(cls, folder: str) -> Manifest:
        """The manifest of the model in `folder`, any fsspec URI.

        Raises:
            UserError: there is none, or not one that this version can trust.
        """
        fix = "give the folder of a published model; one without its manifest was never finished"
        raw = read_foreign(folder, MANIFEST, fix)
        return cls.parse(raw, folder)

    @classmethod
    def parse(cls, raw: bytes, folder: str) -> Manifest:
        """Check a manifest's bytes; `folder` is where they were found.

        Raises:
            UserError: see `read`.
        """

        def bad(problem: str) -> UserError:
            return UserError(
                KEY,
                folder,
                f"{MANIFEST} {problem}",
                "publish or download the model again, from a source you trust",
            )

        try:
            data = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise bad(f"is not JSON ({error})") from error
        if (
            not isinstance(data, dict)
            or not isinstance(data.get("files"), dict)
            or not data["files"]
        ):
            raise bad("is not a manifest: it lists no files")
        if data.get("format") != FORMAT:
            raise bad(f"has the format {shown(data.get('format'))!r}, this version knows {FORMAT}")
        kept = data.get("kept")
        if not isinstance(kept, list) or not all(type(block) is int for block in kept):
            raise bad("does not say which blocks were kept")
        folded, folders = set[str](), set[str]()  # as file systems that know no case see them
        for name, entry in data["files"].items():
            if problem := unusable(name):
                raise bad(f"lists the file {name[:260]!r}, {problem}")
            if (key := unicodedata.normalize("NFC", name).casefold()) in folded:
                raise bad(f"lists the file {name!r} twice, as far as some file systems can tell")
            above = {*map(str, PurePosixPath(key).parents)}
            folded.add(key)
            folders |= above
            if clash := folded & above:
                raise bad(
                    f"lists the file {name!r} in a folder that is a file, too: {min(clash)!r}"
                )
            if key in folders:
                raise bad(f"lists the file {name!r}, which is a folder, too")
            if not _is_record(entry):
                raise bad(f"does not give size and sha256 of {name!r}")
        return cls(
            raw, data, {name: FileRecord.from_json(entry) for name, entry in data["files"].items()}
        )


def unusable(path: str) -> str:
    """What is wrong with a file's path in a manifest, or nothing if it stays within its folder."""
    if re.search(r"[\x00-\x1f\x7f]", path):
        return "a name with control characters"
    if re.search(r"[\\:]", path) or path.startswith("/") or {".", ".."} & {*path.split("/")}:
        return "which would lie outside its folder"
    try:
        lengths = [len(name.encode()) for name in path.split("/")]
    except UnicodeEncodeError:
        return "a name that is not Unicode text"
    if not all(0 < length <= 255 for length in lengths) or len(lengths) > _DEEPEST:
        return "a name that no file can have"
    first = path.partition("/")[0].casefold()
    return f"which cannot lie beside {MANIFEST}" if first in (MANIFEST, PULLING) else ""


def _is_record(entry: object) -> bool:
    if not isinstance(entry, dict):
        return False
    size, digest = entry.get("bytes"), entry.get("sha256")
    return (
        type(size) is int
        and 0 <= size < 2**63
        and isinstance(digest, str)
        and re.fullmatch(r"[0-9a-f]{64}", digest) is not None
    )
