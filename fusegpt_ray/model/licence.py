"""Under which licence a model stands, as its card or its files say it, in the words of the hub."""

from __future__ import annotations

import re
from typing import Any

from fusegpt_ray.errors import StorageError
from fusegpt_ray.model.companions import CARD
from fusegpt_ray.model.source import Source
from fusegpt_ray.store import storage
from fusegpt_ray.store.front_matter import front_matter, is_name

_FILE = re.compile(r"(licen[cs]e|copying)[^/]*", re.IGNORECASE)

Licence = dict[str, str | list[str]]
"""`license` (a short name of the hub's, such as apache-2.0), and where that is "other",
`license_name` and `license_link`: each only where it is known."""


def licence_of(source: Source) -> Licence:
    """What the source's card says, or else which file holds its licence; nothing if neither does.

    A link leads to a file that goes along, or to an address.
    """
    said = _said(_header(source))
    files = [name for name in source.small_files if _FILE.fullmatch(name)]
    if not said and files:
        return {"license": "other", "license_link": files[0]}
    link = said.get("license_link")
    if isinstance(link, str) and "://" not in link and link not in source.small_files:
        del said["license_link"]
        if source.on_hub:
            revision = source.revision or "main"
            said["license_link"] = f"https://huggingface.co/{source.name}/blob/{revision}/{link}"
    return said


def _header(source: Source) -> Any:
    """The YAML at the top of the card; anybody may have written it."""
    try:
        return front_matter(storage.read(storage.join(source.folder, CARD), storage.SMALL))
    except StorageError:
        raise
    except (OSError, ValueError):  # no card, or a huge one
        return None


def _said(header: Any) -> Licence:
    if not isinstance(header, dict) or not is_name(header.get("license")):
        return {}
    keys = ("license", "license_name", "license_link")
    return {key: header[key] for key in keys if is_name(header.get(key))}
