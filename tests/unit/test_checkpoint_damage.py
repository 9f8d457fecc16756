"""Lazy safetensors against every way a file or a folder of them can be damaged."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fusegpt_ray.errors import UserError
from fusegpt_ray.store.checkpoint import INDEX, SINGLE, read_index, read_tensors

KEY = "model.source"


def raw_file(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def f32(begin: Any, end: Any, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": shape if not isinstance(shape, tuple) else list(shape),
        "data_offsets": [begin, end],
    }


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
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a\nsize 5000000000\n",
    "a header that is no JSON": raw_file(b"{]", DATA),
    "a header that is no text": raw_file(b'{"\xff\xfe": 1}', DATA),
    "a header that is a list": raw_file([1, 2], DATA),
    "a header that is a number": raw_file(b"123", DATA),
    "a header nested very deeply": raw_file(b"[" * 100_000, DATA),
    "an entry that is a number": raw_file({"a": 7}, DATA),
    "an entry that is null": raw_file({"a": None}, DATA),
    "an entry without offsets": raw_file({"a": {"dtype": "F32", "shape": [6]}}, DATA),
    "offsets of one number": raw_file(
        {"a": {"dtype": "F32", "shape": [6], "data_offsets": [24]}}, DATA
    ),
    "offsets that are text": raw_file({"a": f32("x", "y", (6,))}, DATA),
    "offsets that are infinite": raw_file(
        b'{"a":{"dtype":"F32","shape":[6],"data_offsets":[0,1e999]}}', DATA
    ),
    "offsets that are not a number": raw_file(
        b'{"a":{"dtype":"F32","shape":[6],"data_offsets":[0,NaN]}}', DATA
    ),
    "offsets that are fractions": raw_file({"a": f32(0.5, 24.5, (6,))}, DATA),
    "negative offsets": raw_file({"a": f32(-8, 16, (6,))}, DATA),
    "offsets in the wrong order": raw_file({"a": f32(24, 0, (6,))}, DATA),
    "offsets outside the file": raw_file({"a": f32(0, 32, (8,))}, DATA),
    "offsets far outside the file": raw_file({"a": f32(2**62, 2**62 + 8)}, DATA),
    "another size than the shape": raw_file({"a": f32(0, 24, (5,))}, DATA),
    "a negative shape": raw_file({"a": f32(0, 24, (-2, -3))}, DATA),
    "a shape of fractions": raw_file({"a": f32(0, 24, (1.5, 4))}, DATA),
    "a shape that is a number": raw_file({"a": f32(0, 24, 6)}, DATA),
    "a shape of infinity": raw_file(
        b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,24]}}', DATA
    ),
    "an unknown dtype": raw_file({"a": f32(0, 24, (6,), "F31")}, DATA),
    "a dtype that is a list": raw_file({"a": f32(0, 24, (6,), ["F32"])}, DATA),
    "a gap between tensors": raw_file({"a": f32(0, 8), "b": f32(16, 24)}, DATA),
    "a gap before the first": raw_file({"a": f32(8, 24, (4,))}, DATA),
    "bytes after the last": raw_file({"a": f32(0, 16, (4,))}, DATA),
    "two tensors in one place": raw_file({"a": f32(0, 24, (6,)), "b": f32(0, 24, (6,))}, DATA),
    "an overlap that makes up for a gap": raw_file(
        {"a": f32(0, 8), "b": f32(0, 8), "c": f32(16, 24)}, DATA
    ),
    "data without tensors": raw_file({}, DATA),
    "half the data": raw_file({"a": f32(0, 24, (6,))}, DATA[:12]),
    "no data": raw_file({"a": f32(0, 24, (6,))}),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_files_are_refused(damage: str, tmp_path: Path) -> None:
    file = tmp_path / SINGLE
    file.write_bytes(DAMAGED[damage])
    with pytest.raises(UserError) as caught:
        read_index(str(tmp_path), KEY)
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
    (tmp_path / SINGLE).write_bytes(
        raw_file({"a": f32(0, 8), "b": f32(8, 24, (4,)), "e": f32(8, 8, (0,))}, DATA)
    )
    refs = read_index(str(tmp_path), KEY)
    assert {name: ref.end - ref.begin for name, ref in refs.items()} == {"a": 8, "b": 16, "e": 0}


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = raw_file({"a": f32(0, 8), "b": f32(8, 24, (4,))}, DATA)
    for size in range(len(whole)):
        (tmp_path / SINGLE).write_bytes(whole[:size])
        with pytest.raises(UserError):
            read_index(str(tmp_path), KEY)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 7)), min_size=1, max_size=4))
def test_flipped_bits_in_a_header_never_give_tensors_outside_the_file(
    flips: list[tuple[int, int]], tmp_path: Path
) -> None:
    """Either the file is refused, or what is read fits in it: never another error, never other
    bytes."""
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
    "pickles in shards": (
        only("pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"),
        "never opened",
    ),
    "a gguf": (only("model.gguf"), "a GGUF checkpoint"),
    "other files": (only("README.md", "config.json"), "holds no"),
    "index: no JSON": (index_file("{"), "damaged"),
    "index: a list": (index_file([]), "damaged"),
    "index: no map": (index_file({"metadata": {}}), "damaged"),
    "index: a null map": (index_file({"weight_map": None}), "damaged"),
    "index: a map of text": (index_file({"weight_map": "one.safetensors"}), "damaged"),
    "index: nested very deeply": (index_file("[" * 100_000), "damaged"),
    "index: a missing shard": (
        index_file(mapping(a="one.safetensors", b="two.safetensors")),
        "missing",
    ),
    "index: a tensor that no shard has": (
        index_file(mapping(a="one.safetensors", b="one.safetensors")),
        "no shard has it",
    ),
    "index: outside, relative": (index_file(mapping(a="../secret.safetensors")), "outside"),
    "index: outside, absolute": (index_file(mapping(a="/etc/passwd")), "outside"),
    "index: outside, another machine": (
        index_file(mapping(a="http://example.com/x.safetensors")),
        "outside",
    ),
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
