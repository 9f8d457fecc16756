"""A small model to pull, from a store that does as it is told, and the folder it is pulled to."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import faulty  # noqa: F401 - the store
import pytest

from fusegpt_ray.publishing import download

CHUNK = 1000
"""Bytes a request, in these tests."""
FILES = {
    "config.json": b"{}",
    "empty.txt": b"",
    "model-00001-of-00002.safetensors": hashlib.shake_256(b"1").digest(4 * CHUNK + 7),
    "model-00002-of-00002.safetensors": hashlib.shake_256(b"2").digest(2 * CHUNK),
    "with space, ünïcode.txt": b"named so",
}
ONE, TWO = (name for name in FILES if name.endswith(".safetensors"))


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The retries of storage have their own tests (`tests/integration/test_faults.py`)."""
    monkeypatch.setenv("FUSEGPT_RETRY_SECONDS", "0")


@pytest.fixture(autouse=True)
def _small_and_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "CHUNK", CHUNK)
    monkeypatch.setattr(download, "PAUSE", 0.0)


def manifest(contents: dict[str, bytes], **changes: Any) -> bytes:
    records = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in contents.items()
    }
    return json.dumps({"format": 1, "kept": [0, 2], "files": records} | changes).encode()


def write_model(folder: Path, files: dict[str, bytes] = FILES) -> Path:
    for name, data in {**files, "fusegpt.json": manifest(files)}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture(name="source")
def _source(tmp_path: Path) -> str:
    """The URI of a model in a store that does as it is told."""
    return f"faulty://{write_model(tmp_path / 'source')}"


@pytest.fixture(name="target")
def _target(tmp_path: Path) -> Path:
    return tmp_path / "here" / "model"


def part_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.part")


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


WHOLE = {**FILES, "fusegpt.json": manifest(FILES)}


def assert_pulled(target: Path) -> None:
    assert contents(target) == WHOLE
    assert [path.name for path in target.parent.iterdir()] == [target.name]
