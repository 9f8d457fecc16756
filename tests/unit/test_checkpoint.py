"""Lazy safetensors against the safetensors library itself, and against every way a file can be damaged."""

from __future__ import annotations

import hashlib
import json
import random
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from fusegpt_ray.errors import UserError
from fusegpt_ray.store import storage
from fusegpt_ray.store.checkpoint import (
    DTYPES,
    INDEX,
    SINGLE,
    Entry,
    TensorRef,
    plan_shards,
    read_header,
    read_index,
    read_tensors,
    write_safetensors,
)

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
    return a.flatten().contiguous().view(torch.uint8).tolist() == b.flatten().contiguous().view(torch.uint8).tolist()


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(got) == set(expected)
    assert [name for name in expected if not same(got[name], expected[name])] == []


def entries_of(tensors: dict[str, torch.Tensor]) -> list[Entry]:
    return [Entry(name, value.dtype, tuple(value.shape), lambda value=value: value) for name, value in tensors.items()]


# --- reading what the library writes, and the other way round ---


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    save_file(any_tensors(), tmp_path / SINGLE, metadata={"format": "pt", "other": "kept away from tensors"})
    refs = read_index(str(tmp_path), KEY)
    assert_same(read_tensors(refs), load_file(tmp_path / SINGLE))
    some = {"mine": refs["of.BF16"], "odd": refs["odd"]}  # any part, under any names
    assert_same(read_tensors(some), {"mine": load_file(tmp_path / SINGLE)["of.BF16"], "odd": any_tensors()["odd"]})
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
    expected = {"cast": value.bfloat16(), "transposed": value.T, "strided": value[::2], "learned": value}
    assert_same(load_file(tmp_path / SINGLE), expected)


@pytest.mark.parametrize("where", ["local", "memory"])
def test_writing_is_streamed_and_leaves_nothing_behind_when_it_fails(where: str, tmp_path: Path) -> None:
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
        write_safetensors(str(tmp_path / SINGLE), [Entry("a", torch.float32, (3,), lambda: torch.zeros(2))])
    assert list(tmp_path.iterdir()) == []


def test_two_writes_of_the_same_give_the_same_bytes(tmp_path: Path) -> None:
    records = [write_safetensors(str(tmp_path / name), entries_of(any_tensors_once()))[0] for name in ("a", "b")]
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
    shards = {"one.safetensors": {"a": torch.randn(3), "b": torch.randn(2, 2)}, "two.safetensors": {"c": torch.randn(1)}}
    write_shards(tmp_path, shards)
    save_file({"not": torch.zeros(1)}, tmp_path / SINGLE)  # the index says what counts
    refs = read_index(str(tmp_path), KEY)
    assert {name: Path(ref.file).name for name, ref in refs.items()} == {
        "a": "one.safetensors",
        "b": "one.safetensors",
        "c": "two.safetensors",
    }
    assert_same(read_tensors(refs), shards["one.safetensors"] | shards["two.safetensors"])


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

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
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
    tensors = {name: torch.randn(size, 16) for name, size in (("a", 8), ("b", 64), ("c", 2), ("d", 64))}
    shards = {"1.safetensors": ["a", "b"], "2.safetensors": ["c", "d"]}
    for file, names in shards.items():
        write_safetensors(f"counting://m/{file}", entries_of({name: tensors[name] for name in names}))
    index = {"weight_map": {name: file for file, names in shards.items() for name in names}}
    storage.write(f"counting://m/{INDEX}", json.dumps(index).encode())

    refs = read_index("counting://m", KEY)
    data_begins = {file: min(refs[name].begin for name in names) for file, names in shards.items()}
    assert {file for file, _, _ in counting} == {INDEX, *shards}
    assert all(end <= data_begins[file] for file, _, end in counting if file != INDEX)

    counting.clear()
    assert_same(read_tensors({"b": refs["b"], "c": refs["c"]}), {"b": tensors["b"], "c": tensors["c"]})
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


# --- damage ---


