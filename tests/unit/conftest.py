"""What several unit tests share: a user's desk, a look at what is read of weights, and a port from
which nothing comes.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from desk import Desk

# Their asserts, too, are to say what they compared.
pytest.register_assert_rewrite(
    "bench",
    "cached_blocks",
    "expected",
    "manifests",
    "published_models",
    "pulling",
    "recipes",
    "stopped_runs",
    "workshop",
)


@pytest.fixture
def desk(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Desk:
    from desk import Desk

    monkeypatch.chdir(tmp_path)
    return Desk.make(tmp_path, checkpoint("llama"))


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process has joined no Ray, although integration tests may have started theirs in it."""
    monkeypatch.setattr("ray.is_initialized", lambda: False)


@pytest.fixture
def weight_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The safetensors files of which more than the header has been read since (they are really
    read).
    """
    from mistakes import header_bytes

    from fusegpt_ray.store import ranges, storage

    reads: list[str] = []
    read, read_ranges, fill = storage.read, storage.read_ranges, storage.fill_local
    start = ranges.Reader.start

    def counting_read(uri: str, limit: int | None = None) -> bytes:
        if uri.endswith(".safetensors"):
            reads.append(uri)
        return read(uri, limit)

    def counting_read_ranges(uri: str, ranges: list[tuple[int, int]]) -> list[bytes]:
        parts = read_ranges(uri, ranges)
        if uri.endswith(".safetensors") and max(end for _, end in ranges) > 8 + header_bytes(
            Path(uri)
        ):
            reads.append(uri)
        return parts

    def counting_start(self: ranges.Reader, wanted: Iterable[ranges.Range]) -> Iterator[memoryview]:
        wanted = list(wanted)
        reads.extend(part.uri for part in wanted if len(part.memory))
        return start(self, wanted)

    monkeypatch.setattr(ranges.Reader, "start", counting_start)

    def counting_fill(path: str, begin: int, memory: memoryview) -> int:
        if path.endswith(".safetensors"):
            reads.append(path)
        return fill(path, begin, memory)

    monkeypatch.setattr(storage, "fill_local", counting_fill)
    monkeypatch.setattr(storage, "read", counting_read)
    monkeypatch.setattr(storage, "read_ranges", counting_read_ranges)
    return reads


@pytest.fixture(params=["silent", "closed"])
def port(request: pytest.FixtureRequest) -> Iterator[int]:
    """One that takes connections, and from which nothing comes; or one that takes none."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        number = server.getsockname()[1]
        if request.param == "silent":
            yield number
            return
    yield number
