"""The node's cache of blocks: what it holds, what it asks of the store, and how large it gets."""

from __future__ import annotations

import os
import random
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from cached_blocks import (  # noqa: F401 - fixtures
    _folder,
    _forget,
    _size,
    assert_equal,
    assert_same,
    blocks_of,
    entry,
    held,
    is_here,
    write_block,
)
from faulty import Faulty, failing

from fusegpt_ray.model import cache as module
from fusegpt_ray.model.cache import BlockCache
from fusegpt_ray.store.checkpoint import read_tensors

# --- what it holds ---


def test_the_same_tensors_and_no_second_reading(tmp_path: Path, folder: Path) -> None:
    refs = write_block(f"faulty://{tmp_path}/store/block", 1)
    expected, cache = read_tensors(refs), BlockCache(folder, None)
    with failing() as asked:
        assert_equal(cache.tensors(refs), expected)
        assert len(asked) == 1, "neighbours are read at once"
        assert_equal(cache.tensors(refs), expected)
        assert_equal(BlockCache(folder, None).tensors(refs), expected)
        assert len(asked) == 1
    assert os.listdir(folder) == [entry(cache, refs).name], "temporary files were left"
    modes = folder.stat().st_mode & 0o777, entry(cache, refs).stat().st_mode & 0o777
    assert modes == (0o700, 0o600)


def test_local_files_stay_where_they_are(tmp_path: Path, folder: Path) -> None:
    near, far = write_block(str(tmp_path / "near"), 1), write_block(f"faulty://{tmp_path}/far", 2)
    cache = BlockCache(folder, None)
    assert_same(cache.tensors(near), near)
    assert cache.tensors({}) == {}
    assert not folder.exists()
    mixed = {**near, "odd": far["odd"], "scalar": far["scalar"]}
    for _ in range(2):
        assert_same(cache.tensors(mixed), mixed)
    assert held(folder) < 100


def test_the_same_names_of_another_part_are_another_entry(tmp_path: Path, folder: Path) -> None:
    one, other = blocks_of(tmp_path, 2)
    parts = [{"w": one[name]} for name in ("odd", "mlp.weight", "empty")]
    cache = BlockCache(folder, None)
    for refs in (one, other, *parts, {"v": one["odd"]}):
        assert_same(cache.tensors(refs), refs)
    assert len(os.listdir(folder)) == 6


def test_a_file_written_anew_is_another_entry(tmp_path: Path, folder: Path) -> None:
    for uri in ("memory://anew/block", f"faulty://{tmp_path}/block"):
        refs = write_block(uri, 1)
        before = BlockCache(folder, None).tensors(refs)
        assert write_block(uri, 2) == refs, "the same bytes of the same file"
        after = BlockCache(folder, None).tensors(refs)
        assert not torch.equal(before["mlp.weight"], after["mlp.weight"])
        assert_same(after, refs)


def test_a_file_that_changes_while_it_is_read_is_not_kept(tmp_path: Path, folder: Path) -> None:
    (refs,) = blocks_of(tmp_path, 1)
    file, times = tmp_path / "store/0", []

    def changing(name: str, begin: int, data: bytes) -> bytes:
        if not times:
            times.append(os.utime(file, ns=(1, 1)))
        return data

    cache = BlockCache(folder, None)
    with failing(changing):
        cache.tensors(refs)
    assert os.listdir(folder) == []
    cache.tensors(refs)
    assert is_here(cache, refs), "it was not asked again what the file is"


