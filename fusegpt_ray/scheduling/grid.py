"""Methods × sparsities over a recipe: which runs these are, and what they are called. No torch.

A run publishes all sparsities of one method on its way. Only where a higher sparsity drops other
blocks than a lower one has each a run of its own.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from pydantic import BeforeValidator, Field, ValidationError

from fusegpt_ray.errors import UserError
from fusegpt_ray.recipe.messages import explained
from fusegpt_ray.recipe.recipe import Recipe, percent
from fusegpt_ray.recipe.sections import MOST, one_or_many
from fusegpt_ray.recipe.specs import METHOD_SPECS
from fusegpt_ray.recipe.text_sections import Section
from fusegpt_ray.recipe.yaml_text import read_recipe
from fusegpt_ray.scheduling.mistakes import Mistakes
from fusegpt_ray.store import storage
from fusegpt_ray.store.records import checksum
from fusegpt_ray.uris import shown

Methods = Annotated[tuple[str | dict[str, Any], ...] | None, Field(min_length=1)]
Sparsities = Annotated[tuple[float, ...] | None, BeforeValidator(one_or_many)]


class Grid(Section):
    """What a comparison and a family say alike."""

    methods: Methods = None
    """Names of methods, or mappings: a `name` of one's own, and the keys of the recipe that differ
    from the base, such as `{name: "fusegpt, paper", method: fusegpt, preset: paper}`. Left out: the
    base's `method`; a comparison needs them."""
    sparsities: Sparsities = None
    """Left out: the base's `sparsity`."""
    at_once: int | None = Field(None, ge=1, le=MOST)
    """How many runs work at the same time on Ray, each on workers of its own; left out: as many as
    the cluster's free GPUs suffice for. In one process it is always one."""


@dataclass(frozen=True)
class Run:
    """One ordinary run, of one method and model."""

    model: str
    method: str
    """As they are called in the tables."""
    recipe: Recipe
    where: str
    """Which one it is, for messages: "in the cell mi"."""

    def folder(self, sparsity: float) -> str:
        """Where its model of this sparsity will be."""
        name = f"{self.recipe.output.name}-p{percent(sparsity)}"
        return storage.join(storage.absolute(self.recipe.output.uri), name)


@dataclass(frozen=True)
class Base:
    """What the runs of one model have in common."""

    data: Mapping[str, Any]
    """A recipe."""
    model: str
    """As it is called in the tables."""
    parts: Sequence[str]
    """Of the runs' names, behind that of the recipe."""
    called: str
    """What one of its runs is called in messages, before its method: "in the cell"."""
    mistakes: Mistakes = field(default_factory=Mistakes)
    """Hears of those that are no recipes, which are left out."""

    def runs(self, method: str, changes: Mapping[str, Any], *part: str) -> Iterator[Run]:
        """The runs of one method.

        Args:
            method: as it is called in the tables.
            changes: what differs from the base.
            part: of the runs' names, behind those of the base.

        Raises:
            UserError: one of them is no recipe.
        """
        data = merged(self.data, changes)
        spec = METHOD_SPECS.get(str(data.get("method", "fusegpt")))
        if spec and spec.inserts:  # the others' sparsities are nothing to it
            data.pop("sparsity", None)
        if spec is None or spec.nested or spec.inserts:
            yield from self._run(method, data, *part)
            return
        for value in one_or_many(data.get("sparsity", 0.25)):
            for run in self._run(method, data | {"sparsity": value}, *part):
                named = run.recipe.sparsity[0]
                yield from self._run(method, data | {"sparsity": named}, *part, percent(named))

    def _run(self, method: str, data: Mapping[str, Any], *part: str) -> Iterator[Run]:
        output = data.get("output")
        stem = output.get("name") if isinstance(output, dict) else None
        if isinstance(stem, str) and stem:  # else `Recipe.parse` says so
            name = "-".join([stem, *self.parts, *part])
            data = merged(data, {"output": {"name": name}})
        where = f"{self.called} {shown(method)}"
        if found := Recipe.mistakes(data):
            self.mistakes.note(found, where)
        else:
            yield Run(self.model, method, Recipe.parse(data), where)


