"""Lazy reading of (sharded) safetensors, anywhere fsspec reaches.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}},
then the tensors' bytes (https://github.com/huggingface/safetensors#format). The library's own
reader needs a local file; we read single tensors by byte ranges. Nothing here ever unpickles.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from fusegpt_ray.errors import StorageError, UserError, reading_users_file
from fusegpt_ray.store import diagnosis, ranges, storage
from fusegpt_ray.store.records import FileRecord as FileRecord

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


Seen = Callable[[memoryview], object]
"""Looks at bytes that were read."""


class Reading(Protocol):
    """`read_tensors`, or what brings the tensors somewhere else than into the CPU's memory."""

    def __call__(
        self, refs: Mapping[str, TensorRef], seen: Seen | None = None
    ) -> dict[str, torch.Tensor]: ...


def read_tensors(
    refs: Mapping[str, TensorRef], seen: Seen | None = None
) -> dict[str, torch.Tensor]:
    """Read the named tensors from their files into memory of their own (CPU), each byte once.

    Args:
        seen: is given all of their bytes, piece by piece while others are read, in the order in
            which they lie in their files.

    Raises:
        OSError: a file is gone, cannot be read, or has shrunk (`ranges.EndedEarly`).
    """
    memory = {name: ranges.empty(ref.end - ref.begin) for name, ref in refs.items()}
    with ranges.Reader() as reader:
        for piece in reader.start(
            ranges.Range(refs[name].file, refs[name].begin, ranges.memory_of(memory[name]))
            for name in in_order(refs)
        ):
            if seen is not None:
                seen(piece)
    return {name: memory[name].view(ref.dtype).view(ref.shape) for name, ref in refs.items()}


def in_order(refs: Mapping[str, TensorRef]) -> list[str]:
    """Their names in the order in which they lie in their files, so that neighbours are found."""
    return sorted(refs, key=lambda name: (refs[name].file, refs[name].begin, refs[name].end))
