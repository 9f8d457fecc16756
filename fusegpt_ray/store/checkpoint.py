"""Lazy reading and streamed writing of (sharded) safetensors, anywhere fsspec reaches.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}},
then the tensors' bytes (https://github.com/huggingface/safetensors#format). The library's own
reader needs a local file and its writer the whole file in memory; we read single tensors by byte
ranges and write tensor by tensor. Nothing here ever unpickles.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from fusegpt_ray.errors import StorageError, UserError, reading_users_file
from fusegpt_ray.store import diagnosis, storage
from fusegpt_ray.store.records import FileRecord as FileRecord
from fusegpt_ray.store.retry import with_retries
from fusegpt_ray.store.threads import one_ahead

INDEX = SAFE_WEIGHTS_INDEX_NAME
SINGLE = SAFE_WEIGHTS_NAME
"""Where both are there, transformers takes this one; so do we (see `choice`)."""
MAX_HEADER_BYTES = (
    storage.SMALL
)  # some 200,000 tensors; the format's own limit is 100 MB, which parsed would take gigabytes

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Where one tensor lies: bytes [begin, end) of a safetensors file."""

    file: str
    name: str
    code: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.code]

    def to_json(self) -> list[Any]:
        return [self.file, self.name, self.code, list(self.shape), self.begin, self.end]

    @classmethod
    def from_json(cls, row: Sequence[Any]) -> TensorRef:
        file, name, code, shape, begin, end = row
        return cls(file, name, code, tuple(shape), begin, end)


def read_header(file: str, key: str) -> dict[str, TensorRef]:
    """The tensors of one safetensors file, checked against its size; only the header is read.

    Raises:
        UserError: not a whole safetensors file; `key` is the recipe key the message names.
    """

    again = diagnosis.remedy("")

    def bad(problem: str) -> UserError:
        return UserError(key, file, problem, again)

    try:
        total = storage.size(file)
        (beginning,) = storage.read_ranges(file, [(0, min(diagnosis.BEGINNING, total))])
    except FileNotFoundError as error:
        raise bad("this safetensors file is missing") from error
    except PermissionError as error:
        raise bad("this file may not be read") from error
    except StorageError:
        raise
    except OSError as error:  # a folder, a link to itself, …
        raise bad(f"this file cannot be read ({error.strerror})") from error
    length = struct.unpack("<Q", beginning[:8])[0] if total >= 8 else 0
    if not 2 <= length <= min(MAX_HEADER_BYTES, total - 8):
        if what := diagnosis.kind(beginning):
            raise UserError(
                key, file, f"not a safetensors file, but {what}", diagnosis.remedy(what)
            )
        raise bad("not a safetensors file (its header does not fit in it)")
    (raw,) = storage.read_ranges(file, [(8, 8 + length)])
    with reading_users_file(key, file, "damaged safetensors header", again):
        header = json.loads(
            raw.decode(), object_pairs_hook=_once, parse_int=_natural, parse_constant=_natural
        )
        about = header.pop("__metadata__", {})
        if not isinstance(about, dict) or not all(
            isinstance(value, str) for value in about.values()
        ):
            raise ValueError("its __metadata__ is not text by name")
        refs = {name: _ref(file, name, entry, 8 + length, total) for name, entry in header.items()}
    end = 8 + length
    for ref in sorted(refs.values(), key=lambda ref: (ref.begin, ref.end)):
        if ref.begin != end:
            raise bad("with tensors that overlap, or bytes that belong to no tensor")
        end = ref.end
    if end != total:
        raise bad("truncated, or with bytes that belong to no tensor")
    return refs


def _ref(file: str, name: str, entry: Mapping[str, Any], data: int, total: int) -> TensorRef:
    name.encode()  # half a surrogate pair, as JSON can write it, names nothing
    short = name[:200]
    if entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{short} is described by {sorted(entry)[:4]}")
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{short} has the unknown dtype {str(entry['dtype'])[:20]!r}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if (
        not type(shape) is type(offsets) is list
        or len(shape) > 64
        or any(type(number) is not int for number in (*shape, *offsets))
    ):
        raise ValueError(f"{short} has the shape {str(shape)[:100]}")
    if (
        math.prod(size for size in shape if size) >= 1 << 60
    ):  # where others would overflow: a size of 0 among them hides it
        raise ValueError(f"{short} has the absurd shape {str(shape)[:100]}")
    begin, end = (data + offset for offset in offsets)
    if (
        not data <= begin <= end <= total
        or end - begin != math.prod(shape) * DTYPES[entry["dtype"]].itemsize
    ):
        raise ValueError(f"{short} lies outside the file or has another size than its shape says")
    return TensorRef(file, name, entry["dtype"], tuple(shape), begin, end)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which no name is there twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("the same name is there twice")
    return found


def _natural(text: str) -> int:
    """Unsigned whole numbers with no more digits than the size of a file can have."""
    if not text.isdecimal() or len(text) > 19:
        raise ValueError(f"{text[:30]} is no size")
    return int(text)


