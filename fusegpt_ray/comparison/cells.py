"""What a comparison asks for: methods × sparsities × models over one base recipe. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from pydantic import Field

from fusegpt_ray.errors import UserError
from fusegpt_ray.recipe.specs import METHOD_SPECS
from fusegpt_ray.run.outputs import COMPARISONS
from fusegpt_ray.scheduling.grid import (
    Base,
    Grid,
    ManyRuns,
    Run,
    as_written,
    check_apart,
    check_once,
    check_same,
    merged,
    named,
    of_model,
    own_section,
    slug,
)
from fusegpt_ray.scheduling.mistakes import Mistakes
from fusegpt_ray.store import storage
from fusegpt_ray.uris import shown

SECTION = COMPARISONS


class Compare(Grid):
    """The section `compare` of a recipe. Everything beside it is the base of every run."""

    methods: tuple[str | dict[str, Any], ...] = Field(min_length=1)  # type: ignore[assignment]
    models: tuple[str | dict[str, Any], ...] | None = Field(None, min_length=1)
    """Sources, or sections `model` with a `name` of one's own; left out: the base's `model`."""
    baseline: str | None = None
    """The name of the method whose damage counts as 1; left out: `mi`, or the first one."""


@dataclass(frozen=True)
class Comparison(ManyRuns):
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
    def read(cls, data: Mapping[str, Any], mistakes: Mistakes) -> Self | None:
        base = {key: value for key, value in data.items() if key != SECTION}
        fix = "add compare: {methods: [mi, fusegpt]}"
        if (asked := own_section(data, SECTION, Compare, fix, mistakes)) is None:
            return None
        methods = mistakes.check(named, asked.methods, "method", f"{SECTION}.methods") or {}
        own = base.get("model")  # if it is no mapping, `Recipe.parse` says so
        sources = asked.models or (own if isinstance(own, Mapping) else {},)
        models = mistakes.check(named, sources, "source", f"{SECTION}.models") or {}
        if asked.sparsities is not None:
            mistakes.check(check_once, asked.sparsities, f"{SECTION}.sparsities")
            base["sparsity"] = list(asked.sparsities)
        runs = [
            run
            for model, section in models.items()
            for name, changes in methods.items()
            for run in mistakes.check(
                _runs, base, model, section, name, changes, asked.models is not None, mistakes
            )
            or ()
        ]
        baseline = asked.baseline or ("mi" if "mi" in methods else next(iter(methods), ""))
        if baseline not in methods and methods:
            fix = f"use one of {', '.join(methods)}"
            problem = "not one of the methods"
            mistakes.note([UserError(f"{SECTION}.baseline", shown(baseline), problem, fix)])
        mistakes.check(check_apart, runs, f"{SECTION}.methods")
        if not runs:
            return None
        if not runs[0].recipe.evaluation:
            fix = "add evaluation: {heldout: {data: heldout.txt}}"
            mistakes.note(
                [UserError("evaluation", None, "a comparison compares perplexities", fix)]
            )
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
    mistakes: Mistakes,
) -> list[Run]:
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
    cells = Base(data, model, parts, "in the cell", mistakes)
    return [*cells.runs(name, changes, slug(name))]
