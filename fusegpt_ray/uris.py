"""Secrets in URIs. What a user asks for is written into journals, manifests, cards and logs, so a
URI may hold none. Light.
"""

from __future__ import annotations

import re

from fusegpt_ray.errors import UserError

_HIDDEN = "…"
_NAMES_A_USER = {"http", "https", "s3", "s3a", "gs", "gcs"}
"""Schemes where a lone name before an @ is a key or a token; elsewhere it may be an account or a
container (sftp, abfs)."""
_SECRET_PARAMETER = re.compile(
    r"[?&][^=&]*(secret|token|password|passwd|signature|credential|key|sig)[^=&]*=", re.IGNORECASE
)
_FIX = (
    "leave it out: credentials come from the environment or the provider's chain, and a signed"
    " address is downloaded first"
)


def secret_in(text: str) -> str:
    """What in a URI is, or may be, a secret; nothing if there is none, or if it is no URI."""
    for part in text.split("::"):  # fsspec's chains: simplecache::s3://…
        scheme, found, rest = part.partition("://")
        if not found or (scheme := scheme.lower()) == "github":  # there org:repo@branch
            continue
        authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
        user, at, host = authority.rpartition("@")
        if ":" in user or (at and scheme in _NAMES_A_USER):
            return "a URI with a user name, key or password in it"
        if re.search(r":(?!\d*$)", host) and not host.startswith(
            "["
        ):  # the key's slash has cut it short
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
