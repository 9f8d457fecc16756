"""The node's cache of blocks when its files are damaged, or the store or the disk fails."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cached_blocks import _folder, _forget, _size, assert_same, blocks_of, held, is_here  # noqa: F401 - fixtures
from faults import full_disk
from faulty import failing
from mistakes import unprivileged

from fusegpt_ray.errors import StorageError
from fusegpt_ray.model import cache as module
from fusegpt_ray.model.cache import BlockCache
from fusegpt_ray.model.stack import Refs
from fusegpt_ray.store.scratch import locked

# --- damage ---


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def grow(file: Path) -> None:
    with file.open("ab") as out:
        out.write(b"x")


def flip(file: Path, place: int = -1) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def flip_silently(file: Path) -> None:
    info = file.stat()
    flip(file)
    os.utime(file, ns=(info.st_atime_ns, info.st_mtime_ns))
    module._SOUND.clear()  # by then another process reads it


def flip_the_header(file: Path) -> None:
    flip(file, 0)


def empty(file: Path) -> None:
    file.write_bytes(b"")


DAMAGE = [truncate, grow, flip, flip_silently, flip_the_header, empty]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_fetched_again(
    damage: Callable, tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (refs,) = blocks_of(tmp_path, 1)
    cache = BlockCache(folder, None)
    (file,) = {ref.file for ref in cache.local(refs).values()}
    whole = Path(file).read_bytes()
    damage(Path(file))
    with caplog.at_level(logging.WARNING):
        assert_same(cache.tensors(refs), refs)
    assert file in caplog.text
    assert Path(file).read_bytes() == whole
    assert len(os.listdir(folder)) == 1


def test_an_entry_or_the_folder_may_be_removed_at_any_time(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (refs,) = blocks_of(tmp_path, 1)
    cache = BlockCache(folder, None)
    cache.tensors(refs)
    shutil.rmtree(folder)
    assert_same(cache.tensors(refs), refs)
    assert is_here(cache, refs)

    def gone(self: BlockCache, refs: Refs, among: object = ()) -> Refs:
        here = local(self, refs)
        shutil.rmtree(folder)
        return here

    local = BlockCache.local
    with monkeypatch.context() as patch:
        patch.setattr(BlockCache, "local", gone)
        assert_same(cache.tensors(refs), refs)

    def during(name: str, begin: int, data: bytes) -> bytes:
        shutil.rmtree(folder, ignore_errors=True)
        return data

    with failing(during):
        assert cache.local(refs) is refs
    assert cache.local(refs) is not refs


def test_what_a_dead_process_left_goes_and_what_a_live_one_has_stays(
    size: int, tmp_path: Path, folder: Path
) -> None:
    a, b, c = blocks_of(tmp_path, 3)
    cache = BlockCache(folder, 2 * size)
    cache.tensors(a)
    (folder / f"{'0' * 64}.part").write_bytes(bytes(size))
    own = folder / f"{cache._key(module._remote(b))}.part"
    own.write_bytes(bytes(3 * size))
    cache.tensors(b, [a])
    assert is_here(cache, a) and is_here(cache, b)
    assert {path.suffix for path in folder.iterdir()} == {".safetensors"}
    live = folder / f"{'1' * 64}.part"
    with live.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(size)
        cache.tensors(c)
        assert live.exists()
        assert held(folder) == 2 * size
    cache.tensors(a)
    assert not live.exists()


def test_what_others_wait_with_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "x.part"
    with locked(path):
        path.rename(tmp_path / "x")
        path.write_bytes(b"the next one's")
    assert path.read_bytes() == b"the next one's"
    with locked(path) as file:
        assert file.read() == b"the next one's"
    assert sorted(os.listdir(tmp_path)) == ["x"]


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
    with pytest.raises(FileNotFoundError):
        cache.tensors(b)
    with pytest.raises(FileNotFoundError):
        cache.tensors(a, [b])
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
    blocks = blocks_of(tmp_path, 3)
    occupy(folder)
    cache = BlockCache(folder, None)
    for refs in blocks:
        assert cache.local(refs) is refs
        assert_same(cache.tensors(refs), refs)
    assert caplog.text.count(str(folder)) == 2, (
        "said more than once"
    )  # the folder, and in the error
    monkeypatch.setenv("FUSEGPT_CACHE", str(folder))
    assert BlockCache.open() is None


def test_another_users_folder_is_not_used(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (refs,) = blocks_of(tmp_path, 1)
    cache = BlockCache(folder, None)
    cache.tensors(refs)
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    assert cache.local(refs) is refs
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    (tmp_path / f"fusegpt-ray-{os.geteuid()}").mkdir()
    assert BlockCache.open() is None


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (refs,) = blocks_of(tmp_path, 1)
    (tmp_path / "closed").mkdir(mode=0o500)
    with unprivileged():
        assert BlockCache(tmp_path / "closed/cache", None).local(refs) is refs
    assert not list((tmp_path / "closed").iterdir())


def test_a_full_disk_is_found_before_anything_is_fetched(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = blocks_of(tmp_path, 2)
    cache = BlockCache(folder, None)
    with failing() as asked, full_disk(1000):
        assert cache.local(a) is a
        assert asked == []
        assert_same(cache.tensors(b), b)
    assert os.listdir(folder) == []
    assert len(caplog.records) == 1
    assert_same(cache.tensors(a), a)
    assert is_here(cache, a)


def test_a_disk_that_fails_when_written_or_read(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (refs,) = blocks_of(tmp_path, 1)
    cache = BlockCache(folder, None)

    def fails(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    for where, name in (
        (module.os, "replace"),
        (module.os, "utime"),
        (module.hashlib, "file_digest"),
    ):
        module._SOUND.clear()
        with monkeypatch.context() as patch:
            patch.setattr(where, name, fails)
            assert cache.local(refs) is refs
        assert cache.local(refs) is not refs
