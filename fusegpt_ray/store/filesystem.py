"""Which file system a URI names, and the path in it."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import fsspec
from fsspec.config import apply_config
from fsspec.core import split_protocol, url_to_fs
from fsspec.implementations.local import LocalFileSystem

from fusegpt_ray.store import hub_client
from fusegpt_ray.uris import is_local

SILENCE = 30.0
"""Seconds of silence, at the beginning and between two pieces of an answer, after which a web
server has failed; its client by itself waits for minutes, and ends any download after five."""
SENDS = 3
"""How often botocore sends one request to S3, where nobody says otherwise; its older default is 5.
s3fs takes 15 seconds of silence for a failure."""
SILENT_SECONDS = 60.0
"""How long nobody may have answered when that is noticed: S3 three times, a web server twice."""


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system and the path that `uri` names. Credentials come from the environment alone.

    Raises:
        ValueError: the protocol is unknown, or it is a version of an object.
        ImportError: the protocol's package is missing.
    """
    uri = str(uri)
    if is_local(uri):  # whatever else fsspec would see in the name
        path = LocalFileSystem._strip_protocol(uri if "://" in uri else absolute(uri))
        return fsspec.filesystem("file"), path
    fs, path = url_to_fs(uri, **_limits(uri))
    if "s3" in fs.protocol:
        if "?versionId=" in path:  # s3fs cuts the name there
            raise ValueError("it names a version of an object, not a file or a folder")
        # botocore and `with_retries` retry already; a third loop would multiply the two.
        fs.retries = 1
    return fs, path


def _limits(uri: str) -> dict[str, dict[str, Any]]:
    """Options of each protocol in it whose client would wait for ever, or nearly. What the user has
    set, in the environment or in fsspec's configuration, stays.
    """
    found: dict[str, dict[str, Any]] = {}
    for protocol in {split_protocol(part)[0] for part in uri.split("::")}:
        if protocol == "hf":
            hub_client.patient()
        elif protocol in ("s3", "s3a") and not ("AWS_MAX_ATTEMPTS" in os.environ or _in_profile()):
            retries = {"retries": {"total_max_attempts": SENDS}}
            found[protocol] = {"config_kwargs": retries | _set(protocol, "config_kwargs")}
        elif protocol in ("http", "https"):
            from aiohttp import ClientTimeout  # fsspec needs it for these, too

            limits = ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)
            found[protocol] = {
                "client_kwargs": {"timeout": limits} | _set(protocol, "client_kwargs")
            }
    return found


def _set(protocol: str, option: str) -> dict[str, Any]:
    """What fsspec's configuration says of it."""
    said: dict[str, Any] = apply_config(fsspec.get_filesystem_class(protocol), {}).get(option)
    return said or {}


@cache
def _in_profile() -> bool:
    """Whether the user's AWS profile says how often a request is sent."""
    import botocore.session

    return botocore.session.Session().get_config_variable("max_attempts") is not None


def absolute(uri: str) -> str:
    """`uri`, made absolute if it is a local path, so that it does not depend on the working
    folder.
    """
    return uri if "://" in uri else str(Path(os.path.expanduser(uri)).absolute())


def is_remote(uri: str) -> bool:
    """Whether it lies on another machine (or on what a test takes for one)."""
    return "://" in uri and "file" not in filesystem(uri)[0].protocol


def join(uri: str, *parts: str) -> str:
    return "/".join([uri.rstrip("/"), *parts])
