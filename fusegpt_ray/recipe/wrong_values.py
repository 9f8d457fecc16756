"""What is said of a value of the wrong kind: one table from pydantic's types of errors to words and
to what to write instead. No torch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel

from fusegpt_ray.uris import shown

_NAME = "use letters, digits, dots, dashes and underscores, and begin with a letter or a digit"
_SEVERAL = "write {key}: [{written}]"
_WORDS = {
    "model_type": ("not a section with keys of its own", "write {key}: {{{first}}}"),
    "dict_type": ("no mapping of names to values", "write {key}: {{name: {written}}}"),
    "tuple_type": ("not a list", _SEVERAL),
    "list_type": ("not a list", _SEVERAL),
    "too_short": ("fewer than {min_length} of them", "add some"),
    "too_long": ("more than {max_length} of them", "leave some out"),
    "string_type": ("not a text", "give a text, in quotes where it looks like something else"),
    "string_unicode": ("not a text in Unicode", "give another text"),
    "invalid_key": ("a key that is no text", "put it in quotes"),
    "string_too_short": ("an empty text", "write something between the quotes"),
    "string_too_long": ("longer than {max_length} characters", "shorten it"),
    "string_pattern_mismatch": ("has characters that cannot stand here", _NAME),
    "bool_type": ("neither true nor false", "write true or false"),
    "bool_parsing": ("neither true nor false", "write true or false"),
    "int_type": ("not a whole number", "give a whole number{range}"),
    "int_parsing": ("not a whole number", "give a whole number{range}"),
    "int_parsing_size": ("not a whole number that could be counted", "give a whole number{range}"),
    "int_from_float": ("not a whole number", "give a whole number{range}"),
    "float_type": ("not a number", "give a number{range}"),
    "float_parsing": ("not a number", "give a number{range}"),
    "finite_number": ("not a finite number", "give {a} number{range}"),
    "greater_than": ("not above {gt}", "give {a} number{range}"),
    "greater_than_equal": ("not {ge} or more", "give {a} number{range}"),
    "less_than": ("not below {lt}", "give {a} number{range}"),
    "less_than_equal": ("not {le} or less", "give {a} number{range}"),
    "literal_error": ("not one of {expected}", "use one of these"),
}
"""What is wrong, and what to write. `first` is the key that a section needs, `range` what
a number may be, and `written` what stands there, if it is short."""
_LIMITS = {"gt": "above {}", "ge": "of at least {}", "lt": "below {}", "le": "of at most {}"}
_UNTOLD = 10**12
"""Limits as large as this one bound what is stored, not what makes sense."""
_SHARE = re.compile(r"\s*\+?(\d+(?:\.\d+)?)\s*%\s*")


def told(complaint: Mapping[str, Any], key: str, sections: Sequence[type[BaseModel]]) -> list[str]:
    """[what is wrong, what to do].

    Args:
        sections: those that may have the key, and those that may stand there.
    """
    kind, value = complaint["type"], complaint["input"]
    context = {key: _plain(each) for key, each in complaint.get("ctx", {}).items()}
    if kind not in _WORDS:
        return [complaint["msg"][0].lower() + complaint["msg"][1:], f"change {key}"]
    short = isinstance(value, str | int | float) and not isinstance(value, bool)
    written = str(shown(value)) if short and value != "" else "…"
    known = {
        "key": key,
        "written": written,
        "first": _first(context.get("class_name"), sections, written),
        **_numbers(str(complaint["loc"][-1]) if complaint["loc"] else "", context, sections),
    }
    problem, fix = (text.format_map(known | context) for text in _WORDS[kind])
    if kind == "float_parsing" and (share := _SHARE.fullmatch(str(value))):
        fix = f"write {float(share[1]) / 100:g}"
    if kind == "literal_error" and isinstance(value, str):
        names = re.findall(r"'([^']*)'", context["expected"])
        for near in difflib.get_close_matches(value, names, n=1):
            fix = f"did you mean {near}"
    return [problem, fix]


def _plain(value: Any) -> Any:
    """1.0 → 1, which is what a person writes."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _first(name: str | None, sections: Sequence[type[BaseModel]], value: str) -> str:
    """Of a section of this name, the key that it must have, and what may be meant for it; or, if
    there is none that it must have, its first key.
    """
    for section in sections:
        if section.__name__ == name:
            fields = section.model_fields
            needed = [f"{key}: {value}" for key in fields if fields[key].is_required()]
            return next(iter([*needed, *(f"{key}: …" for key in fields)]))
    return "…"


def _numbers(
    key: str, missed: Mapping[str, Any], sections: Sequence[type[BaseModel]]
) -> dict[str, str]:
    """What a number under this key may be: "a" or "a whole", and its "range". How large it may be
    is only said where it is larger.
    """
    field = next((one.model_fields[key] for one in sections if key in one.model_fields), None)
    kinds = (field.annotation, *get_args(field.annotation)) if field else ()
    limits = {limit: missed[limit] for limit in _LIMITS if limit in missed}
    for mark in field.metadata if field else ():
        limits |= {
            limit: getattr(mark, limit)
            for limit in ("gt", "ge", "lt")
            if abs(getattr(mark, limit, _UNTOLD)) < _UNTOLD
        }
    parts = [
        text.format(f"{limits[limit]:,}") for limit, text in _LIMITS.items() if limit in limits
    ]
    whole = "a whole" if int in kinds and float not in kinds else "a"
    return {"a": whole, "range": f" {' and '.join(parts)}" if parts else ""}
