"""An address from which nothing comes: it is said soon and once, and given up on in time; a large
answer may take as long as it likes, if it goes on coming.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import fsspec
import pytest

from fusegpt_ray.errors import StorageError
from fusegpt_ray.store import filesystem, retry, storage
from fusegpt_ray.terminal.log_lines import LogLines

SILENCE = 0.5
"""Seconds."""
HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 40\r\nConnection: close\r\n\r\n"
Capture = pytest.LogCaptureFixture


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Half a second of silence is too long, and one of eight ends an operation."""
    monkeypatch.setattr(filesystem, "SILENCE", SILENCE)
    patience = {"read_timeout": SILENCE, "connect_timeout": SILENCE}
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": patience})
    monkeypatch.setattr(retry, "_told_until", {})
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "us-east-1")
    monkeypatch.setenv("FUSEGPT_RETRY_SECONDS", "8")
    monkeypatch.delenv("AWS_MAX_ATTEMPTS", raising=False)
    yield
    for protocol in ("s3", "http"):
        fsspec.get_filesystem_class(protocol).clear_instance_cache()


@pytest.mark.parametrize("store", ["s3", "http"])
def test_it_is_said_once_and_given_up(
    store: str, port: int, monkeypatch: pytest.MonkeyPatch, caplog: Capture
) -> None:
    address = f"http://127.0.0.1:{port}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    place = "s3://bucket" if store == "s3" else address

    def look(_: int) -> None:
        with pytest.raises(StorageError, match="given up after"):
            storage.size(f"{place}/file")

    begin = time.monotonic()
    with ThreadPoolExecutor(3) as threads:
        assert [*threads.map(look, range(3))] == [None] * 3
    assert time.monotonic() - begin < 30
    (told,) = caplog.messages
    assert told.startswith(f"{place}/file: ") and "; trying for up to " in told
    assert "imeout" in told or "annot connect" in told or "ould not connect" in told, told


def test_an_answer_may_take_longer_than_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte every 0.1 s, for four seconds."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def trickle() -> None:
            with suppress(OSError):
                connection, _ = server.accept()
                connection.recv(1 << 16)
                connection.sendall(HEAD)
                for _ in range(40):
                    time.sleep(0.1)
                    connection.sendall(b"x")
                connection.close()

        thread = threading.Thread(target=trickle, daemon=True)
        thread.start()
        uri = f"http://127.0.0.1:{server.getsockname()[1]}/large"
        assert storage.read(uri) == b"x" * 40
        thread.join()
    assert filesystem.filesystem(uri)[0].client_kwargs["timeout"].total is None


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def options(protocol: str) -> dict[str, object]:
        found = filesystem.filesystem(f"{protocol}://place/file")[0]
        return found.config_kwargs if protocol == "s3" else found.client_kwargs

    own = {"read_timeout": SILENCE, "connect_timeout": SILENCE}
    assert options("s3") == own | {"retries": {"total_max_attempts": filesystem.SENDS}}
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "7")
    assert options("s3") == own
    monkeypatch.delenv("AWS_MAX_ATTEMPTS")
    said = {"retries": {"total_max_attempts": 9}}
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": said})
    assert options("s3") == said
    monkeypatch.setitem(fsspec.config.conf, "https", {"client_kwargs": {"trust_env": True}})
    assert options("https").keys() == {"timeout", "trust_env"}


def test_time_counts_from_the_silence_but_not_from_the_work_before_it() -> None:
    """A long upload that breaks in the end has the whole time to be made again."""
    failures = iter([ConnectionResetError("reset"), ConnectionResetError("reset")])

    def uploads() -> str:
        time.sleep(0.5)
        for failure in failures:
            raise failure
        return "written"

    assert retry.with_retries("s3://bucket/file", uploads, seconds=2) == "written"

    def waits() -> None:
        time.sleep(0.5)
        raise TimeoutError("nothing came")

    with pytest.raises(StorageError, match="given up after 1 try"):
        retry.with_retries("s3://bucket/file", waits, seconds=0.4)


def test_it_is_a_line_of_json_where_these_are_asked_for(capsys: pytest.CaptureFixture) -> None:
    with LogLines():
        logging.getLogger("fusegpt_ray.store.retry").warning("%s is away", "s3://bucket")
    assert '"message": "s3://bucket is away"' in capsys.readouterr().err
