"""Which file system a URI names, and the path in it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from fusegpt_ray.store import hub_client
from fusegpt_ray.uris import is_local

SILENCE = 30.0
"""Seconds of silence after which a web server has failed; its client by itself waits for minutes.
"""


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
    fs, path = url_to_fs(uri, **_limits(uri.partition("://")[0]))
    if "s3" in fs.protocol:
        if "?versionId=" in path:  # s3fs cuts the name there
            raise ValueError("it names a version of an object, not a file or a folder")
        # botocore and `with_retries` retry already; a third loop would multiply the two.
        fs.retries = 1
    return fs, path


def _limits(protocol: str) -> dict[str, Any]:
    """Options of a file system whose client would wait for ever, or nearly."""
    if protocol == "hf":
        hub_client.patient()
    if protocol not in ("http", "https"):
        return {}
    from aiohttp import ClientTimeout  # fsspec needs it for these, too

    limits = ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)
    return {"client_kwargs": {"timeout": limits}}


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
