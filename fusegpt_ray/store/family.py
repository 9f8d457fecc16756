"""`family.json`, which tells of all models of a family, checked before use. Light: no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt

from fusegpt_ray.errors import UserError
from fusegpt_ray.store import storage
from fusegpt_ray.store.foreign import KEY, Amount, Level, Part, Share, checked, told
from fusegpt_ray.store.manifest import unusable
from fusegpt_ray.uris import refuse_secret, shown

BOARD = "family.json"
FORMAT = 1
FIX = "give the folder of a family, OUTPUT_URI/family/NAME; its command writes it anew"


class Parameters(Part):
    dense: NonNegativeInt
    published: NonNegativeInt | None = None


class Levels(Part):
    """Perplexities on one text."""

    dense: Level
    published: Level


class Row(Part):
    """A model that is to be published."""

    member: str
    method: str
    sparsity: Share | None = None
    """None: it becomes deeper."""
    source: str
    status: Literal["waiting", "working", "done", "failed"]
    doing: str = ""
    folder: str
    """Its name beside the folder of families."""
    run: str
    """The id of the run that makes it."""
    problem: str = ""
    """Why it failed."""
    parameters: Parameters
    report: bool = False
    """Whether one lies beside it."""
    perplexity: dict[str, Levels] = Field(default_factory=dict)
    seconds: Amount | None = None
    gpu_hours: Amount | None = None
    cost: Amount | None = None


class Told(Part):
    """What the file says."""

    format: int
    name: str
    state: Literal["working", "done", "failed"]
    time: Annotated[float, Field(ge=0, lt=1e11)] = 0.0
    """When this was so, in seconds since 1970."""
    rows: list[Row]
    settings: dict[str, Any] = Field(default_factory=dict)
    """What was asked, as it was written."""
    versions: dict[str, str] = Field(default_factory=dict)


@dataclass(frozen=True)
class FamilyBoard:
    """What a family says of itself."""

    uri: str
    told: Told

    @classmethod
    def read(cls, uri: str) -> FamilyBoard:
        """That in a folder, any fsspec URI.

        Raises:
            UserError: there is none, or not one that this version can trust.
        """
        refuse_secret(KEY, uri)
        uri = storage.absolute(uri).rstrip("/")
        return cls._safe(told(Told, uri, BOARD, FORMAT, FIX), uri)

    @classmethod
    def parse(cls, data: Any, uri: str) -> FamilyBoard:
        """Of what was read at `uri`.

        Raises:
            UserError: see `read`.
        """
        return cls._safe(checked(Told, data, uri, BOARD, FORMAT, FIX), uri)

    @classmethod
    def _safe(cls, told: Told, uri: str) -> FamilyBoard:
        board = cls(uri, told)
        names = Counter(model.folder.casefold() for model in board.models)
        for name in (model.folder for model in board.models):
            problem = unusable(name) or ("/" in name and "which is no name") or ""
            if names[name.casefold()] > 1:
                problem = "twice, as far as some file systems can tell"
            if problem or name.startswith("."):
                problem = f"{BOARD} lists the model {name[:260]!r}, {problem or 'a hidden folder'}"
                raise UserError(KEY, uri, problem, "use one from a source you trust")
        return board

    @property
    def finished(self) -> bool:
        return self.told.state != "working"

    @property
    def members(self) -> list[str]:
        return [*dict.fromkeys(row.member for row in self.told.rows)]

    @property
    def models(self) -> list[Row]:
        """Those that are published."""
        return [row for row in self.told.rows if row.status == "done"]

    def chosen(self, members: Collection[str]) -> Iterator[tuple[Row, str]]:
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
