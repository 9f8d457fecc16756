"""What a comparison asks for: methods × sparsities × models over one base recipe. No torch.

A run publishes all sparsities of one method on its way. Only where a higher sparsity drops other
blocks than a lower one has each a run of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, ValidationError

from fusegpt_ray.errors import UserError
from fusegpt_ray.recipe import Recipe, percent
from fusegpt_ray.recipe_errors import explained
from fusegpt_ray.recipe_text import read_recipe
from fusegpt_ray.run.outputs import COMPARISONS
from fusegpt_ray.sections import MOST
from fusegpt_ray.specs import METHOD_SPECS
from fusegpt_ray.store import storage
from fusegpt_ray.store.records import checksum
from fusegpt_ray.text_sections import Section
from fusegpt_ray.uris import shown

SECTION = COMPARISONS


def _one_or_many(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


class Compare(Section):
    """The section `compare` of a recipe. Everything beside it is the base of every run."""

    methods: tuple[str | dict[str, Any], ...] = Field(min_length=1)
    """Names of methods, or mappings: a `name` of one's own, and the keys of the recipe that differ
    from the base, such as `{name: "fusegpt, paper", method: fusegpt, preset: paper}`."""
    sparsities: Annotated[tuple[float, ...] | None, BeforeValidator(_one_or_many)] = None
    """Left out: the base's `sparsity`."""
    models: tuple[str | dict[str, Any], ...] | None = Field(None, min_length=1)
    """Sources, or sections `model` with a `name` of one's own; left out: the base's `model`."""
    baseline: str | None = None
    """The name of the method whose damage counts as 1; left out: `mi`, or the first one."""
    at_once: int | None = Field(None, ge=1, le=MOST)
    """How many cells work at the same time on Ray, each on workers of its own; left out: as many as
    the cluster's free GPUs suffice for. In one process it is always one."""


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
class Comparison:
    """All that is to be compared."""

    name: str
    uri: str
    runs: tuple[Run, ...]
    """Those of one model together."""
    sparsities: tuple[float, ...]
    baseline: str
    at_once: int | None
    settings: Mapping[str, Any]
    """All that was asked, as it was written."""

    @property
    def folder(self) -> str:
        """Where the tables go."""
        return storage.join(storage.absolute(self.uri), SECTION, self.name)

    @property
    def models(self) -> list[str]:
        return [*dict.fromkeys(run.model for run in self.runs)]

    @property
    def methods(self) -> list[str]:
        return [*dict.fromkeys(run.method for run in self.runs)]

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = ()) -> Self:
        """Read a YAML recipe with a section `compare`; see `Recipe.load`.

        Raises:
            UserError: a key or value is wrong, also in a single cell.
        """
        return cls.parse(read_recipe(path, overrides))

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> Self:
        """See `load`."""
        base = {key: value for key, value in data.items() if key != SECTION}
        if SECTION not in data:
            raise UserError(SECTION, None, "missing", "add compare: {methods: [mi, fusegpt]}")
        try:
            asked = Compare.model_validate(data[SECTION])
        except ValidationError as error:
            raise explained(Compare, error, SECTION)[0] from error
        methods = _named(asked.methods, "method", f"{SECTION}.methods")
        own = base.get("model")  # if it is no mapping, `Recipe.parse` says so
        sources = asked.models or (own if isinstance(own, Mapping) else {},)
        models = _named(sources, "source", f"{SECTION}.models")
        if asked.sparsities is not None:
            if len(set(asked.sparsities)) < max(1, len(asked.sparsities)):
                key, problem = f"{SECTION}.sparsities", "none, or one of them twice"
                raise UserError(key, list(asked.sparsities), problem, "list each once")
            base["sparsity"] = list(asked.sparsities)
        runs = [
            run
            for model, section in models.items()
            for name, changes in methods.items()
            for run in _runs(base, model, section, name, changes, asked.models is not None)
        ]
        baseline = asked.baseline or ("mi" if "mi" in methods else next(iter(methods)))
        if baseline not in methods:
            fix = f"use one of {', '.join(methods)}"
            raise UserError(f"{SECTION}.baseline", shown(baseline), "not one of the methods", fix)
        _check_apart(runs)
        if not runs[0].recipe.evaluation:
            fix = "add evaluation: {heldout: {data: heldout.txt}}"
            raise UserError("evaluation", None, "a comparison compares perplexities", fix)
        output = runs[0].recipe.output
        name = str((base.get("output") or {}).get("name"))
        sparsities = sorted({value for run in runs for value in run.recipe.sparsity})
        about = (baseline, asked.at_once, dict(data))
        return cls(name, output.uri, tuple(runs), tuple(sparsities), *about)


def _named(
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
        if _slug(name) in map(_slug, found):
            problem = "two of them have this name, in letters that folders can have"
            raise UserError(key, shown(name), problem, "give each a name of its own")
        found[name] = keys
    return found


def _check_apart(runs: Iterable[Run]) -> None:
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
            fix = "give one of them another name"
            raise UserError(f"{SECTION}.methods", shown(run.method), problem, fix)
        by_name[name] = run


def _runs(
    base: Mapping[str, Any],
    model: str,
    section: Mapping[str, Any],
    name: str,
    changes: Mapping[str, Any],
    several: bool,
) -> Iterable[Run]:
    data = merged(base, {"model": section}) if several else base
    if several and "source" in section and "revision" not in section:
        data["model"].pop("revision", None)  # another model's
    data = merged(data, changes)
    output = data.get("output")
    given = output.get("name") if isinstance(output, dict) else None
    stem = given if isinstance(given, str) else ""  # else `Recipe.parse` says so
    parts = [stem, *([_slug(model)] if several else []), _slug(name)]
    if kept := {"output", "sparsity", "evaluation", "model"} & changes.keys():
        problem = f"{shown(name)}: is the same for all of them"
        fix = "set it beside compare, or in compare.sparsities or compare.models"
        raise UserError(f"{SECTION}.methods.{min(kept)}", shown(changes[min(kept)]), problem, fix)

    def parsed(more: Mapping[str, Any], *last: str) -> Run:
        called = {"output": {"name": "-".join([*parts, *last])}} if stem else {}
        try:
            return Run(model, name, Recipe.parse(merged(data, {**called, **more})))
        except UserError as error:
            problem = f"{error.problem} (in the cell {shown(name)})"
            raise UserError(error.key, error.value, problem, error.fix) from error

    spec = METHOD_SPECS.get(str(data.get("method", "fusegpt")))
    if spec and spec.inserts:
        problem = (
            f"{shown(name)}: it makes models deeper, and a comparison's columns are sparsities"
        )
        fix = "run it by itself, and set the models side by side with fusegpt evaluate"
        raise UserError(f"{SECTION}.methods", shown(str(data["method"])), problem, fix)
    sparsities = _one_or_many(data.get("sparsity", 0.25))
    if spec is None or spec.nested:
        return [parsed({})]
    named = [parsed({"sparsity": value}).recipe.sparsity[0] for value in sparsities]
    return [parsed({"sparsity": value}, percent(value)) for value in named]


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes`, mapping by mapping."""
    both = dict(base)
    for key, value in changes.items():
        old = both.get(key)
        nested = isinstance(old, dict) and isinstance(value, Mapping)
        both[key] = merged(old, value) if nested else value  # type: ignore[arg-type]
    return both


def _slug(name: str) -> str:
    """A name as a part of a folder's name, which has letters, digits and few signs."""
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.").lower()
    return slug or checksum({"name": name})[:8]
