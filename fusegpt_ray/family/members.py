"""What a family asks for: members × methods × sparsities over shared defaults. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from pydantic import Field, ValidationError

from fusegpt_ray.errors import UserError
from fusegpt_ray.recipe.messages import explained
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.recipe.sections import MOST
from fusegpt_ray.recipe.text_sections import Section
from fusegpt_ray.run.outputs import FAMILIES
from fusegpt_ray.scheduling.grid import (
    Base,
    Grid,
    ManyRuns,
    Methods,
    Run,
    Sparsities,
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
from fusegpt_ray.workers.room import Allocation

SECTION = FAMILIES
OWN = ("priority", "methods", "sparsities")
"""What a member says beside keys of the recipe."""


class Family(Grid):
    """The section `family` of a recipe. Everything beside it is the base of every member."""

    members: tuple[str | dict[str, Any], ...] = Field(min_length=1)
    """Sources of models, or mappings: a `name` of one's own, and the keys of the recipe that differ
    from the base, such as `{name: 13b, model: {source: …}, cluster: {workers: 2}}`; beside these
    `methods`, `sparsities` and `priority` (a whole number, 0 if left out: the highest goes first).
    """
    gpus: float | None = Field(None, gt=0, le=MOST)
    """GPUs that all members together may take; left out: those that are free."""


class _Own(Section):
    priority: int = Field(0, ge=-MOST, le=MOST)
    methods: Methods = None
    sparsities: Sparsities = None


@dataclass(frozen=True)
class Member:
    """A model, and what becomes of it."""

    name: str
    priority: int
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Members(ManyRuns):
    """All that is to be done."""

    name: str
    uri: str
    members: tuple[Member, ...]
    at_once: int | None
    gpus: float | None
    settings: Mapping[str, Any]
    """All that was asked, as it was written."""

    @property
    def folder(self) -> str:
        """Where the page and the tables go."""
        return storage.join(storage.absolute(self.uri), SECTION, self.name)

    @classmethod
    def read(cls, data: Mapping[str, Any], mistakes: Mistakes) -> Self | None:
        base = {key: value for key, value in data.items() if key != SECTION}
        fix = "add family: {members: [a/model, another/model]}"
        asked = own_section(data, SECTION, Family, fix, mistakes)
        if asked is None:
            return None
        items = map(_with_name, asked.members)
        given = mistakes.check(named, items, "name", f"{SECTION}.members") or {}
        found = [
            mistakes.check(_member, base, name, keys, asked, mistakes)
            for name, keys in given.items()
        ]
        members = [member for member in found if member and member.runs]
        runs = [run for member in members for run in member.runs]
        mistakes.check(check_apart, runs, f"{SECTION}.members")
        if asked.gpus is not None:
            for run in runs:
                mistakes.check(_check_quota, run, asked.gpus)
        if not runs:
            return None
        name = str((base.get("output") or {}).get("name"))
        uri = runs[0].recipe.output.uri
        return cls(name, uri, tuple(members), asked.at_once, asked.gpus, as_written(data))

    @property
    def runs(self) -> list[Run]:
        return [run for member in self.members for run in member.runs]


def _with_name(member: str | Mapping[str, Any]) -> dict[str, Any]:
    """A member that has none is called as the last part of its model's source."""
    keys: dict[str, Any] = (
        {"model": {"source": member}} if isinstance(member, str) else dict(member)
    )
    model = keys.get("model")
    source = model.get("source") if isinstance(model, Mapping) else None
    if "name" not in keys and isinstance(source, str):
        keys["name"] = source.rstrip("/").rpartition("/")[2]
    return keys


def _member(
    base: Mapping[str, Any],
    name: str,
    keys: Mapping[str, Any],
    asked: Family,
    mistakes: Mistakes,
) -> Member | None:
    key = f"{SECTION}.members"
    try:
        own = _Own.model_validate(said := {each: keys[each] for each in OWN if each in keys})
    except ValidationError as error:
        mistakes.note(explained(_Own, error, said, f"{key}.{name}"))
        return None
    changes = {each: value for each, value in keys.items() if each not in OWN}
    output = changes.get("output")
    _check_output(output, f"{key}.{name}")
    model = changes.pop("model", None)
    data = of_model(base, model) if isinstance(model, Mapping) else dict(base)
    if model is not None and not isinstance(model, Mapping):
        data["model"] = model  # `Recipe.parse` says what is wrong with it
    sparsities = own.sparsities
    if sparsities is None and "sparsity" not in changes:
        sparsities = asked.sparsities
    if sparsities is not None:
        check_once(sparsities, f"{SECTION}.sparsities")
        data["sparsity"] = list(sparsities)
    called = f"of the member {shown(name)},"
    whole = Base(merged(data, changes), name, [slug(name)], called, mistakes)
    return Member(name, own.priority, tuple(_runs(whole, own.methods, asked)))


def _runs(base: Base, own: Methods, asked: Family) -> Iterator[Run]:
    methods = own or asked.methods
    if methods is None:
        yield from base.runs(str(base.data.get("method", "fusegpt")), {})
        return
    key = f"{SECTION}.methods"
    for name, changes in named(methods, "method", key).items():
        check_same(changes, ("model", "output", "sparsity"), name, key, "set it in family.members")
        yield from base.runs(name, changes, slug(name))


def _check_output(output: Any, key: str) -> None:
    """
    Raises:
        UserError: a member has another place or name, where `pull --family` would not find it.
    """
    if isinstance(output, Mapping):
        fix = "set it beside family; a member's name is its own `name`"
        check_same(output, ("uri", "name"), "a member's output", f"{key}.output", fix)


def _check_quota(run: Run, gpus: float) -> None:
    """
    Raises:
        UserError: the workers of this run need more than all members together may take.
    """
    recipe: Recipe = run.recipe
    cluster = recipe.cluster
    each = 1.0 if cluster.gpus_per_replica is None else cluster.gpus_per_replica
    least = Allocation.of(cluster, each, recipe.trains, "turns")
    needed = least.gpus
    if cluster.engine == "ray" and needed > gpus:
        problem = f"the member {shown(run.model)} needs {needed:g}"
        fix = "raise it, or lower the member's cluster.replicas and cluster.workers"
        raise UserError(f"{SECTION}.gpus", gpus, problem, fix)
