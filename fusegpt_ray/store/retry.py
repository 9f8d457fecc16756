"""Retries of a failing store: exponential pauses with jitter, then one clear error.

- botocore sends an S3 request up to 3 times itself (see `AWS_MAX_ATTEMPTS`). The loop of
  s3fs around it is switched off in `filesystem`, because the two would multiply. Two cases are left
  for us: streams that break after the answer began, which no retry of a request sees, and outages
  longer than a few seconds. An operation is retried until the store has failed for
  `FUSEGPT_RETRY_SECONDS` seconds (default 120); silence before the first time-out is failing, too.
- What is waited for is said at once, once an outage: a warning of Python's `logging`, which goes to
  stderr, above the bar where there is one.
- Errors are told apart by the name of their class and the answer of the server, so that no store's
  package is imported here.
- Messages are cleaned of user names, passwords, signatures and keys.
"""

from __future__ import annotations

import errno
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import urlsplit

from fusegpt_ray.errors import StorageError
from fusegpt_ray.store.filesystem import SILENT_SECONDS

T = TypeVar("T")
_LOG = logging.getLogger(__name__)

LONGEST_PAUSE = 30.0
# Classes of botocore, aiohttp, requests, httpx and Python that say that the connection failed.
_PASSING = {
    "HTTPClientError",
    "ClientPayloadError",
    "ClientConnectionError",
    "IncompleteRead",
    "IncompleteReadError",
    "ResponseParserError",
    "TransportError",
    "ConnectionError",
    "TimeoutError",
}
_NO_CREDENTIALS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "ProfileNotFound",
    "SSOError",
    "SSOTokenLoadError",
    "TokenRetrievalError",
    "LoginRefreshRequired",
}
_PASSING_CODES = {
    "SlowDown",
    "RequestTimeout",
    "Throttling",
    "ThrottlingException",
    "NoSuchUpload",
    "OperationAborted",
}
"""`NoSuchUpload`: the upload was finished and the answer lost; it is written again."""
_PASSING_STATUS = {408, 409, 429, 500, 502, 503, 504, 509}
_KEYS = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, or the profile"
_FIXES = {
    "ExpiredToken": "renew the credentials and run the same command again",
    "ExpiredTokenException": "renew the credentials and run the same command again",
    "TokenRefreshRequired": "renew the credentials and run the same command again",
    "RequestTimeTooSkewed": "set this machine's clock",
    "InvalidAccessKeyId": _KEYS,
    "InvalidToken": _KEYS,
    "SignatureDoesNotMatch": _KEYS,
    "NoSuchBucket": "create the bucket, or correct its name",
    "InvalidBucketName": "correct the bucket's name",
    "QuotaExceeded": "free space there, or choose another place",
}
_LOCAL = {
    errno.ENOSPC: "free space there, or choose another place",
    errno.EDQUOT: "free space there, or choose another place",
    errno.EFBIG: "lower output.shard_gb, or raise the limit on a file's size",
    errno.EROFS: "choose a place that can be written",
}


@dataclass(frozen=True)
class Answer:
    """What the server said."""

    status: int
    code: str
    message: str


@dataclass(frozen=True)
class Trouble:
    """A failure of the store, not a fact about a file (that it is missing, say)."""

    problem: str
    passing: bool
    """Whether another try may help."""
    fix: str = ""
    silent: bool = False
    """Whether nobody answered, so that it began before it was noticed."""


def retry_seconds() -> float:
    """How long, in seconds, an operation is retried while the store keeps failing."""
    return float(os.environ.get("FUSEGPT_RETRY_SECONDS", "120"))


_counting = threading.Lock()
_retries = 0
_told_until: dict[str, float] = {}
"""By store: the end of the time for which a person knows that it is waited for."""


def retries() -> int:
    """How often this process has tried an operation again."""
    return _retries


