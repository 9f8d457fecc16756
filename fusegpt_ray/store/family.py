"""`family.json`, which tells of all models of a family, checked before use. Light: no torch."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fusegpt_ray.errors import UserError
from fusegpt_ray.store import storage
from fusegpt_ray.store.manifest import KEY, unusable
from fusegpt_ray.uris import refuse_secret, shown

BOARD = "family.json"
FORMAT = 1
FIX = "give the folder of a family: OUTPUT_URI/family/NAME"


@dataclass(frozen=True)
class Listed:
    """A model that is published."""

    member: str
    folder: str
    """Its name beside the folder of families."""
    run: str
    """The id of the run that made it."""


@dataclass(frozen=True)
class FamilyBoard:
    """What a family says of itself."""

    uri: str
    finished: bool
    members: tuple[str, ...]
    models: tuple[Listed, ...]

    @classmethod
    def read(cls, uri: str) -> FamilyBoard:
        """That in a folder, any fsspec URI.

        Raises:
            UserError: there is none, or not one that this version can trust.
        """
        refuse_secret(KEY, uri)
        uri = storage.absolute(uri).rstrip("/")
        try:
            data = json.loads(storage.read(storage.join(uri, BOARD), storage.SMALL))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UserError(KEY, uri, f"holds no {BOARD}", FIX) from error
        except PermissionError as error:
            problem = f"may not be read ({error})"
            raise UserError(KEY, uri, problem, "check your rights and credentials") from error
        except (ValueError, RecursionError, ImportError) as error:
            raise UserError(KEY, uri, f"{BOARD} cannot be read ({error})", FIX) from error
        return cls.parse(data, uri)

    @classmethod
    def parse(cls, data: Any, uri: str) -> FamilyBoard:
        """Of what was read at `uri`.

        Raises:
            UserError: see `read`.
        """
        rows = data.get("rows") if isinstance(data, dict) else None
        if not isinstance(rows, list) or not all(_is_row(row) for row in rows):
            raise UserError(KEY, uri, f"{BOARD} is not that of a family", FIX)
        if data.get("format") != FORMAT:
            problem = f"{BOARD} has the format {shown(data.get('format'))!r}"
            raise UserError(KEY, uri, problem, f"this version knows {FORMAT}")
        models = [
            Listed(row["member"], row["folder"], row["run"])
            for row in rows
            if row["status"] == "done"
        ]
        names = [model.folder.casefold() for model in models]
        for name in (model.folder for model in models):
            problem = unusable(name) or ("/" in name and "which is no name") or ""
            if names.count(name.casefold()) > 1:
                problem = "twice, as far as some file systems can tell"
            if problem or name.startswith("."):
                problem = f"{BOARD} lists the model {name[:260]!r}, {problem or 'a hidden folder'}"
                raise UserError(KEY, uri, problem, "use one from a source you trust")
        members = dict.fromkeys(row["member"] for row in rows)
        return cls(uri, data.get("state") != "working", tuple(members), tuple(models))

    def chosen(self, members: Collection[str]) -> Iterator[tuple[Listed, str]]:
        """The models of these members, or of all if none is named, and where each of them is.

        Raises:
            UserError: there is no such member, or nothing of it is published.
        """
        place = self.uri.rpartition("/")[0].rpartition("/")[0]
        for member in members:
            if member not in self.members:
                fix = f"use one of {', '.join(self.members)}"
                raise UserError("--member", shown(member), "not a member of this family", fix)
        found = [model for model in self.models if not members or model.member in members]
        if not found:
            problem = "none of these models is published yet"
            raise UserError(KEY, self.uri, problem, "wait for it, or look at its index.html")
        for model in found:
            yield model, storage.join(place, model.folder)


def _is_row(row: Any) -> bool:
    keys = ("member", "folder", "status", "run")
    return isinstance(row, Mapping) and all(isinstance(row.get(key), str) for key in keys)
