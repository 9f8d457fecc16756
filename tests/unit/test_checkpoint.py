"""Lazy safetensors against the safetensors library itself."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from fusegpt_ray.store import storage
from fusegpt_ray.store.checkpoint import (
    DTYPES,
    INDEX,
    SINGLE,
    TensorRef,
    read_header,
    read_index,
    read_tensors,
)
from fusegpt_ray.store.writer import Entry, plan_shards, write_safetensors

KEY = "model.source"


def any_tensors() -> dict[str, torch.Tensor]:
    """Tensors of every dtype and of unusual shapes."""
    tensors = {}
    for code, dtype in DTYPES.items():
        raw = torch.randint(0, 256, (3, 4 * dtype.itemsize), dtype=torch.uint8)
        tensors[f"of.{code}"] = (raw % 2 if dtype == torch.bool else raw).view(dtype)
    return tensors | {
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 7),
        "odd": torch.arange(3, dtype=torch.int8),  # what follows is not aligned
        "after odd": torch.randn(2, 3, 4, dtype=torch.float64),
        "ünï·code/名": torch.randn(2),
    }


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the bit, not-a-numbers included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return (
        a.flatten().contiguous().view(torch.uint8).tolist()
        == b.flatten().contiguous().view(torch.uint8).tolist()
    )


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(got) == set(expected)
    assert [name for name in expected if not same(got[name], expected[name])] == []


def entries_of(tensors: dict[str, torch.Tensor]) -> list[Entry]:
    return [
        Entry(name, value.dtype, tuple(value.shape), lambda value=value: value)
        for name, value in tensors.items()
    ]


# --- reading what the library writes, and the other way round ---


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    save_file(
        any_tensors(),
        tmp_path / SINGLE,
        metadata={"format": "pt", "other": "kept away from tensors"},
    )
    refs = read_index(str(tmp_path), KEY)
    assert_same(read_tensors(refs), load_file(tmp_path / SINGLE))
    some = {"mine": refs["of.BF16"], "odd": refs["odd"]}  # any part, under any names
    assert_same(
        read_tensors(some),
        {"mine": load_file(tmp_path / SINGLE)["of.BF16"], "odd": any_tensors()["odd"]},
    )
    assert read_tensors({}) == {}


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    tensors = any_tensors()
    file = tmp_path / "new" / "folder" / SINGLE
    record, refs = write_safetensors(str(file), entries_of(tensors))
    assert_same(load_file(file), tensors)
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}  # without it, transformers refuses the file
    data = file.read_bytes()
    assert (record.size, record.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert refs == read_header(str(file), KEY)
    assert_same(read_tensors(refs), tensors)
    assert {ref.dtype for ref in refs.values()} == set(DTYPES.values())
    (header_length,) = struct.unpack("<Q", data[:8])
    assert header_length % 8 == 0  # tensors start aligned, as the library's own do


def test_writing_casts_and_makes_contiguous(tmp_path: Path) -> None:
    value = torch.randn(4, 6)
    entries = [
        Entry("cast", torch.bfloat16, (4, 6), lambda: value),
        Entry("transposed", torch.float32, (6, 4), lambda: value.T),
        Entry("strided", torch.float32, (2, 6), lambda: value[::2]),
        Entry("learned", torch.float32, (4, 6), lambda: torch.nn.Parameter(value).detach()),
    ]
    write_safetensors(str(tmp_path / SINGLE), entries)
    expected = {
        "cast": value.bfloat16(),
        "transposed": value.T,
        "strided": value[::2],
        "learned": value,
    }
    assert_same(load_file(tmp_path / SINGLE), expected)


@pytest.mark.parametrize("where", ["local", "memory"])
def test_writing_is_streamed_and_leaves_nothing_behind_when_it_fails(
    where: str, tmp_path: Path
) -> None:
    folder = str(tmp_path) if where == "local" else f"memory://{tmp_path.name}"
    order = []

    def load(name: str) -> torch.Tensor:
        order.append(name)
        if name == "c":
            raise RuntimeError("lost")
        return torch.zeros(2)

    entries = [Entry(name, torch.float32, (2,), lambda name=name: load(name)) for name in "abcd"]
    with pytest.raises(RuntimeError, match="lost"):
        write_safetensors(f"{folder}/{SINGLE}", entries)
    assert order == ["a", "b", "c"]
    assert storage.names(folder) == []


def test_a_tensor_of_another_shape_than_announced_is_our_bug(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        write_safetensors(
            str(tmp_path / SINGLE), [Entry("a", torch.float32, (3,), lambda: torch.zeros(2))]
        )
    assert list(tmp_path.iterdir()) == []


def test_two_writes_of_the_same_give_the_same_bytes(tmp_path: Path) -> None:
    records = [
        write_safetensors(str(tmp_path / name), entries_of(any_tensors_once()))[0]
        for name in ("a", "b")
    ]
    assert records[0] == records[1]


def any_tensors_once() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return any_tensors()


def write_shards(folder: Path, shards: dict[str, dict[str, torch.Tensor]]) -> None:
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_sharded_checkpoints(tmp_path: Path) -> None:
    shards = {
        "one.safetensors": {"a": torch.randn(3), "b": torch.randn(2, 2)},
        "two.safetensors": {"c": torch.randn(1)},
    }
    write_shards(tmp_path, shards)
    refs = read_index(str(tmp_path), KEY)
    assert {name: Path(ref.file).name for name, ref in refs.items()} == {
        "a": "one.safetensors",
        "b": "one.safetensors",
        "c": "two.safetensors",
    }
    assert_same(read_tensors(refs), shards["one.safetensors"] | shards["two.safetensors"])


def test_a_single_file_counts_before_an_index_of_an_earlier_save(tmp_path: Path) -> None:
    """As transformers looks for them."""
    assert (SINGLE, INDEX) == (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    write_shards(tmp_path, {"one.safetensors": {"a": torch.randn(3)}})
    save_file({"now": torch.ones(1)}, tmp_path / SINGLE)
    assert_same(read_tensors(read_index(str(tmp_path), KEY)), {"now": torch.ones(1)})


def test_references_are_json_and_back() -> None:
    ref = TensorRef("s3://bucket/model.safetensors", "a.b", "BF16", (2, 3), 80, 92)
    assert TensorRef.from_json(json.loads(json.dumps(ref.to_json()))) == ref


# --- laziness ---


class CountingFileSystem(MemoryFileSystem):
    """Memory that writes down which bytes are asked for."""

    protocol = ("counting",)
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    asked: ClassVar[list[tuple[str, int, int]]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("counting://", "memory://"))

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any
    ) -> bytes:
        data = super().cat_file(path, start, end, **kwargs)
        self.asked.append((path.rsplit("/", 1)[-1], start or 0, (start or 0) + len(data)))
        return data

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        assert "r" not in mode, "files are read by ranges, not as a whole"
        return super()._open(path, mode, **kwargs)


@pytest.fixture
def counting() -> Iterator[list[tuple[str, int, int]]]:
    fsspec.register_implementation("counting", CountingFileSystem, clobber=True)
    CountingFileSystem.store.clear()
    CountingFileSystem.asked.clear()
    yield CountingFileSystem.asked
    CountingFileSystem.store.clear()


def test_only_headers_and_the_wanted_tensors_are_read(counting: list[tuple[str, int, int]]) -> None:
    tensors = {
        name: torch.randn(size, 16) for name, size in (("a", 8), ("b", 64), ("c", 2), ("d", 64))
    }
    shards = {"1.safetensors": ["a", "b"], "2.safetensors": ["c", "d"]}
    for file, names in shards.items():
        write_safetensors(
            f"counting://m/{file}", entries_of({name: tensors[name] for name in names})
        )
    index = {"weight_map": {name: file for file, names in shards.items() for name in names}}
    storage.write(f"counting://m/{INDEX}", json.dumps(index).encode())

    refs = read_index("counting://m", KEY)
    data_begins = {file: min(refs[name].begin for name in names) for file, names in shards.items()}
    assert {file for file, _, _ in counting} == {INDEX, *shards}
    assert all(end <= data_begins[file] for file, _, end in counting if file != INDEX)

    counting.clear()
    assert_same(
        read_tensors({"b": refs["b"], "c": refs["c"]}), {"b": tensors["b"], "c": tensors["c"]}
    )
    assert sorted(counting) == [(Path(refs[n].file).name, refs[n].begin, refs[n].end) for n in "bc"]


def test_memory_and_local_folders_alike(tmp_path: Path) -> None:
    tensors = any_tensors()
    for folder in (f"memory://{tmp_path.name}", str(tmp_path), f"file://{tmp_path}"):
        record, _ = write_safetensors(f"{folder}/{SINGLE}", entries_of(tensors))
        assert storage.size(f"{folder}/{SINGLE}") == record.size
        assert_same(read_tensors(read_index(folder, KEY)), tensors)


def test_a_file_that_shrank_since_its_header_was_read(tmp_path: Path) -> None:
    file = tmp_path / SINGLE
    save_file({"a": torch.randn(100)}, file)
    refs = read_header(str(file), KEY)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(OSError, match="ended early"):
        read_tensors(refs)


# --- shards ---


def sized(*sizes: int) -> list[Entry]:
    return [
        Entry(f"t{i}", torch.uint8, (size,), lambda: torch.zeros(0)) for i, size in enumerate(sizes)
    ]


@pytest.mark.parametrize(
    ("sizes", "limit", "expected"),
    [
        ((3, 3, 3), 10, [[0, 1, 2]]),
        ((5, 5), 10, [[0, 1]]),  # exactly full
        ((5, 5, 1), 10, [[0, 1], [2]]),
        ((6, 6, 6), 10, [[0], [1], [2]]),
        ((50, 1, 1), 10, [[0], [1, 2]]),  # a tensor larger than a shard has one of its own
        ((1, 50, 1), 10, [[0], [1], [2]]),
        ((), 10, [[]]),
        ((10, 0, 0), 10, [[0, 1, 2]]),
    ],
)
def test_shards(sizes: tuple[int, ...], limit: int, expected: list[list[int]]) -> None:
    shards = plan_shards(sized(*sizes), limit)
    assert [[int(entry.name[1:]) for entry in shard] for shard in shards.values()] == expected
    n = len(expected)
    names = (
        [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
        if n > 1
        else ["model.safetensors"]
    )
    assert list(shards) == names


@given(sizes=st.lists(st.integers(0, 30), max_size=30), limit=st.integers(1, 40))
def test_shards_keep_every_tensor_in_order_and_are_no_larger_than_allowed(
    sizes: list[int], limit: int
) -> None:
    shards = list(plan_shards(sized(*sizes), limit).values())
    assert [entry.name for shard in shards for entry in shard] == [
        f"t{i}" for i in range(len(sizes))
    ]
    for shard in shards:
        large = [entry.bytes for entry in shard if entry.bytes]
        assert sum(large) <= limit or len(large) == 1