def read_weight_map(folder: str, key: str) -> dict[str, str]:
    """Which shard holds each tensor, by the folder's index.

    Raises:
        UserError: it is damaged, or names a file that is not directly in the folder.
    """
    with reading_users_file(key, folder, f"damaged {INDEX}", "download the checkpoint again"):
        raw = storage.read(storage.join(folder, INDEX), storage.SMALL)
        diagnosis.refuse_other_kinds(key, folder, INDEX, raw[: diagnosis.BEGINNING])
        weight_map: dict[str, str] = dict(json.loads(raw.decode())["weight_map"])
        outside = [
            shard
            for shard in weight_map.values()
            if not re.fullmatch(r"[^/\\:\0]{1,200}\.safetensors", shard)
        ]
    if outside:
        raise UserError(
            key,
            folder,
            f"{INDEX} points outside its folder: {outside[0][:200]!r}",
            "use a trusted checkpoint",
        )
    return weight_map


def read_index(folder: str, key: str) -> dict[str, TensorRef]:
    """Every tensor of the checkpoint in `folder`, sharded or not; only headers are read.

    Raises:
        UserError: no safetensors, a damaged file, or an index that does not match its shards.
    """
    files = storage.names(folder)
    chosen = choice(files)
    if chosen == SINGLE:
        return read_header(storage.join(folder, SINGLE), key)
    if chosen == INDEX:
        weight_map = read_weight_map(folder, key)
        refs: dict[str, TensorRef] = {}
        for shard in sorted(set(weight_map.values())):
            refs |= read_header(storage.join(folder, shard), key)
        missing = sorted(set(weight_map) - set(refs))
        if missing:
            raise UserError(
                key,
                folder,
                f"{INDEX} lists {missing[0]}, no shard has it",
                "download the checkpoint again",
            )
        return refs
    problem, fix = diagnosis.unusable_folder(files, storage.folders(folder))
    raise UserError(key, folder, problem or f"holds no {SINGLE} and no {INDEX}", fix)


def choice(files: Collection[str]) -> str | None:
    """The file that `from_pretrained` opens first: one file of weights, else an index of shards."""
    return next((name for name in (SINGLE, INDEX) if name in files), None)


def read_tensors(refs: Mapping[str, TensorRef]) -> dict[str, torch.Tensor]:
    """Read the named tensors from their files into memory (CPU), each byte once."""
    tensors: dict[str, torch.Tensor] = {}
    for name, part in read_parts(refs):
        ref = refs[name]
        # bytearray: torch wants writable memory, and the copy is dropped with the tensor.
        flat = (
            torch.frombuffer(bytearray(part), dtype=ref.dtype)
            if part
            else torch.empty(0, dtype=ref.dtype)
        )
        tensors[name] = flat.reshape(ref.shape)
    return tensors


def read_parts(refs: Mapping[str, TensorRef]) -> Iterator[tuple[str, bytes]]:
    """The named tensors' bytes, file by file; those of one file are read at once."""
    by_file: dict[str, list[str]] = {}
    for name, ref in refs.items():
        by_file.setdefault(ref.file, []).append(name)
    for file, members in by_file.items():
        parts = storage.read_ranges(file, [(refs[name].begin, refs[name].end) for name in members])
        for name, part in zip(members, parts, strict=True):
            ref = refs[name]
            if len(part) != ref.end - ref.begin:
                raise OSError(
                    f"{file} ended early while {ref.name} was read: "
                    f"{len(part)} of {ref.end - ref.begin} bytes"
                )
            yield name, part


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: its size is known now, its values are fetched when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def layout(
    file: str, tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]
) -> tuple[bytes, dict[str, TensorRef]]:
    """The header of a safetensors file of these tensors (name, dtype, shape), and their places."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in tensors:
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    head = struct.pack("<Q", len(raw)) + raw
    del header["__metadata__"]
    return head, {
        name: _ref(file, name, entry, len(head), len(head) + end) for name, entry in header.items()
    }


def write_safetensors(
    file: str, entries: Sequence[Entry]
) -> tuple[FileRecord, dict[str, TensorRef]]:
    """Write one safetensors file tensor by tensor; returns its record and the tensors' places.

    While a tensor is written, it is hashed by another thread and the next one is loaded by a third.
    After a failure that may pass, the whole file is written again from newly loaded entries.
    """
    return with_retries(file, lambda: _write_once(file, entries))


def _write_once(file: str, entries: Sequence[Entry]) -> tuple[FileRecord, dict[str, TensorRef]]:
    head, refs = layout(file, ((entry.name, entry.dtype, entry.shape) for entry in entries))
    digest, total = hashlib.sha256(), 0
    with storage.writing(file) as out, ThreadPoolExecutor(1, "hash") as other:

        def put(data: bytes | memoryview) -> None:
            nonlocal total
            hashed = other.submit(digest.update, data)
            out.write(data)
            hashed.result()
            total += len(data)

        put(head)
        for entry, tensor in zip(entries, one_ahead(_load, entries), strict=True):
            assert tuple(tensor.shape) == entry.shape, (entry.name, tensor.shape, entry.shape)
            assert total == refs[entry.name].begin
            put(tensor.view(-1).view(torch.uint8).numpy().data if entry.bytes else b"")
    return FileRecord(total, digest.hexdigest()), refs


def _load(entry: Entry) -> torch.Tensor:
    return entry.load().to(dtype=entry.dtype).contiguous()


def plan_shards(entries: Iterable[Entry], shard_bytes: int) -> dict[str, list[Entry]]:
    """File name → its tensors, in order, each file at most `shard_bytes` (or one tensor)."""
    shards: list[list[Entry]] = [[]]
    room = shard_bytes
    for entry in entries:
        if shards[-1] and entry.bytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(entry)
        room -= entry.bytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors": shard
        for i, shard in enumerate(shards)
    }
