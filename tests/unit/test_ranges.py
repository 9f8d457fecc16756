"""Ranges of files, read into the memory that they are meant for: right, once, and with no copy in
between.
"""

from __future__ import annotations

import os
import re
import threading
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import faulty  # noqa: F401 - a store that fails
import pytest
import torch
from faulty import failing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_checkpoint import any_tensors, assert_same, write_shards
from torch.multiprocessing.spawn import spawn
from watching import size_of

from fusegpt_ray.store import ranges
from fusegpt_ray.store.checkpoint import SINGLE, read_index, read_tensors
from fusegpt_ray.store.ranges import EndedEarly, Range, Reader
from fusegpt_ray.store.writer import Entry, write_safetensors

KEY = "model.source"
DATA = bytes(range(251)) * 40
"""No two pieces of the tests' sizes are alike."""

Asked = list[tuple[int, int]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """The reads of local files: where they begin, and how many bytes the kernel gave."""
    calls: Asked = []
    preadv = os.preadv

    def counted(file: int, memories: list[memoryview], at: int) -> int:
        calls.append((at, preadv(file, memories, at)))
        return calls[-1][1]

    monkeypatch.setattr(os, "preadv", counted)
    return calls


def read(uri: str, *wanted: tuple[int, int]) -> list[bytes]:
    """The bytes [begin, end) of a file, by a `Reader`."""
    memories = [memoryview(bytearray(end - begin)) for begin, end in wanted]
    parts = [Range(uri, begin, m) for (begin, _), m in zip(wanted, memories, strict=True)]
    with Reader() as reader:
        arrived = [bytes(memory) for memory in reader.start(parts)]
    assert b"".join(arrived) == b"".join(memories), "they arrive in order"
    return [bytes(memory) for memory in memories]


def expected(*wanted: tuple[int, int]) -> list[bytes]:
    return [DATA[begin:end] for begin, end in wanted]


@pytest.fixture(params=["", "file://", "faulty://"], ids=["path", "file", "store"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    (tmp_path / "data").write_bytes(DATA)
    return f"{request.param}{tmp_path}/data"


# --- what is read ---


def test_neighbours_are_read_at_once(tmp_path: Path, asked: Asked) -> None:
    file = tmp_path / "data"
    file.write_bytes(DATA)
    wanted = [(3, 10), (10, 11), (11, 11), (11, 500), (501, 502), (7, 9), (9, 20)]
    assert read(str(file), *wanted) == expected(*wanted)
    assert sorted(asked) == [(3, 497), (7, 13), (501, 1)]


def test_what_is_large_is_read_in_pieces(
    tmp_path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "data"
    file.write_bytes(DATA)
    monkeypatch.setattr(ranges, "PIECE", 100)
    wanted = [(5, 8), (8, 250), (250, 260), (9000, 9100)]
    assert read(str(file), *wanted) == expected(*wanted)
    assert sorted(asked) == [(5, 100), (105, 100), (205, 55), (9000, 100)]


@pytest.mark.parametrize("memories", [1, 2, 7])
def test_as_many_memories_as_one_call_takes(
    memories: int, tmp_path: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "data"
    file.write_bytes(DATA)
    monkeypatch.setattr(ranges, "MEMORIES", memories)
    wanted = [(at, at + 3) for at in range(0, 63, 3)]
    assert read(str(file), *wanted) == expected(*wanted)
    assert len(asked) == -(-21 // memories)


def test_more_neighbours_than_the_kernel_takes_in_a_call(tmp_path: Path, asked: Asked) -> None:
    file = tmp_path / "data"
    file.write_bytes(DATA)
    wanted = [(at, at + 1) for at in range(5000)]
    assert read(str(file), *wanted) == expected(*wanted)
    assert len(asked) == 5


@given(data=st.data(), piece=st.integers(1, 300), most=st.integers(1, 5))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_ranges(data: st.DataObject, piece: int, most: int, uri: str) -> None:
    """In any order, empty, overlapping or the same."""
    place = st.integers(0, 900)
    wanted = data.draw(st.lists(st.tuples(place, place).map(sorted).map(tuple), max_size=12))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranges, "PIECE", piece)
        patch.setattr(ranges, "MEMORIES", most)
        assert read(uri, *wanted) == expected(*wanted)


def test_a_kernel_that_gives_less_than_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it may: signals, network file systems, more than 2 GiB."""
    file = tmp_path / "data"
    file.write_bytes(DATA)
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, into, at: preadv(fd, [into[0][:37]], at))
    wanted = [(0, 37), (37, 40), (40, 5000), (6000, 6001)]
    assert read(str(file), *wanted) == expected(*wanted)


@pytest.mark.parametrize("piece", [1, 7, 64, ranges.PIECE])
def test_every_dtype_and_shape_as_the_library_reads_them(
    piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "PIECE", piece)
    save_file(any_tensors(), tmp_path / SINGLE)
    refs = read_index(str(tmp_path), KEY)
    seen: list[bytes] = []
    found = read_tensors(refs, lambda memory: seen.append(bytes(memory)))
    assert_same(found, load_file(tmp_path / SINGLE))
    begin = min(ref.begin for ref in refs.values())
    assert b"".join(seen) == (tmp_path / SINGLE).read_bytes()[begin:], "all, once, in order"
    storages = {tensor.untyped_storage().data_ptr() for tensor in found.values() if tensor.numel()}
    assert len(storages) == sum(tensor.numel() > 0 for tensor in found.values())


def test_two_names_of_one_tensor_and_several_files(tmp_path: Path) -> None:
    shards = {
        f"{number}.safetensors": {f"{number}.{key}": torch.randn(50) for key in "ab"}
        for number in range(20)
    }
    write_shards(tmp_path, shards)
    refs = read_index(str(tmp_path), KEY)
    known = {name: tensor for tensors in shards.values() for name, tensor in tensors.items()}
    found = read_tensors(refs | {"again": refs["7.b"]})
    assert_same(found, known | {"again": known["7.b"]})
    found["again"].zero_()
    assert found["7.b"].any(), "memory of their own"


# --- how much is held, and read ---

SMALL, LARGE, MANY = 1_000_000, 64_000_000, 24
ROOM = 16_000_000
"""For threads, their stacks, and what Python keeps."""


def _figures() -> tuple[int, int]:
    """Bytes that this process has read by calls, and the most memory it has ever held."""
    read = re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert read and peak
    return int(read[1]), int(peak[1]) * 1024


def _read_alone(_: int, folder: str) -> None:
    refs = read_index(folder, KEY)
    read_tensors({"warm": refs["0"]})
    resident = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert resident
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what it holds now
    before = _figures()
    tracemalloc.start()
    tensors = read_tensors(refs)
    _, python = tracemalloc.get_traced_memory()
    after, size = _figures(), size_of(refs)
    assert size > 150_000_000 and len(tensors) == len(refs)
    assert size <= after[0] - before[0] < size + 100_000, "each byte is read once"
    assert size - ROOM < after[1] - int(resident[1]) * 1024 < size + ROOM, "and held once"
    assert python < 1_000_000, "none of it in Python's own memory"


def test_each_byte_is_read_once_and_held_once(tmp_path: Path) -> None:
    sizes = [*[SMALL] * MANY, LARGE, LARGE]
    entries = [
        Entry(str(n), torch.uint8, (size,), partial(torch.ones, size, dtype=torch.uint8))
        for n, size in enumerate(sizes)
    ]
    write_safetensors(str(tmp_path / SINGLE), entries)
    spawn(_read_alone, (str(tmp_path),), nprocs=1)


def test_large_memory_is_whole_and_huge_pages_are_asked_for_within_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    advised: list[tuple[int, int, int]] = []
    real = ranges._madvise

    def advise(begin: int, size: int, advice: int) -> int:
        advised.append((begin, size, advice))
        result = real(begin, size, advice) if real else 0
        assert result in (0, -1)
        return result

    monkeypatch.setattr(ranges, "_madvise", advise)
    for size in (0, 1, ranges.HUGE - 1, ranges.HUGE, ranges.HUGE + 4097):
        memory = ranges.empty(size)
        assert (memory.shape, memory.dtype) == ((size,), torch.uint8)
        if advised:
            begin, length, _ = advised[-1]
            end = memory.data_ptr() + size
            assert memory.data_ptr() <= begin < memory.data_ptr() + 4096
            assert end - 4096 < begin + length <= end
    assert len(advised) == 2


# --- what goes wrong ---


@pytest.mark.parametrize("kept", [0, 1, 4999])
def test_a_file_that_has_shrunk(kept: int, uri: str) -> None:
    Path(uri.split("://")[-1]).write_bytes(DATA[:kept])
    for wanted in ([(0, 5000)], [(0, 10), (10, 5000)], [(0, 0), (4990, 5000)], [(6000, 6001)]):
        with pytest.raises(EndedEarly, match="ended early"):
            read(uri, *wanted)


def test_a_file_that_shrinks_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error, where a mapped file would end the process."""
    file = tmp_path / "data"
    file.write_bytes(bytes(1_000_000))
    monkeypatch.setattr(ranges, "PIECE", 100_000)
    preadv = os.preadv

    def shrinking(fd: int, into: list[memoryview], at: int) -> int:
        if at == 500_000:
            os.truncate(file, 550_000)
        return preadv(fd, into, at)

    monkeypatch.setattr(os, "preadv", shrinking)
    with pytest.raises(EndedEarly, match="ended early"):
        read(str(file), (0, 1_000_000))


@pytest.mark.parametrize(
    ("make", "error"),
    [(lambda path: None, FileNotFoundError), (Path.mkdir, IsADirectoryError)],
    ids=["missing", "a folder"],
)
def test_what_is_no_file(
    make: Callable[[Path], None], error: type[OSError], tmp_path: Path
) -> None:
    make(tmp_path / "data")
    with pytest.raises(error):
        read(str(tmp_path / "data"), (0, 1))


def test_after_a_failure_nothing_is_read_nor_written_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "data"
    file.write_bytes(b"x" * 100_000)
    monkeypatch.setattr(ranges, "PIECE", 10)
    preadv, calls = os.preadv, []

    def failing_at_once(fd: int, into: list[memoryview], at: int) -> int:
        calls.append(at)
        if at == 0:
            raise OSError(5, "Input/output error")
        return preadv(fd, into, at)

    monkeypatch.setattr(os, "preadv", failing_at_once)
    before, memory = threading.active_count(), bytearray(100_000)
    with pytest.raises(OSError, match="Input/output"), Reader() as reader:
        list(reader.start([Range(str(file), 0, memoryview(memory))]))
    assert threading.active_count() == before
    assert len(calls) < 10_000
    assert memory.count(b"x") <= 10 * len(calls)


def test_only_the_piece_that_failed_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").write_bytes(DATA)
    monkeypatch.setattr(ranges, "PIECE", 1000)
    left = [ConnectionError("reset"), TimeoutError("stalled")]

    def breaks(name: str, begin: int, data: bytes) -> bytes:
        if begin == 3000 and left:
            raise left.pop()
        return data

    with failing(breaks) as asked:
        assert read(f"faulty://{tmp_path}/data", (0, 9500)) == expected((0, 9500))
    assert sorted(begin for _, begin in asked) == sorted([*range(0, 9500, 1000), 3000, 3000])
