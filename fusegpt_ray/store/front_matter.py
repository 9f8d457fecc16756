"""The YAML at the top of a card of the hub's, whoever wrote it."""

from __future__ import annotations

import re
from typing import Any

import yaml

_HEADER = re.compile(r"\s*---\r?\n(.*?)\r?\n---\r?\n", re.DOTALL)


def front_matter(card: bytes) -> Any:
    """What it says; None if there is none, or none that is YAML."""
    try:
        found = _HEADER.match(card.decode())
        return yaml.safe_load(found[1]) if found else None
    except (ValueError, RecursionError, yaml.YAMLError):
        return None
    except (LookupError, AttributeError, TypeError):  # PyYAML's, of values that are not their tag's
        return None


def is_name(value: Any) -> bool:
    """Whether it is a line of text, or several, that can stand in a card."""
    if isinstance(value, list):
        return bool(value) and all(isinstance(item, str) and is_name(item) for item in value)
    return isinstance(value, str) and 0 < len(value) <= 500 and value.isprintable()