def with_retries(uri: str, verb: Callable[[], T], seconds: float | None = None) -> T:
    """Call `verb`, and call it again while the store fails in a way that may pass.

    `verb` must be safe to call twice. Time counts from its first failure; where that is a time-out,
    from the beginning of the silence before it.

    Raises:
        StorageError: retrying cannot help, or did not help for `seconds` seconds
            (`FUSEGPT_RETRY_SECONDS` if None).
    """
    if seconds is None:
        seconds = retry_seconds()
    began, ends = time.monotonic(), None
    attempt = 0
    while True:
        try:
            return verb()
        except Exception as error:
            found = trouble(error)
            if found is None:
                raise
            now = time.monotonic()
            if ends is None:
                ends = seconds + (max(began, now - SILENT_SECONDS) if found.silent else now)
            pause = min(LONGEST_PAUSE, 0.2 * 2**attempt) * random.SystemRandom().uniform(0.5, 1.5)
            if not found.passing:
                raise StorageError(cleaned(uri), found.problem, found.fix) from error
            if now + pause > ends:
                raise StorageError(
                    cleaned(uri),
                    f"{found.problem}; given up after {attempt + 1} "
                    f"{'tries' if attempt else 'try'}",
                ) from error
            _tell(cleaned(uri), found.problem, now, ends)
        attempt += 1
        with _counting:
            global _retries
            _retries += 1
        time.sleep(pause)


def _tell(uri: str, problem: str, now: float, ends: float) -> None:
    """That a store is waited for: nobody is to sit before a screen where nothing happens. Many
    threads may find the same outage; it is said once.
    """
    with _counting:
        place = urlsplit(uri)[:2]
        store = "://".join(place)
        known = now < _told_until.get(store, now)
        _told_until[store] = max(ends, _told_until.get(store, ends))
    if not known:
        _LOG.warning("%s: %s; trying for up to %.0f s more", uri, problem, ends - now)


def trouble(error: BaseException) -> Trouble | None:
    """What an exception says about the store; None if it is about a file or a bug of ours."""
    if isinstance(error, StorageError):
        return None
    said = answer(error)
    if said is not None:
        passing = said.status in _PASSING_STATUS or said.code in _PASSING_CODES
        if (
            isinstance(error, FileNotFoundError | FileExistsError)
            and not passing
            and said.code not in _FIXES
        ):
            return None
        fix = _FIXES.get(
            said.code,
            "check the credentials, their rights and the region"
            if said.status in (400, 401, 403)
            else "",
        )
        return Trouble(
            cleaned(f"the store answered {said.status} {said.code} ({said.message})"), passing, fix
        )
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        found = trouble(error.__cause__)  # fsspec says so of any address that it cannot ask
        return found if found and found.passing else None
    classes = {link.__name__ for link in type(error).__mro__}
    said_of = next(
        (str(link) for link in _chain(error) if str(link)), ""
    )  # a time-out says nothing
    text = cleaned(f"{type(error).__name__}: {said_of}")
    if classes & _NO_CREDENTIALS:
        return Trouble(text, False, _KEYS)
    if classes & _PASSING:
        return Trouble(text, True, silent=any("Timeout" in name for name in classes))
    if isinstance(error, OSError) and error.errno in _LOCAL:
        return Trouble(cleaned(str(error)), False, _LOCAL[error.errno])
    return None


def answer(error: BaseException) -> Answer | None:
    """The server's answer behind an exception, or None.

    s3fs turns botocore's exceptions into Python's own and keeps the original as the cause.
    """
    for link in _chain(error):
        response = getattr(link, "response", None)
        if isinstance(response, dict) and isinstance(response.get("Error"), dict):
            said, meta = response["Error"], response.get("ResponseMetadata", {})
            code = str(said.get("Code", ""))
            status = meta.get("HTTPStatusCode") or (int(code) if code.isdecimal() else 0)
            return Answer(status, code, str(said.get("Message", "")))
        if type(link).__name__ == "ClientResponseError":  # of aiohttp
            return Answer(link.status, "", link.message)  # type: ignore[attr-defined]
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def cleaned(text: str) -> str:
    """`text` without user names and passwords in URIs, signed queries and the values of secret
    variables.
    """
    text = re.sub(r"://[^/\s'\"]+@", "://***@", text)
    text = re.sub(r"\?[^\s'\"]*(?i:signature|token|credential|key)[^\s'\"]*", "?***", text)
    for name, value in os.environ.items():
        if re.search(r"SECRET|TOKEN|PASSWORD|ACCESS_KEY|API_KEY", name) and len(value) >= 8:
            text = text.replace(value, "***")
    return text
