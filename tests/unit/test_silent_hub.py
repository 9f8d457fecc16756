"""A hub, or a web server, that takes connections and says nothing, as a proxy does that has lost
its network: nothing waits for it for ever.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants, get_session
from pulling import write_model

from fusegpt_ray.errors import StorageError, UserError
from fusegpt_ray.model import hub
from fusegpt_ray.publishing.upload import upload
from fusegpt_ray.store import filesystem, hub_client, storage

NAME, COMMIT = "some-org/tiny", "0123456789abcdef0123456789abcdef01234567"
ENOUGH = 20.0
"""Seconds that no answer may take: far more than all limits here, far less than for ever."""


@pytest.fixture(name="address")
def _address() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0), backlog=100) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture(name="began")
def _began(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[float]:
    """It is the hub; gives the time."""
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for limit in ("SOON", "LONGEST"):
        monkeypatch.setattr(hub_client, limit, 0.3)
    began = time.monotonic()
    yield began
    assert time.monotonic() - began < ENOUGH


@pytest.mark.usefixtures("began")
def test_a_model_is_taken_from_the_cache(tmp_path: Path) -> None:
    folder = tmp_path / "cache/models--some-org--tiny"
    for file, text in {"refs/main": COMMIT, f"snapshots/{COMMIT}/config.json": "{}"}.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)
    found, files = hub.snapshot(NAME, None, "model.source", lambda files: files)
    assert (found, files) == (str(folder / "snapshots" / COMMIT), ())


@pytest.mark.usefixtures("began")
def test_one_that_is_not_there_is_told() -> None:
    with pytest.raises(UserError, match=r"it cannot be reached: .*; nor is it in the cache here"):
        hub.snapshot(NAME, None, "model.source", lambda files: files)


@pytest.mark.usefixtures("began")
def test_a_model_cannot_be_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 20)
    with pytest.raises(StorageError, match="timed out"):
        upload(str(write_model(tmp_path / "tiny-p40")), "me/tiny-p40")


@pytest.mark.usefixtures("began")
def test_what_the_libraries_ask_has_a_limit_too(address: str) -> None:
    """Also where they ask for none."""
    hub_client.patient()
    with pytest.raises(Exception, match="timed out"):
        get_session().get(f"{address}/api/anything", timeout=None)


def test_a_web_server_is_a_store_that_fails(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem, "SILENCE", 0.3)
    monkeypatch.setenv("FUSEGPT_RETRY_SECONDS", "1")
    began = time.monotonic()
    with pytest.raises(StorageError, match="given up after"):
        storage.read(f"{address}/model/fusegpt.json")
    assert time.monotonic() - began < ENOUGH