def named(
    given: Iterable[str | Mapping[str, Any]], short: str, key: str
) -> dict[str, dict[str, Any]]:
    """The recipe keys of each item, by its name; a bare string says one key.

    Raises:
        UserError: two of them have the same name, or would write to the same folder.
    """
    found: dict[str, dict[str, Any]] = {}
    for item in given:
        keys = {short: item} if isinstance(item, str) else dict(item)
        name = str(keys.pop("name", None) or keys.get(short, "base"))
        if slug(name) in map(slug, found):
            problem = "two of them have this name, in letters that folders can have"
            raise UserError(key, shown(name), problem, "give each a name of its own")
        found[name] = keys
    return found


def check_apart(runs: Iterable[Run], key: str) -> None:
    """Different models and methods may together come to the same name.

    Raises:
        UserError: two runs would write to the same folders.
    """
    by_name: dict[str, Run] = {}
    for run in runs:
        name = run.recipe.output.name
        if other := by_name.get(name):
            which = f"{other.model}, {other.method} and {run.model}, {run.method}"
            problem = f"{shown(which)}: both would be called {name}"
            raise UserError(key, shown(run.method), problem, "give one of them another name")
        by_name[name] = run


def check_same(
    changes: Mapping[str, Any], keys: Iterable[str], name: str, key: str, fix: str
) -> None:
    """
    Raises:
        UserError: one of the keys, which are the same for all, is among the changes.
    """
    if kept := sorted({*keys} & changes.keys()):
        problem = f"{shown(name)}: is the same for all of them"
        raise UserError(f"{key}.{kept[0]}", shown(changes[kept[0]]), problem, fix)


def of_model(base: Mapping[str, Any], section: Mapping[str, Any]) -> dict[str, Any]:
    """The base with another model, which has no revision of the first."""
    data = merged(base, {"model": section})
    if "source" in section and "revision" not in section:
        data["model"].pop("revision", None)
    return data


def check_once(sparsities: Sequence[float], key: str) -> None:
    """
    Raises:
        UserError: there is none, or one of them twice.
    """
    if len(set(sparsities)) < max(1, len(sparsities)):
        raise UserError(key, list(sparsities), "none, or one of them twice", "list each once")


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes`, mapping by mapping."""
    both = dict(base)
    for key, value in changes.items():
        old = both.get(key)
        nested = isinstance(old, dict) and isinstance(value, Mapping)
        both[key] = merged(old, value) if nested else value  # type: ignore[arg-type]
    return both


class ManyRuns(ABC):
    """What a recipe asks for in a section of a command's own."""

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = ()) -> Self:
        """Read a YAML recipe that has the section; see `Recipe.load`.

        Raises:
            UserError: a key or value is wrong, also in a single run.
        """
        return cls.parse(read_recipe(path, overrides))

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> Self:
        """See `load`."""
        found = cls.read(data, Mistakes())
        assert found is not None, "the first mistake ends it"
        return found

    @classmethod
    @abstractmethod
    def read(cls, data: Mapping[str, Any], mistakes: Mistakes) -> Self | None:
        """As `parse`, without the runs that are wrong; None if none is left."""


S = TypeVar("S", bound=Section)


def own_section(
    data: Mapping[str, Any], name: str, kind: type[S], fix: str, mistakes: Mistakes
) -> S | None:
    """What a recipe says in a command's own section of this name; None if it is missing (`fix` says
    what to add), or wrong.
    """
    if name not in data:
        mistakes.note([UserError(name, None, "missing", fix)])
        return None
    try:
        return kind.model_validate(data[name])
    except ValidationError as error:
        mistakes.note(explained(kind, error, data[name], name))
        return None


def as_written(data: Mapping[str, Any]) -> dict[str, Any]:
    """All that was asked, as JSON has it."""
    written: dict[str, Any] = json.loads(json.dumps(data, default=str))
    return written


def slug(name: str) -> str:
    """A name as a part of a folder's name, which has letters, digits and few signs."""
    text = re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.").lower()
    return text or checksum({"name": name})[:8]
