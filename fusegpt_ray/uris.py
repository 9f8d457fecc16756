"""What a URI may hold. Light: no torch, no fsspec.

No URI may hold a secret: what a user asks for is written into journals, manifests, cards and logs.

A place to be written to or removed from may not be ambiguous either. fsspec takes `* ? [ ]` for a
pattern, `::` for a chain and `?versionId=` for a version, some stores drop empty segments, and some
clients resolve `..`: such a name may mean the files of others. On a local disk every name is taken
as it is.
"""

from __future__ import annotations

import re

from fusegpt_ray.errors import UserError

_HIDDEN = "…"
_NAMES_A_USER = {"http", "https", "s3", "s3a", "gs", "gcs"}
"""Schemes where a lone name before an @ is a key or a token. Elsewhere it may be an account or a
container (sftp, abfs)."""
_SECRET_PARAMETER = re.compile(
    r"[?&][^=&]*(secret|token|password|passwd|signature|credential|key|sig)[^=&]*=", re.IGNORECASE
)
_FIX = (
    "leave it out: credentials come from the environment or the provider's chain, and a signed"
    " address is downloaded first"
)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_PATTERN = re.compile(r"[*?\[\]]")
_LOCAL = ("file://", "local://")


def secret_in(text: str) -> str:
    """What in a URI is, or may be, a secret, in words. Empty if there is none, or if it is not a
    URI.
    """
    for part in text.split("::"):  # fsspec's chains: simplecache::s3://…
        scheme, found, rest = part.partition("://")
        if not found or (scheme := scheme.lower()) == "github":  # it has org:repo@branch
            continue
        authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
        user, at, host = authority.rpartition("@")
        if ":" in user or (at and scheme in _NAMES_A_USER):
            return "a URI with a user name, key or password in it"
        if re.search(r":(?!\d*$)", host) and not host.startswith("["):
            # A slash in the key has cut it short.
            return "a URI with a key or password in it"
        if ("?" in rest and scheme in ("http", "https")) or _SECRET_PARAMETER.search(rest):
            return "a URI with a query, which may be a secret"
    return ""


def refuse_secret(key: str, uri: str) -> None:
    """
    Raises:
        UserError: the URI holds what may be a secret, which the message does not repeat.
    """
    if problem := secret_in(uri):
        raise UserError(
            key,
            f"{uri.partition('://')[0]}://{_HIDDEN}",
            f"{problem}; URIs are written to logs and manifests",
            _FIX,
        )


def shown(value: object) -> object:
    """A value for a message: not too long, and without secrets."""
    try:
        text = repr(value)
    except ValueError:  # a number of more digits than Python converts
        return _HIDDEN
    return _HIDDEN if len(text) >= 200 or secret_in(text) else value


def is_local(uri: str) -> bool:
    """Whether the URI names something on this machine's file systems."""
    return "://" not in uri or uri.startswith(_LOCAL)


def refuse_ambiguous(key: str, uri: str) -> None:
    """
    Raises:
        UserError: this place, to be written to or removed from, could be taken for another one.
    """
    if problem := _ambiguity(uri):
        raise UserError(key, uri, problem, "choose another name")


def _ambiguity(uri: str) -> str:
    """Why a place could be taken for another one; empty if it could not."""
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
