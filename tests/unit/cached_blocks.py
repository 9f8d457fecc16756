"""Blocks in a store that counts what is read, and a look at what the node's cache holds of them."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import faulty  # noqa: F401 - the store
import pytest
import torch

from fusegpt_ray.model import cache as module
from fusegpt_ray.model.cache import BlockCache
from fusegpt_ray.model.stack import Refs
from fusegpt_ray.store.checkpoint import read_tensors
from fusegpt_ray.store.writer import Entry, write_safetensors

VALUES = 1000
"""Of the largest tensor of a block."""


@pytest.fixture(autouse=True)
def _forget() -> None:
    """What has been said, as in a new process."""
    module._SAID.clear()


@pytest.fixture(name="folder")
def _folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def write_block(uri: str, seed: int) -> Refs:
    """One block in a file of its own; with any seed it takes the same bytes."""
    if uri.startswith("faulty:"):
        Path(uri.removeprefix("faulty://")).parent.mkdir(parents=True, exist_ok=True)
    draw = torch.Generator().manual_seed(seed)
    tensors = {
        "mlp.weight": torch.randn(10, VALUES // 10, generator=draw),
        "attn.weight": torch.randn(7, 3, generator=draw).bfloat16(),
        "odd": torch.randint(0, 100, (3,), dtype=torch.int8, generator=draw),
        "empty": torch.zeros(0, 4),
        "scalar": torch.randn((), generator=draw),
    }
    entries = [
        Entry(name, value.dtype, tuple(value.shape), lambda value=value: value)
        for name, value in tensors.items()
    ]
    return write_safetensors(uri, entries)[1]


def blocks_of(tmp_path: Path, count: int) -> list[Refs]:
    """Blocks in a store that counts what is read (see `faulty.py`)."""
    return [write_block(f"faulty://{tmp_path}/store/{number}", number) for number in range(count)]


def assert_same(got: dict[str, torch.Tensor], refs: Refs) -> None:
    assert_equal(got, read_tensors(refs))


def assert_equal(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert [
        name
        for name in got
        if got[name].dtype != expected[name].dtype or not torch.equal(got[name], expected[name])
    ] == []


def held(folder: Path) -> int:
    total = 0
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


@pytest.fixture(name="size")
def _size(tmp_path: Path) -> int:
    """Of the entry of a block of `write_block`."""
    folder = tmp_path / "measured"
    BlockCache(folder, None).tensors(*blocks_of(tmp_path, 1))
    return held(folder)


def entry(cache: BlockCache, refs: Refs) -> Path:
    """The file that keeps a block, or would."""
    return cache.folder / str(cache._name(module._remote(refs)))


def is_here(cache: BlockCache, refs: Refs) -> bool:
    """Whether a block is in the cache, found without using it."""
    return entry(cache, refs).exists()
