"""A real S3 server behind a proxy that injects faults (see `faults.py`), and two such faults."""

from __future__ import annotations

from collections.abc import Iterator

import fsspec
import pytest
from faults import Proxy, answers
from s3fs import S3FileSystem

BUSY = {
    status: answers(status, code)
    for status, code in [(500, "InternalError"), (503, "SlowDown"), (429, "TooManyRequests")]
}
EXPIRED = answers(403, "ExpiredToken", "The provided token has expired.")


@pytest.fixture(name="proxy")
def _proxy(s3, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The S3 server as the package sees it: one try a request, three seconds of silence are too
    long, small parts.
    """
    upstream = int(s3.client.meta.endpoint_url.rsplit(":", 1)[1])
    proxy = Proxy(upstream)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("FUSEGPT_RETRY_SECONDS", "60")
    options = {
        "config_kwargs": {"read_timeout": 3, "connect_timeout": 3},
        "default_block_size": 5 * 2**20,
    }
    monkeypatch.setitem(fsspec.config.conf, "s3", options)
    S3FileSystem.clear_instance_cache()
    yield proxy
    proxy.stop()
    S3FileSystem.clear_instance_cache()