def test_a_store_that_does_not_tell_when_files_change(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (refs,) = blocks_of(tmp_path, 1)

    def unknown(self: Faulty, path: str) -> None:
        raise NotImplementedError

    monkeypatch.setattr(Faulty, "modified", unknown)
    with failing() as asked:
        BlockCache(folder, None).tensors(refs)
        assert len(asked) == 1, "a file was read to find out"
    assert not folder.exists()
    monkeypatch.setattr(Faulty, "info", lambda self, path, **_: {"size": 1, "ETag": '"abc"'})
    BlockCache(folder, None).tensors(refs)
    assert len(os.listdir(folder)) == 1


# --- how large it gets ---


def test_what_was_used_longest_ago_goes(size: int, tmp_path: Path, folder: Path) -> None:
    a, b, c, d = blocks_of(tmp_path, 4)
    cache = BlockCache(folder, 3 * size + 10)
    for refs in (a, b, c, a, d):
        cache.tensors(refs)
    assert [is_here(cache, refs) for refs in (a, b, c, d)] == [True, False, True, True]
    cache.tensors(b)
    assert [is_here(cache, refs) for refs in (a, b, c, d)] == [True, True, False, True]


def test_it_never_grows_beyond_its_limit(size: int, tmp_path: Path, folder: Path) -> None:
    blocks, draw = blocks_of(tmp_path, 8), random.Random(0)
    cache = BlockCache(folder, 4 * size)
    sizes = []

    def measured(name: str, begin: int, data: bytes) -> bytes:  # while a block is fetched, too
        sizes.append(held(folder))
        return data

    with failing(measured):
        for _ in range(60):
            cache.tensors(draw.choice(blocks), cache.entries(draw.sample(blocks, 3)))
            sizes.append(held(folder))
    assert max(sizes) == 4 * size


def test_a_walk_that_does_not_fit_keeps_what_does(size: int, tmp_path: Path, folder: Path) -> None:
    """Evicting the least recently used block would make every reading of every walk a miss."""
    blocks = blocks_of(tmp_path, 6)
    expected = [read_tensors(refs) for refs in blocks]
    cache = BlockCache(folder, 4 * size)
    for walk in range(3):
        with failing() as asked:
            needed = cache.entries(blocks)
            for refs, tensors in zip(blocks, expected, strict=True):
                assert_equal(cache.tensors(refs, needed), tensors)
        assert {name for name, _ in asked} == (set("012345") if walk == 0 else {"4", "5"})
    other = write_block(f"faulty://{tmp_path}/store/other", 9)
    cache.tensors(other, cache.entries([other]))
    assert is_here(cache, other), "another walk may take their place"


def test_what_is_too_large_evicts_nothing(tmp_path: Path, folder: Path) -> None:
    small, large = blocks_of(tmp_path, 2)
    small = {"w": small["odd"]}
    cache = BlockCache(folder, 1000)
    cache.tensors(small)
    assert_same(cache.tensors(large), large)
    assert is_here(cache, small) and not is_here(cache, large)
    with failing() as asked:
        BlockCache(folder, 0).tensors(small)
    assert asked == [], "what is there is used, whatever the limit"


def test_half_of_the_disk_without_the_cache(
    size: int, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage(6 * size - held(folder)))
    cache = BlockCache(folder, None)
    for refs in blocks_of(tmp_path, 6):
        cache.tensors(refs)
        assert held(folder) <= 3 * size
    assert held(folder) == 3 * size


def test_opening(size: int, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, folder = folder, folder / f"fusegpt-ray-{os.geteuid()}/blocks"
    monkeypatch.setenv("FUSEGPT_CACHE", str(place))
    assert BlockCache.open(0) is None
    assert not place.exists()
    cache = BlockCache.open()
    assert cache == BlockCache(folder, None)
    a, b = blocks_of(tmp_path, 2)
    cache.tensors(a)
    cache.tensors(b)
    assert BlockCache.open(1.5 * size / 1e9) == BlockCache(folder, int(1.5 * size))
    assert [is_here(cache, refs) for refs in (a, b)] == [False, True], "a lower limit holds at once"
    monkeypatch.delenv("FUSEGPT_CACHE")
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir(mode=0o777)
    assert BlockCache.open() == BlockCache(
        tmp_path / f"tmp/fusegpt-ray-{os.geteuid()}/blocks", None
    )
    assert [path.stat().st_mode & 0o777 for path in (tmp_path / "tmp").rglob("*")] == [0o700, 0o700]


def test_what_is_not_ours_is_neither_counted_nor_removed(
    size: int, tmp_path: Path, folder: Path
) -> None:
    folder.mkdir(mode=0o700)
    for name in ("model.safetensors", "download.part", "notes"):
        (folder / name).write_bytes(bytes(size))
    older = folder / f"{'0' * 64}-{'1' * 64}.safetensors"
    older.write_bytes(bytes(size))
    cache = BlockCache(folder, size)
    for refs in blocks_of(tmp_path, 3):
        cache.tensors(refs)
    assert len(os.listdir(folder)) == 4
    assert not older.exists(), "an entry of an older version takes space for ever"
