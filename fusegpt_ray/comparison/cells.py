"""What a comparison asks for: methods × sparsities × models over one base recipe. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field

from fusegpt_ray.errors import UserError
from fusegpt_ray.recipe_text import read_recipe
from fusegpt_ray.run.outputs import COMPARISONS
from fusegpt_ray.scheduling.grid import (
    Base,
    Run,
    as_written,
    check_apart,
    check_once,
    check_same,
    merged,
    named,
    of_model,
    one_or_many,
    own_section,
    slug,
)
from fusegpt_ray.sections import MOST
from fusegpt_ray.specs import METHOD_SPECS
from fusegpt_ray.store import storage
from fusegpt_ray.text_sections import Section
from fusegpt_ray.uris import shown

SECTION = COMPARISONS


class Compare(Section):
    """The section `compare` of a recipe. Everything beside it is the base of every run."""

    methods: tuple[str | dict[str, Any], ...] = Field(min_length=1)
    """Names of methods, or mappings: a `name` of one's own, and the keys of the recipe that differ
    from the base, such as `{name: "fusegpt, paper", method: fusegpt, preset: paper}`."""
    sparsities: Annotated[tuple[float, ...] | None, BeforeValidator(one_or_many)] = None
    """Left out: the base's `sparsity`."""
    models: tuple[str | dict[str, Any], ...] | None = Field(None, min_length=1)
    """Sources, or sections `model` with a `name` of one's own; left out: the base's `model`."""
    baseline: str | None = None
    """The name of the method whose damage counts as 1; left out: `mi`, or the first one."""
    at_once: int | None = Field(None, ge=1, le=MOST)
    """How many cells work at the same time on Ray, each on workers of its own; left out: as many as
    the cluster's free GPUs suffice for. In one process it is always one."""


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
        fix = "add compare: {methods: [mi, fusegpt]}"
        asked = own_section(data, SECTION, Compare, fix)
        methods = named(asked.methods, "method", f"{SECTION}.methods")
        own = base.get("model")  # if it is no mapping, `Recipe.parse` says so
        sources = asked.models or (own if isinstance(own, Mapping) else {},)
        models = named(sources, "source", f"{SECTION}.models")
        if asked.sparsities is not None:
            check_once(asked.sparsities, f"{SECTION}.sparsities")
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
        check_apart(runs, f"{SECTION}.methods")
        if not runs[0].recipe.evaluation:
            fix = "add evaluation: {heldout: {data: heldout.txt}}"
            raise UserError("evaluation", None, "a comparison compares perplexities", fix)
        output = runs[0].recipe.output
        name = str((base.get("output") or {}).get("name"))
        sparsities = sorted({value for run in runs for value in run.recipe.sparsity})
        about = (baseline, asked.at_once, as_written(data))
        return cls(name, output.uri, tuple(runs), tuple(sparsities), *about)


def _runs(
    base: Mapping[str, Any],
    model: str,
    section: Mapping[str, Any],
    name: str,
    changes: Mapping[str, Any],
    several: bool,
) -> Iterator[Run]:
    key = f"{SECTION}.methods"
    fix = "set it beside compare, or in compare.sparsities or compare.models"
    check_same(changes, ("output", "sparsity", "evaluation", "model"), name, key, fix)
    data = of_model(base, section) if several else base
    spec = METHOD_SPECS.get(str(merged(data, changes).get("method", "fusegpt")))
    if spec and spec.inserts:
        problem = (
            f"{shown(name)}: it makes models deeper, and a comparison's columns are sparsities"
        )
        fix = "run it by itself, and set the models side by side with fusegpt evaluate"
        raise UserError(key, shown(str(merged(data, changes)["method"])), problem, fix)
    parts = [slug(model)] if several else []
    return Base(data, model, parts, "cell").runs(name, changes, slug(name))
