"""A name is a name: which places may be written to and removed from. Light: no torch, no fsspec.

fsspec takes `* ? [ ]` for a pattern, `::` for a chain and `?versionId=` for a version, some stores
drop empty segments, and some clients resolve `..`: such a name may mean the files of others. On a
local disk every name is taken as it is.
"""

from __future__ import annotations

import re

from fusegpt_ray.errors import UserError

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_PATTERN = re.compile(r"[*?\[\]]")
_LOCAL = ("file://", "local://")


def is_local(uri: str) -> bool:
    """Whether it names something on this machine's file systems."""
    return "://" not in uri or uri.startswith(_LOCAL)


def refuse_ambiguous(key: str, uri: str) -> None:
    """
    Raises:
        UserError: this place, to be written to or removed from, could be taken for another one.
    """
    if problem := _ambiguity(uri):
        raise UserError(key, uri, problem, "choose another name")


def _ambiguity(uri: str) -> str:
    """Why a place could be taken for another one, or nothing."""
    if found := _CONTROL.search(uri):
        return f"has the control character {found.group()!r} in it"
    if is_local(uri):
        return ""
    if found := _PATTERN.search(uri):
        return f"has {found.group()!r} in it, which object stores' clients take for a pattern"
    if "::" in uri:
        return "is a chain of file systems, not the name of a place"
    segments = uri.partition("://")[2].removeprefix("/").rstrip("/").split("/")  # hdfs:///a is fine
    if strange := [segment for segment in segments if segment in ("", ".", "..")]:
        return f"has the segment {strange[0]!r} in it"
    try:
        uri.encode()
    except UnicodeEncodeError:
        return "is not Unicode text"
    return ""
