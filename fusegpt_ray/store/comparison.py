"""`table.json`, which tells of all cells of a comparison, checked before use. Light: no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt

from fusegpt_ray.store.foreign import Amount, Level, Part, Share, told

TABLE = "table.json"
FORMAT = 1


class Width(Part):
    """A hidden size, before and after."""

    dense: NonNegativeInt
    kept: NonNegativeInt


class Cell(Part):
    """A model that is to be published."""

    model: str
    method: str
    sparsity: Share


class Row(Cell):
    """A published one, on one text."""

    text: str
    dense: Level
    dropped: Level | None = None
    width: Width | None = None
    """Of a model that became narrower."""
    perplexity: Level
    damage_left: float | None = None
    """Log-perplexity lost, relative to the baseline's."""
    removed: list[int]
    bytes: NonNegativeInt
    seconds: Amount
    uri: str
    protocol: str
    """In words."""


class Failed(Cell):
    problem: str


class Unfinished(Cell):
    status: Literal["waiting", "working"]


class Told(Part):
    """What the file says."""

    format: int
    name: str
    state: Literal["working", "done", "failed"]
    time: Annotated[float, Field(ge=0, lt=1e11)] = 0.0
    """When this was so, in seconds since 1970."""
    baseline: str
    """The method whose damage counts as 1."""
    paper: list[str]
    """The methods that are the paper's preset."""
    rows: list[Row]
    failed: list[Failed]
    unfinished: list[Unfinished] = Field(default_factory=list)
    settings: dict[str, Any] = Field(default_factory=dict)
    """What was asked, as it was written."""
    versions: dict[str, str] = Field(default_factory=dict)

    @classmethod
    def read(cls, uri: str) -> Told:
        """That in a folder, any fsspec URI.

        Raises:
            UserError: there is none, or not one that this version can trust.
        """
        fix = "give the folder of a comparison, OUTPUT_URI/compare/NAME; its command writes it anew"
        return told(cls, uri, TABLE, FORMAT, fix)