def raw_file(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def f32(begin: Any, end: Any, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape if not isinstance(shape, tuple) else list(shape), "data_offsets": [begin, end]}


DATA = bytes(range(24))
DAMAGED: dict[str, bytes] = {
    "nothing": b"",
    "four bytes": b"\x02\0\0\0",
    "a length and no header": struct.pack("<Q", 50),
    "a length of zero": struct.pack("<Q", 0),
    "a length one too large": raw_file({"a": f32(0, 8)}, DATA[:8], length=200),
    "a length of 2^63": raw_file({"a": f32(0, 8)}, DATA[:8], length=2**63),
    "a length of 2^64 − 1": raw_file({"a": f32(0, 8)}, DATA[:8], length=2**64 - 1),
    "a length that cuts the header": raw_file({"a": f32(0, 8)}, DATA[:8], length=20),
    "a pickle": b"\x80\x02}q\x00X\x01\x00\x00\x00aq\x01K\x01s." * 20,
    "a web page": b"<!DOCTYPE html><html><head><title>404</title></head></html>",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5000000000\n",
    "a header that is no JSON": raw_file(b"{]", DATA),
    "a header that is no text": raw_file(b'{"\xff\xfe": 1}', DATA),
    "a header that is a list": raw_file([1, 2], DATA),
    "a header that is a number": raw_file(b"123", DATA),
    "a header nested very deeply": raw_file(b"[" * 100_000, DATA),
    "an entry that is a number": raw_file({"a": 7}, DATA),
    "an entry that is null": raw_file({"a": None}, DATA),
    "an entry without offsets": raw_file({"a": {"dtype": "F32", "shape": [6]}}, DATA),
    "offsets of one number": raw_file({"a": {"dtype": "F32", "shape": [6], "data_offsets": [24]}}, DATA),
    "offsets that are text": raw_file({"a": f32("x", "y", (6,))}, DATA),
    "offsets that are infinite": raw_file(b'{"a":{"dtype":"F32","shape":[6],"data_offsets":[0,1e999]}}', DATA),
    "offsets that are not a number": raw_file(b'{"a":{"dtype":"F32","shape":[6],"data_offsets":[0,NaN]}}', DATA),
    "offsets that are fractions": raw_file({"a": f32(0.5, 24.5, (6,))}, DATA),
    "negative offsets": raw_file({"a": f32(-8, 16, (6,))}, DATA),
    "offsets in the wrong order": raw_file({"a": f32(24, 0, (6,))}, DATA),
    "offsets outside the file": raw_file({"a": f32(0, 32, (8,))}, DATA),
    "offsets far outside the file": raw_file({"a": f32(2**62, 2**62 + 8)}, DATA),
    "another size than the shape": raw_file({"a": f32(0, 24, (5,))}, DATA),
    "a negative shape": raw_file({"a": f32(0, 24, (-2, -3))}, DATA),
    "a shape of fractions": raw_file({"a": f32(0, 24, (1.5, 4))}, DATA),
    "a shape that is a number": raw_file({"a": f32(0, 24, 6)}, DATA),
    "a shape of infinity": raw_file(b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,24]}}', DATA),
    "an unknown dtype": raw_file({"a": f32(0, 24, (6,), "F31")}, DATA),
    "a dtype that is a list": raw_file({"a": f32(0, 24, (6,), ["F32"])}, DATA),
    "a gap between tensors": raw_file({"a": f32(0, 8), "b": f32(16, 24)}, DATA),
    "a gap before the first": raw_file({"a": f32(8, 24, (4,))}, DATA),
    "bytes after the last": raw_file({"a": f32(0, 16, (4,))}, DATA),
    "two tensors in one place": raw_file({"a": f32(0, 24, (6,)), "b": f32(0, 24, (6,))}, DATA),
    "an overlap that makes up for a gap": raw_file({"a": f32(0, 8), "b": f32(0, 8), "c": f32(16, 24)}, DATA),
    "data without tensors": raw_file({}, DATA),
    "half the data": raw_file({"a": f32(0, 24, (6,))}, DATA[:12]),
    "no data": raw_file({"a": f32(0, 24, (6,))}),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_files_are_refused(damage: str, tmp_path: Path) -> None:
    file = tmp_path / SINGLE
    file.write_bytes(DAMAGED[damage])
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        read_index(str(tmp_path), KEY)
    assert time.monotonic() - started < 5
    assert caught.value.key == KEY
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("damage", DAMAGED)
def test_the_library_agrees_that_they_are_damaged(damage: str, tmp_path: Path) -> None:
    file = tmp_path / SINGLE
    file.write_bytes(DAMAGED[damage])
    with pytest.raises((SafetensorError, OSError)):
        load_file(file)


def test_an_intact_file_of_the_same_make_is_read(tmp_path: Path) -> None:
    """The table above would also pass if everything were refused."""
    (tmp_path / SINGLE).write_bytes(raw_file({"a": f32(0, 8), "b": f32(8, 24, (4,)), "e": f32(8, 8, (0,))}, DATA))
    refs = read_index(str(tmp_path), KEY)
    assert {name: ref.end - ref.begin for name, ref in refs.items()} == {"a": 8, "b": 16, "e": 0}


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = raw_file({"a": f32(0, 8), "b": f32(8, 24, (4,))}, DATA)
    for size in range(len(whole)):
        (tmp_path / SINGLE).write_bytes(whole[:size])
        with pytest.raises(UserError):
            read_index(str(tmp_path), KEY)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 7)), min_size=1, max_size=4))
