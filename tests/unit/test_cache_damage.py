"""The node's cache of blocks when its files are damaged, or the store or the disk fails."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cached_blocks import (  # noqa: F401 - fixtures
    _folder,
    _forget,
    _size,
    assert_same,
    blocks_of,
    entry,
    held,
    is_here,
)
from faults import full_disk
from faulty import failing
from mistakes import unprivileged

from fusegpt_ray.errors import StorageError
from fusegpt_ray.model import cache as module
from fusegpt_ray.model.cache import BlockCache

# --- damage ---


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


DAMAGE = {
    "truncated": lambda data: data[:-1],
    "grown": lambda data: data + b"x",
    "changed": lambda data: flipped(data, 100),
    "another checksum": lambda data: flipped(data, len(data) - 1),
    "emptied": lambda data: b"",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_entry_is_fetched_again(
    damage: Callable[[bytes], bytes],
    tmp_path: Path,
    folder: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Also one that no size and no time tells, after this process has read it whole."""
    (refs,) = blocks_of(tmp_path, 1)
    cache = BlockCache(folder, None)
    cache.tensors(refs)
    file = entry(cache, refs)
    whole, info = file.read_bytes(), file.stat()
    file.write_bytes(damage(whole))
    os.utime(file, ns=(info.st_atime_ns, info.st_mtime_ns))
    with caplog.at_level(logging.WARNING):
        assert_same(cache.tensors(refs), refs)
    assert caplog.text.count(f"{file} is damaged") == 1
    assert file.read_bytes() == whole
    assert len(os.listdir(folder)) == 1


def test_an_entry_or_the_folder_may_be_removed_at_any_time(tmp_path: Path, folder: Path) -> None:
    (refs,) = blocks_of(tmp_path, 1)
    cache = BlockCache(folder, None)
    cache.tensors(refs)
    for remove in (lambda: entry(cache, refs).unlink(), lambda: shutil.rmtree(folder)):
        remove()
        assert_same(cache.tensors(refs), refs)
        assert is_here(cache, refs)
    shutil.rmtree(folder)

    def during(name: str, begin: int, data: bytes) -> bytes:
        shutil.rmtree(folder, ignore_errors=True)
        return data

    with failing(during):
        cache.tensors(refs)
        assert not is_here(cache, refs)
    assert_same(cache.tensors(refs), refs)
    assert is_here(cache, refs)


def test_what_a_dead_process_left_goes(size: int, tmp_path: Path, folder: Path) -> None:
    a, b, c = blocks_of(tmp_path, 3)
    cache = BlockCache(folder, None)
    cache.tensors(a)
    for refs, limit in ((b, 2 * size), (c, None)):  # with no room to spare, and with plenty
        (folder / f"{'0' * 64}x1y2z3.part").write_bytes(bytes(3 * size))
        BlockCache(folder, limit).tensors(refs, cache.entries([a]))
    assert [is_here(cache, refs) for refs in (a, b, c)] == [True] * 3
    assert held(folder) == 3 * size


# --- the store's troubles, and the disk's ---


def test_the_stores_errors_are_the_stores(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = blocks_of(tmp_path, 2)
    cache = BlockCache(folder, None)

    def refused(name: str, begin: int, data: bytes) -> bytes:
        raise StorageError(name, "refused", "ask")

    def short(name: str, begin: int, data: bytes) -> bytes:
        return data[:-1]

    for fault, kind in ((refused, StorageError), (short, OSError)):
        with failing(fault), pytest.raises(kind):
            cache.tensors(a)
        assert os.listdir(folder) == []
    (tmp_path / "store/1").unlink()
    for refs, among in ((b, []), (a, [b])):
        with pytest.raises(FileNotFoundError):
            cache.tensors(refs, cache.entries(among))
    assert caplog.text == ""
    assert_same(cache.tensors(a), a)


def link(folder: Path) -> None:
    other = folder.with_name("elsewhere")
    other.mkdir(mode=0o700)
    folder.symlink_to(other)


def open_to_all(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)


def a_file(folder: Path) -> None:
    folder.write_bytes(b"")


@pytest.mark.parametrize("occupy", [link, open_to_all, a_file])
def test_a_folder_that_is_not_ours_alone_is_not_used(
    occupy: Callable,
    tmp_path: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    occupy(folder)
    cache = BlockCache(folder, None)
    for refs in blocks_of(tmp_path, 3):
        assert_same(cache.tensors(refs), refs)
    assert folder.is_file() or not os.listdir(folder)
    assert caplog.text.count("blocks are not kept") == 1
    monkeypatch.setenv("FUSEGPT_CACHE", str(folder))
    assert BlockCache.open() is None


def test_another_users_folder_is_not_used(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (refs,) = blocks_of(tmp_path, 1)
    cache = BlockCache(folder, None)
    cache.tensors(refs)
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    with failing() as asked:
        cache.tensors(refs)
    assert len(asked) == 1
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    (tmp_path / f"fusegpt-ray-{os.geteuid()}").mkdir()
    assert BlockCache.open() is None


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (refs,) = blocks_of(tmp_path, 1)
    (tmp_path / "closed").mkdir(mode=0o500)
    with unprivileged():
        assert_same(BlockCache(tmp_path / "closed/cache", None).tensors(refs), refs)
    assert not list((tmp_path / "closed").iterdir())


def test_a_full_disk_is_found_before_anything_is_fetched(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = blocks_of(tmp_path, 2)
    cache = BlockCache(folder, None)

    def unlocked(name: str, begin: int, data: bytes) -> bytes:
        directory = os.open(folder, os.O_RDONLY)
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody waits for what is not kept
        os.close(directory)
        assert os.listdir(folder) == []
        return data

    with failing(unlocked), full_disk(1000):
        for refs in (a, b):
            assert_same(cache.tensors(refs), refs)
    assert os.listdir(folder) == []
    assert len(caplog.records) == 1
    assert_same(cache.tensors(a), a)
    assert is_here(cache, a)


def test_a_disk_that_fails_when_written_or_read(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (refs,) = blocks_of(tmp_path, 1)
    cache = BlockCache(folder, None)

    def fails(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    for where, name in ((os, "replace"), (os, "utime"), (module, "_read")):
        with monkeypatch.context() as patch, failing() as asked:
            patch.setattr(where, name, fails)
            assert_same(cache.tensors(refs), refs)
        assert len(asked) == 2, "fetched in vain"  # and once to compare
        assert_same(cache.tensors(refs), refs)
        assert len(os.listdir(folder)) == 1
    assert len(caplog.records) == 1
