"""The text of a recipe: strict YAML, and keys that a command line sets in it. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from fusegpt_ray.errors import UserError
from fusegpt_ray.uris import shown

MAX_BYTES = 1_000_000
"""The largest file that is read as a recipe."""


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses two things more: a key that is given twice in one mapping, of which
    PyYAML would silently keep the last, and aliases, by which a few lines can expand to more than
    fits into memory."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, "an alias (*name) is not taken here: write it out", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        twice = [key for key, count in keys.items() if count > 1]
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {twice[0]!r} is there twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a file.

    Raises:
        UserError: the file is missing or not YAML, or holds something else.
    """
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
        text = raw.decode()
    except (OSError, ValueError) as error:
        # ValueError: not UTF-8, or a path that no file can have.
        raise UserError(
            "recipe", str(path), f"cannot be read ({error})", "give the path of a YAML recipe"
        ) from error
    if len(raw) > MAX_BYTES:
        raise UserError(
            "recipe",
            str(path),
            f"longer than {MAX_BYTES} bytes",
            "give the path of a YAML recipe",
        )
    try:
        data = _yaml(text)
    except ValueError as error:
        raise UserError(
            "recipe", str(path), f"not valid YAML ({error})", "see examples/quickstart.yaml"
        ) from error
    if not isinstance(data, dict):
        raise UserError(
            "recipe",
            str(path),
            "not a mapping of keys to values",
            "see examples/quickstart.yaml",
        )
    return data


def _yaml(text: str) -> Any:
    """
    Raises:
        ValueError: says what is wrong and in which line, without quoting it, for it may hold a
            secret.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ValueError(
            f"line {mark.line + 1 if mark else '?'}: {error.problem or error.context}"
        ) from error
    except yaml.YAMLError as error:  # a character that YAML does not know
        raise ValueError(str(error).partition("\n")[0]) from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        # PyYAML raises these for `!!int {}` and the like.
        raise ValueError(f"a value that is none ({type(error).__name__})") from error


def read_recipe(path: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """The mapping in a file, with `overrides` of the form `key=value`.

    Raises:
        UserError: see `read_yaml`, `set_key`.
    """
    data = read_yaml(path)
    for override in overrides:
        set_key(data, override)
    return data


def set_key(data: dict[str, Any], override: str) -> None:
    """Set what `key=value` says, with a dotted key and a YAML value.

    Raises:
        UserError: it is of another form.
    """
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(
            "--set",
            shown(override),
            "not of the form key=value",
            "write for example --set fusion.epochs=5",
        )
    try:
        value = _yaml(text)
    except ValueError as error:
        raise UserError(
            "--set", shown(override), f"the value is not YAML ({error})", "quote it"
        ) from error
    *parents, last = key.split(".")
    section: Any = data
    for number, parent in enumerate(parents, 1):
        if section.get(parent) is None:
            section[parent] = {}
        section = section[parent]
        if not isinstance(section, dict):
            place, rest = ".".join(parents[:number]), [*parents[number:], last]
            whole = f"{place}={{{': {'.join(rest)}: …{'}' * len(rest)}"
            raise UserError(
                "--set",
                shown(override),
                f"{place} is not a section, but {shown(section)!r}",
                f"see docs/recipe.md for all keys; one that can be either is set as a whole: "
                f"--set '{whole}'",
            )
    section[last] = value
