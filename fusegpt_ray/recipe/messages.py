"""What pydantic says of a recipe, as messages with key, value and fix. No torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from fusegpt_ray.errors import UserError
from fusegpt_ray.recipe.wrong_values import told
from fusegpt_ray.uris import shown


class Several(ValueError):
    """What is wrong between keys that are each right."""

    def __init__(self, found: list[UserError]) -> None:
        self.found = found
        super().__init__("; ".join(map(str, found)))


_OF_A_COMMAND = ("compare", "family")
"""Sections that commands of the same name read."""


def explained(
    root: type[BaseModel], error: ValidationError, data: Any, name: str = ""
) -> list[UserError]:
    """All complaints.

    Args:
        data: what was validated.
        name: what a message calls the section, if it is not the whole recipe.
    """
    found: list[UserError] = []
    for complaint in error.errors():
        cause = complaint.get("ctx", {}).get("error")
        found += cause.found if isinstance(cause, Several) else [_one(root, complaint, data, name)]
    return found


def _one(root: type[BaseModel], first: Any, data: Any, name: str) -> UserError:
    cause = first.get("ctx", {}).get("error")
    path = [str(part)[:99] for part in _written(first["loc"], data)]
    key = ".".join([name, *path] if name else path) or name or "recipe"
    if isinstance(cause, UserError):
        return cause if cause.key else UserError(key, cause.value, cause.problem, cause.fix)
    if first["type"] == "extra_forbidden":
        if root.__name__ == "Recipe" and key in _OF_A_COMMAND:
            fix = f"give this file to `fusegpt {key}`, or leave {key} out"
            return UserError(key, "{…}", "not a key of a single run", fix)
        known = _keys_at(root, path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        prefix = "".join(f"{part}." for part in path[:-1])
        fix = (
            f"did you mean {prefix}{near[0]}?"
            if near
            else f"the keys here are {', '.join(sorted(known))}"
        )
        return UserError(
            key, shown(first["input"]), "unknown key", fix.rstrip("?") if near else fix
        )
    if first["type"] == "missing" and isinstance(first["loc"][-1], int):
        return UserError(key, shown(first["input"]), "a value too few", "give one more")
    if first["type"] == "missing":
        return UserError(key, None, "missing", f"add {key} to the recipe")
    sections = [*_sections_at(root, path[:-1]), *_sections_at(root, path)]
    problem, fix = told(first, key, sections)
    return UserError(key, shown(first["input"]), problem, fix)


def _written(loc: Sequence[str | int], data: Any) -> Iterator[str | int]:
    """Of a place in what was validated, the part that the user wrote: a list may be left out around
    a single value, what is missing in a list has no number, and pydantic calls a name `[key]`.
    """
    for part in loc:
        if isinstance(data, Mapping):
            data = data.get(part)
        elif isinstance(part, str):
            data = getattr(data, part, None)
        elif isinstance(data, list | tuple) and part < len(data):
            data = data[part]
        else:
            return
        if part != "[key]":
            yield part


def _keys_at(root: type[BaseModel], path: list[str]) -> list[str]:
    """Of all kinds of sections that may be there."""
    models = _sections_at(root, path)
    return [*dict.fromkeys(key for model in models for key in model.model_fields)]


def _sections_at(root: type[BaseModel], path: list[str]) -> list[type[BaseModel]]:
    """All kinds of sections that may be there."""
    models = [root]
    for part in path:  # a name of a text, or a number in a list of them, leads to no other section
        fields = [model.model_fields[part] for model in models if part in model.model_fields]
        models = [found for field in fields for found in _sections_in(field.annotation)] or models
    return models


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that a key may hold, be it in a mapping or a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections_in(argument)
