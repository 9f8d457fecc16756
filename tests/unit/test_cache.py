"""The node's cache of blocks: what it holds, what it asks of the store, how large it gets, and what may be wrong with a disk."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import multiprocessing
import os
import random
import shutil
import threading
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from faults import full_disk
from faulty import Faulty, failing
from mistakes import unprivileged
from safetensors.torch import load_file

from fusegpt_ray.errors import StorageError
from fusegpt_ray.model import cache as module
from fusegpt_ray.model.cache import BlockCache
from fusegpt_ray.model.stack import Refs
from fusegpt_ray.store import storage
from fusegpt_ray.store.checkpoint import Entry, read_tensors, write_safetensors
from fusegpt_ray.store.scratch import locked

VALUES = 1000
"""Of the largest tensor of a block."""


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """As in a new process."""
    module._SOUND.clear()
    module._SAID.clear()
    yield
    module._SOUND.clear()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
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
    entries = [Entry(name, value.dtype, tuple(value.shape), lambda value=value: value) for name, value in tensors.items()]
    return write_safetensors(uri, entries)[1]


def blocks_of(tmp_path: Path, count: int) -> list[Refs]:
    """Blocks in a store that counts what is read (see `faulty.py`)."""
    return [write_block(f"faulty://{tmp_path}/store/{number}", number) for number in range(count)]


def assert_same(got: dict[str, torch.Tensor], refs: Refs) -> None:
    assert_equal(got, read_tensors(refs))


def assert_equal(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(got) == list(expected)
    assert [name for name in got if got[name].dtype != expected[name].dtype or not torch.equal(got[name], expected[name])] == []


def held(folder: Path) -> int:
    total = 0
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


@pytest.fixture
def size(tmp_path: Path) -> int:
    """Of the entry of a block of `write_block`."""
    folder = tmp_path / "measured"
    BlockCache(folder, None).tensors(*blocks_of(tmp_path, 1))
    return held(folder)


def is_here(cache: BlockCache, refs: Refs) -> bool:
    """Whether a block is in the cache, found without using it."""
    key = cache._key(module._remote(refs))
    return key is not None and any(name.startswith(key) for name in os.listdir(cache.folder))


# --- what it holds ---


@pytest.mark.parametrize("where", ["memory://cached", "faulty://{tmp_path}/store"])
def test_the_same_tensors_and_no_second_reading(where: str, tmp_path: Path, folder: Path) -> None:
    refs = write_block(f"{where.format(tmp_path=tmp_path)}/block", 1)
    cache = BlockCache(folder, None)
    with failing() as asked:
        assert_same(cache.tensors(refs), refs)
        del asked[:]
        here = cache.local(refs)
        assert_same(cache.tensors(refs), here)
        assert_same(BlockCache(folder, None).tensors(refs), here)
        assert asked == []
    (file,) = {ref.file for ref in here.values()}
    assert Path(file).parent == folder
    assert hashlib.sha256(Path(file).read_bytes()).hexdigest() in file
    library = load_file(file)
    assert all(torch.equal(library[name], tensor) for name, tensor in read_tensors(refs).items())
    assert (folder.stat().st_mode & 0o777, Path(file).stat().st_mode & 0o777) == (0o700, 0o600)
    assert os.listdir(folder) == [Path(file).name], "locks or temporary files were left"


def test_local_files_stay_where_they_are(tmp_path: Path, folder: Path) -> None:
    near, far = write_block(str(tmp_path / "near"), 1), write_block(f"faulty://{tmp_path}/far", 2)
    cache = BlockCache(folder, None)
    assert cache.local(near) is near
    assert cache.local({}) == {}
    assert not folder.exists()
    mixed = {**near, "odd": far["odd"], "scalar": far["scalar"]}
    here = cache.local(mixed)
    assert {name for name, ref in here.items() if ref == near.get(name)} == near.keys() - {"odd", "scalar"}
    assert Path(here["odd"].file).parent == folder
    assert_same(cache.tensors(mixed), mixed)


def test_the_same_names_of_another_part_are_another_entry(tmp_path: Path, folder: Path) -> None:
    one, other = blocks_of(tmp_path, 2)
    cache = BlockCache(folder, None)
    for refs in (one, other, {"w": one["odd"]}, {"w": one["mlp.weight"]}, {"w": one["empty"]}, {"v": one["odd"]}):
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
        assert cache.local(refs) is refs
    assert os.listdir(folder) == []
    assert cache.local(refs) is not refs, "it was asked again what the file is"


def test_a_store_that_does_not_tell_when_files_change(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (refs,) = blocks_of(tmp_path, 1)

    def unknown(self: Faulty, path: str) -> None:
        raise NotImplementedError

    monkeypatch.setattr(Faulty, "modified", unknown)
    with failing() as asked:
        assert BlockCache(folder, None).local(refs) is refs
        assert asked == [], "a file was read to find out"
    monkeypatch.setattr(Faulty, "info", lambda self, path, **_: {"size": 1, "ETag": '"abc"'})
    assert BlockCache(folder, None).local(refs) is not refs


def test_each_file_is_asked_for_once(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = blocks_of(tmp_path, 3)
    BlockCache(folder, None).tensors(blocks[0])
    asked: list[str] = []
    tell = storage.version
    monkeypatch.setattr(storage, "version", lambda uri: (asked.append(uri), tell(uri))[1])
    cache = BlockCache(folder, None)
    for _ in range(3):
        cache.tensors(blocks[0], blocks)
    assert asked == [blocks[0]["odd"].file]


# --- how large it gets ---


def test_what_was_used_longest_ago_goes(size: int, tmp_path: Path, folder: Path) -> None:
    a, b, c, d = blocks_of(tmp_path, 4)
    cache = BlockCache(folder, 3 * size + 10)
    for refs in (a, b, c, a, d):
        cache.tensors(refs)
        assert held(folder) <= 3 * size
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
            cache.tensors(draw.choice(blocks), draw.sample(blocks, 3))
            sizes.append(held(folder))
    assert max(sizes) == 4 * size


def test_a_walk_that_does_not_fit_keeps_what_does(size: int, tmp_path: Path, folder: Path) -> None:
    """Evicting the least recently used block would make every reading of every walk a miss."""
    blocks = blocks_of(tmp_path, 6)
    expected = [read_tensors(refs) for refs in blocks]
    cache = BlockCache(folder, 4 * size)
    for walk in range(3):
        with failing() as asked:
            for refs, tensors in zip(blocks, expected, strict=True):
                assert_equal(cache.tensors(refs, blocks), tensors)
        assert {name for name, _ in asked} == (set("012345") if walk == 0 else {"4", "5"})
    other = write_block(f"faulty://{tmp_path}/store/other", 9)
    cache.tensors(other, [other])
    assert is_here(cache, other), "another walk may take their place"


def test_what_is_too_large_evicts_nothing(tmp_path: Path, folder: Path) -> None:
    small, large = blocks_of(tmp_path, 2)
    small = {"w": small["odd"]}
    cache = BlockCache(folder, 1000)
    cache.tensors(small)
    assert cache.local(large) is large
    assert is_here(cache, small)
    assert BlockCache(folder, 0).local(small) != small, "what is there is used, whatever the limit"


def test_half_of_the_disk_without_the_cache(size: int, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = blocks_of(tmp_path, 6)
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage(6 * size - held(folder)))
    cache = BlockCache(folder, None)
    for refs in blocks:
        cache.tensors(refs)
        assert held(folder) <= 3 * size
    assert held(folder) == 3 * size


def test_opening(size: int, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEGPT_CACHE", str(folder))
    assert BlockCache.open(0) is None
    assert not folder.exists()
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
    assert BlockCache.open() == BlockCache(tmp_path / f"tmp/fusegpt-ray-{os.geteuid()}/blocks", None)
    assert [path.stat().st_mode & 0o777 for path in (tmp_path / "tmp").rglob("*")] == [0o700, 0o700]


def test_what_is_not_ours_is_neither_counted_nor_removed(size: int, tmp_path: Path, folder: Path) -> None:
    folder.mkdir(mode=0o700)
    for name in ("model.safetensors", "download.part", "notes"):
        (folder / name).write_bytes(bytes(size))
    cache = BlockCache(folder, size)
    for refs in blocks_of(tmp_path, 3):
        cache.tensors(refs)
    assert len(os.listdir(folder)) == 4


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
def test_a_damaged_entry_is_fetched_again(damage: Callable, tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
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


def test_an_entry_or_the_folder_may_be_removed_at_any_time(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_what_a_dead_process_left_goes_and_what_a_live_one_has_stays(size: int, tmp_path: Path, folder: Path) -> None:
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


def test_the_stores_errors_are_the_stores(tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
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
    occupy: Callable, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    blocks = blocks_of(tmp_path, 3)
    occupy(folder)
    cache = BlockCache(folder, None)
    for refs in blocks:
        assert cache.local(refs) is refs
        assert_same(cache.tensors(refs), refs)
    assert caplog.text.count(str(folder)) == 2, "said more than once"  # the folder, and in the error
    monkeypatch.setenv("FUSEGPT_CACHE", str(folder))
    assert BlockCache.open() is None


def test_another_users_folder_is_not_used(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_full_disk_is_found_before_anything_is_fetched(tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
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


def test_a_disk_that_fails_when_written_or_read(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (refs,) = blocks_of(tmp_path, 1)
    cache = BlockCache(folder, None)

    def fails(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    for where, name in ((module.os, "replace"), (module.os, "utime"), (module.hashlib, "file_digest")):
        module._SOUND.clear()
        with monkeypatch.context() as patch:
            patch.setattr(where, name, fails)
            assert cache.local(refs) is refs
        assert cache.local(refs) is not refs


# --- many at once ---


def test_of_many_threads_one_fetches(tmp_path: Path, folder: Path) -> None:
    blocks = blocks_of(tmp_path, 3)
    cache, gate = BlockCache(folder, None), threading.Barrier(8)
    with failing() as asked, ThreadPoolExecutor(8) as pool:
        for refs in blocks:
            got = list(pool.map(lambda _, refs=refs: (gate.wait(), cache.tensors(refs))[1], range(8)))
            assert len(asked) == len(refs)
            assert all(torch.equal(one["mlp.weight"], got[0]["mlp.weight"]) for one in got)
            del asked[:]
    assert len(os.listdir(folder)) == 3


def test_many_threads_in_too_small_a_cache(size: int, tmp_path: Path, folder: Path) -> None:
    """Everyone evicts what others are about to read."""
    blocks, sizes, over = blocks_of(tmp_path, 6), [], threading.Event()
    expected = [read_tensors(refs) for refs in blocks]

    def read(seed: int) -> bool:
        draw = random.Random(seed)
        cache, chosen = BlockCache(folder, 2 * size), [draw.randrange(6) for _ in range(40)]
        return all(torch.equal(cache.tensors(blocks[i])["mlp.weight"], expected[i]["mlp.weight"]) for i in chosen)

    def watch() -> None:
        while not over.wait(0.001):
            with BlockCache(folder, None)._alone():
                sizes.append(held(folder))

    folder.mkdir(mode=0o700)
    with ThreadPoolExecutor(7) as pool:
        watching = pool.submit(watch)
        assert all(pool.map(read, range(6)))
        over.set()
        watching.result()
    assert max(sizes) <= 2 * size
    assert {path.suffix for path in folder.iterdir()} == {".safetensors"}


def test_killed_at_any_moment(size: int, tmp_path: Path, folder: Path) -> None:
    """Real processes, killed while they fetch, write, rename and evict."""
    blocks, draw = blocks_of(tmp_path, 6), random.Random(0)
    expected = [read_tensors(refs) for refs in blocks]

    def slow(name: str, begin: int, data: bytes) -> bytes:
        time.sleep(0.0005)
        return data

    def read(limit: int) -> None:
        cache = BlockCache(folder, limit)
        while True:
            for refs in blocks:
                cache.tensors(refs)

    left = 0
    with failing(slow):
        for _ in range(40):
            limit = draw.choice([3, 6]) * size
            readers = [multiprocessing.get_context("fork").Process(target=read, args=[limit]) for _ in range(2)]
            for reader in readers:
                reader.start()
            while not folder.exists() or not os.listdir(folder):
                time.sleep(0.001)
            time.sleep(draw.uniform(0, 0.04))
            for reader in readers:
                reader.kill()
                reader.join()
            left += any(path.suffix == ".part" for path in folder.glob("*"))
            cache = BlockCache(folder, limit)
            for refs, tensors in zip(blocks, expected, strict=True):
                assert_equal(cache.tensors(refs), tensors)
            assert cache._make_room(0)
            assert {path.suffix for path in folder.iterdir()} == {".safetensors"}
            assert all(hashlib.sha256(path.read_bytes()).hexdigest() == path.stem[65:] for path in folder.iterdir())
            shutil.rmtree(folder)
    assert left > 5, "hardly any was killed in the middle"
