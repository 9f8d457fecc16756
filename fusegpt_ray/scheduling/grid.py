"""Methods × sparsities over a recipe: which runs these are, and what they are called. No torch.

A run publishes all sparsities of one method on its way. Only where a higher sparsity drops other
blocks than a lower one has each a run of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError

from fusegpt_ray.errors import UserError
from fusegpt_ray.recipe import Recipe, percent
from fusegpt_ray.recipe_errors import explained
from fusegpt_ray.specs import METHOD_SPECS
from fusegpt_ray.store import storage
from fusegpt_ray.store.records import checksum
from fusegpt_ray.text_sections import Section
from fusegpt_ray.uris import shown


@dataclass(frozen=True)
class Run:
    """One ordinary run, of one method and model."""

    model: str
    method: str
    """As they are called in the tables."""
    recipe: Recipe

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
    """What one of its runs is called in messages: "cell"."""

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
            yield self._run(method, data, *part)
            return
        for value in one_or_many(data.get("sparsity", 0.25)):
            named = self._run(method, data | {"sparsity": value}, *part).recipe.sparsity[0]
            yield self._run(method, data | {"sparsity": named}, *part, percent(named))

    def _run(self, method: str, data: Mapping[str, Any], *part: str) -> Run:
        output = data.get("output")
        stem = output.get("name") if isinstance(output, dict) else None
        if isinstance(stem, str) and stem:  # else `Recipe.parse` says so
            name = "-".join([stem, *self.parts, *part])
            data = merged(data, {"output": {"name": name}})
        try:
            return Run(self.model, method, Recipe.parse(data))
        except UserError as error:
            problem = f"{error.problem} (in the {self.called} {shown(method)})"
            raise UserError(error.key, error.value, problem, error.fix) from error


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


S = TypeVar("S", bound=Section)


def own_section(data: Mapping[str, Any], name: str, kind: type[S], fix: str) -> S:
    """What a recipe says in a command's own section of this name.

    Raises:
        UserError: it is missing (`fix` says what to add), or wrong.
    """
    if name not in data:
        raise UserError(name, None, "missing", fix)
    try:
        return kind.model_validate(data[name])
    except ValidationError as error:
        raise explained(kind, error, name)[0] from error


def as_written(data: Mapping[str, Any]) -> dict[str, Any]:
    """All that was asked, as JSON has it."""
    written: dict[str, Any] = json.loads(json.dumps(data, default=str))
    return written


def one_or_many(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


def slug(name: str) -> str:
    """A name as a part of a folder's name, which has letters, digits and few signs."""
    text = re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.").lower()
    return text or checksum({"name": name})[:8]
