"""Many threads and processes in one cache of blocks."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from cached_blocks import _folder, _forget, _size, assert_equal, blocks_of, held  # noqa: F401 - fixtures
from faulty import failing

from fusegpt_ray.model.cache import BlockCache
from fusegpt_ray.store.checkpoint import read_tensors
from fusegpt_ray.store.scratch import locked


def test_of_many_threads_one_fetches(tmp_path: Path, folder: Path) -> None:
    blocks = blocks_of(tmp_path, 3)
    cache, gate = BlockCache(folder, None), threading.Barrier(8)
    with failing() as asked, ThreadPoolExecutor(8) as pool:
        for refs in blocks:
            got = list(
                pool.map(lambda _, refs=refs: (gate.wait(), cache.tensors(refs))[1], range(8))
            )
            assert len(asked) == 1
            assert all(torch.equal(one["mlp.weight"], got[0]["mlp.weight"]) for one in got)
            del asked[:]
    assert len(os.listdir(folder)) == 3


def test_many_threads_in_too_small_a_cache(size: int, tmp_path: Path, folder: Path) -> None:
    """Everyone evicts what others are about to read."""
    blocks, sizes, over = blocks_of(tmp_path, 6), [], threading.Event()
    expected = [read_tensors(refs) for refs in blocks]

    def read(seed: int) -> None:
        draw = random.Random(seed)
        cache = BlockCache(folder, 2 * size)
        for number in [draw.randrange(6) for _ in range(20)]:
            assert_equal(cache.tensors(blocks[number]), expected[number])

    def watch() -> None:
        while not over.wait(0.001):
            with locked(folder):
                sizes.append(held(folder))

    folder.mkdir(mode=0o700)
    with ThreadPoolExecutor(7) as pool:
        watching = pool.submit(watch)
        try:
            list(pool.map(read, range(6)))
        finally:
            over.set()
        watching.result()
    assert max(sizes) <= 2 * size
    assert {path.suffix for path in folder.iterdir()} == {".block"}


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
        for _ in range(20):
            limit = draw.choice([3, 6]) * size
            readers = [
                multiprocessing.get_context("fork").Process(target=read, args=[limit])
                for _ in range(2)
            ]
            for reader in readers:
                reader.start()
            while not folder.exists() or not os.listdir(folder):
                time.sleep(0.001)
            time.sleep(draw.uniform(0, 0.04))
            for reader in readers:
                reader.kill()
                reader.join()
            left += any(path.suffix == ".part" for path in folder.iterdir())
            cache = BlockCache(folder, limit)
            for _ in range(2):  # fetched, and read from what the killed ones left
                for refs, tensors in zip(blocks, expected, strict=True):
                    assert_equal(cache.tensors(refs), tensors)
            assert {path.suffix for path in folder.iterdir()} == {".block"}
            assert held(folder) <= limit
            shutil.rmtree(folder)
    assert left > 3, "hardly any was killed in the middle"
