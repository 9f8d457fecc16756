"""`keys`: every key of a recipe with its default, from the classes that check recipes."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import click

from fusegpt_ray.commands.options import json_option, quiet_option
from fusegpt_ray.errors import UserError

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from fusegpt_ray.recipe.text_sections import Section

WIDTH = 96
_BOUNDS = {"gt": "over", "ge": "at least", "lt": "below", "le": "at most"}


@click.command()
@click.argument("section", metavar="[SECTION]", default="")
@json_option
@quiet_option
def keys(section: str, as_json: bool, quiet: bool) -> None:
    """List the keys of a recipe with their defaults.

    Of all sections, of one such as heal, or a single key such as heal.tokens. NAME stands for a
    name that you choose, N for the place in a list. What `preset` fills in comes before defaults.
    """
    del quiet  # nothing but the result is said in any case
    rows = [*_all_keys()]
    found = [row for row in rows if not section or f"{row['key']}.".startswith(f"{section}.")]
    if not found:
        names = ", ".join(dict.fromkeys(row["key"].partition(".")[0] for row in rows))
        raise UserError("SECTION", section, "no such section or key", f"use one of {names}")
    if as_json:
        click.echo(json.dumps({"keys": found}))
        return
    for row in found:
        click.echo(f"{row['key']}: {row['default']}")
        said = " ".join([row["text"], *([f"({row['values']})"] if row["values"] else [])])
        if said:
            click.echo(textwrap.indent(textwrap.fill(said, WIDTH - 4), "    "))


def _all_keys() -> Iterator[dict[str, str]]:
    from fusegpt_ray.comparison.cells import Compare
    from fusegpt_ray.family.members import Family
    from fusegpt_ray.recipe.recipe import Recipe

    yield from _keys(Recipe, "")
    for name, section in (("family", Family), ("compare", Compare)):
        yield {"key": name, "default": "left out", "values": "", "text": section.__doc__ or ""}
        yield from _keys(section, f"{name}.")


def _keys(section: type[Section], before: str) -> Iterator[dict[str, str]]:
    """Of a section and those in it, whose keys begin with the name of the section."""
    for name, told in section.model_fields.items():
        key = before + name
        within = [*_sections(told.annotation, key)]
        about = within[0][1].__doc__ if within else ""
        yield {
            "key": key,
            "default": _default(told, bool(within)),
            "values": ", ".join(_values(told)),
            "text": " ".join((told.description or about or "").split()),
        }
        for place, inner in within:
            yield from _keys(inner, f"{place}.")


def _sections(kind: Any, key: str) -> Iterator[tuple[str, type[Section]]]:
    """Sections that a key's value may hold, and where its keys stand then."""
    from fusegpt_ray.recipe.text_sections import Section

    if isinstance(kind, type) and issubclass(kind, Section):
        yield key, kind
        return
    place = {dict: ".NAME", list: ".N", tuple: ".N"}.get(get_origin(kind) or kind, "")
    for part in () if get_origin(kind) is Literal else get_args(kind):
        yield from _sections(part, key + place)


def _default(told: FieldInfo, holds_keys: bool) -> str:
    if told.is_required():
        return "required"
    value = told.get_default(call_default_factory=True, validated_data={})
    if value is None or value == {}:
        return "left out"
    if holds_keys and not isinstance(value, list | tuple):
        return "its keys' defaults"
    return json.dumps(value, default=str)


def _values(told: FieldInfo) -> Iterator[str]:
    """What it may be, where that is a choice or within bounds."""
    choices = [*dict.fromkeys(_choices(told.annotation))]
    if choices:
        yield "one of " + ", ".join(map(str, choices))
    for limit in told.metadata:
        for name, words in _BOUNDS.items():
            if (bound := getattr(limit, name, None)) is not None:
                yield f"{words} {bound:,}"


def _choices(kind: Any) -> Iterator[object]:
    if get_origin(kind) is Literal:
        yield from get_args(kind)
        return
    for part in get_args(kind):
        yield from _choices(part)