def test_flipped_bits_in_a_header_never_give_tensors_outside_the_file(flips: list[tuple[int, int]], tmp_path: Path) -> None:
    """Either the file is refused, or what is read fits in it: never another error, never other bytes."""
    data = bytearray(raw_file({"a.b": f32(0, 8), "c": f32(8, 24, (4, 1))}, DATA))
    for place, bit in flips:
        data[place % (len(data) - len(DATA))] ^= 1 << bit
    (tmp_path / SINGLE).write_bytes(data)
    try:
        refs = read_index(str(tmp_path), KEY)
    except UserError:
        return
    tensors = read_tensors(refs)
    assert sum(value.numel() * value.itemsize for value in tensors.values()) == len(DATA)


def test_random_bytes_are_refused(tmp_path: Path) -> None:
    draw = random.Random(0)
    for _ in range(100):
        (tmp_path / SINGLE).write_bytes(draw.randbytes(draw.randrange(200)))
        with pytest.raises(UserError):
            read_index(str(tmp_path), KEY)


def index_file(content: Any) -> Callable[[Path], None]:
    def put(folder: Path) -> None:
        save_file({"a": torch.zeros(2)}, folder / "one.safetensors")
        (folder / INDEX).write_text(content if isinstance(content, str) else json.dumps(content))

    return put


def mapping(**shards: Any) -> dict[str, Any]:
    return {"weight_map": shards}


def only(*names: str) -> Callable[[Path], None]:
    def put(folder: Path) -> None:
        for name in names:
            (folder / name).write_bytes(b"\x80\x02}.")

    return put


FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty": (only(), "holds no"),
    "pickles": (only("pytorch_model.bin"), "pickles are never opened"),
    "pickles in shards": (only("pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"), "never opened"),
    "a gguf": (only("model.gguf"), "not a safetensors"),
    "other files": (only("README.md", "config.json"), "holds no"),
    "index: no JSON": (index_file("{"), "damaged"),
    "index: a list": (index_file([]), "damaged"),
    "index: no map": (index_file({"metadata": {}}), "damaged"),
    "index: a null map": (index_file({"weight_map": None}), "damaged"),
    "index: a map of text": (index_file({"weight_map": "one.safetensors"}), "damaged"),
    "index: nested very deeply": (index_file("[" * 100_000), "damaged"),
    "index: a missing shard": (index_file(mapping(a="one.safetensors", b="two.safetensors")), "missing"),
    "index: a tensor that no shard has": (index_file(mapping(a="one.safetensors", b="one.safetensors")), "no shard has it"),
    "index: outside, relative": (index_file(mapping(a="../secret.safetensors")), "outside"),
    "index: outside, absolute": (index_file(mapping(a="/etc/passwd")), "outside"),
    "index: outside, another machine": (index_file(mapping(a="http://example.com/x.safetensors")), "outside"),
    "index: outside, backslashes": (index_file(mapping(a="..\\secret.safetensors")), "outside"),
    "index: the folder above": (index_file(mapping(a="..")), ""),
    "index: the folder itself": (index_file(mapping(a=".")), ""),
    "index: an empty name": (index_file(mapping(a="")), ""),
    "index: a chain of file systems": (index_file(mapping(a="zip::one.safetensors")), ""),
    "index: a name with a null byte": (index_file(mapping(a="one\0.safetensors")), ""),
    "index: shards that are numbers": (index_file(mapping(a=1, b="one.safetensors")), "damaged"),
    "index: shards that are lists": (index_file(mapping(a=["one.safetensors"])), "damaged"),
    "index: shards that are null": (index_file(mapping(a=None)), "damaged"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders_that_hold_no_whole_checkpoint(case: str, tmp_path: Path) -> None:
    put, problem = FOLDERS[case]
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.zeros(2)}, tmp_path / "secret.safetensors")
    put(folder)
    with pytest.raises(UserError) as caught:
        read_index(str(folder), KEY)
    assert caught.value.key == KEY
    assert problem in str(caught.value)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    for folder in (str(tmp_path / "absent"), "memory://absent"):
        with pytest.raises(UserError, match="holds no"):
            read_index(folder, KEY)


# --- shards ---


def sized(*sizes: int) -> list[Entry]:
    return [Entry(f"t{i}", torch.uint8, (size,), lambda: torch.zeros(0)) for i, size in enumerate(sizes)]


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
    names = [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)] if n > 1 else ["model.safetensors"]
    assert list(shards) == names


@given(sizes=st.lists(st.integers(0, 30), max_size=30), limit=st.integers(1, 40))
def test_shards_keep_every_tensor_in_order_and_are_no_larger_than_allowed(sizes: list[int], limit: int) -> None:
    shards = list(plan_shards(sized(*sizes), limit).values())
    assert [entry.name for shard in shards for entry in shard] == [f"t{i}" for i in range(len(sizes))]
    for shard in shards:
        large = [entry.bytes for entry in shard if entry.bytes]
        assert sum(large) <= limit or len(large) == 1
