"""What a manifest, or the file of a comparison or a family, tells the readers of a card and of a
report: all but where things lay on the machines of whoever made the model. Light: no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fusegpt_ray.uris import is_local

_PARTS = ("recipe", "source", "calibration", "healing", "perplexity")
"""Of a manifest, those that tell of places."""
_PLACES = ("data", "generate", "image", "prompts", "source", "uri", "model", "models", "members")
"""Keys whose text names one."""
_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
"""Of the hub; or a path of two parts, which tells no more."""
_LABEL = re.compile(r"(text generated from )?(.+?)( \([^/()]*, [^/()]*\))?", re.DOTALL)
"""See `label` of texts: the path may stand behind how a text was made, and before a dataset's
parts."""


def named(place: str) -> str:
    """What a reader can use: an address or an id as it is, of a local path the last part.

    Args:
        place: or the label of a text, which says more before it and behind it.
    """
    label = _LABEL.fullmatch(place)
    if not label:
        return place
    before, path, behind = label.groups("")
    if is_local(path) and (not _ID.fullmatch(path) or path.startswith(".")):
        path = re.split(r"[/\\]", path.rstrip("/\\"))[-1] or path
    return f"{before}{path}{behind}"


def public(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with names instead of local paths, and without the address of a cluster."""
    return {key: _public(key, value) if key in _PARTS else value for key, value in manifest.items()}


def public_of_many(result: Mapping[str, Any]) -> dict[str, Any]:
    """The same of what the file of a comparison or a family says: of its settings, which are the
    recipes of many runs in one, and of each row.
    """
    return {key: _public(key, value) for key, value in result.items()}


def _public(key: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        found = {inner: _public(inner, part) for inner, part in value.items()}
        if key == "source" and isinstance(name := value.get("name"), str):
            found["name"] = named(name)
        return found
    if isinstance(value, list):
        return [_public(key, part) for part in value]
    if key == "address":
        return None
    return named(value) if key in _PLACES and isinstance(value, str) else value
