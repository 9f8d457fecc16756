"""The node's cache of blocks between processes, in front of a real S3 server: who fetches, who
waits, and who is killed.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from faults import FOREVER, Fault, Proxy, stalled

from fusegpt_ray.model.cache import BlockCache
from fusegpt_ray.model.stack import Refs
from fusegpt_ray.store.checkpoint import read_tensors
from fusegpt_ray.store.writer import Entry, write_safetensors

pytestmark = pytest.mark.integration

BLOCKS = 4
FORKED = multiprocessing.get_context("fork")


@pytest.fixture
def blocks(bucket: str) -> list[Refs]:
    """Blocks of three tensors, each in an object of its own."""
    made = []
    for number in range(BLOCKS):
        tensors = {name: torch.randn(300, 500) for name in ("q", "k", "v")}
        entries = [
            Entry(name, value.dtype, tuple(value.shape), lambda value=value: value)
            for name, value in tensors.items()
        ]
        made.append(write_safetensors(f"s3://{bucket}/{number}.safetensors", entries)[1])
    return made


def digest_of(refs: Refs, cache: BlockCache) -> str:
    tensors = cache.tensors(refs)
    return hashlib.sha256(
        b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))
    ).hexdigest()


class Reader:
    """A process that reads blocks through the cache, once it may begin, and says of each what it
    read.

    With a share to `write` it hangs where so much of the first block's file is written, and says
    so.
    """

    def __init__(self, folder: Path, blocks: list[Refs], write: float | None) -> None:
        self.ours, theirs = FORKED.Pipe()
        self.process = FORKED.Process(target=_read, args=[folder, blocks, write, theirs])
        self.process.start()

    def begin(self) -> None:
        self.ours.send("begin")

    def says(self) -> str:
        assert self.ours.poll(60)
        return self.ours.recv()


def _read(folder: Path, blocks: list[Refs], write: float | None, pipe: Connection) -> None:
    def hang(self: BlockCache, path: Path, part: BinaryIO, data: list[memoryview]) -> None:
        whole = b"".join(data)
        part.write(whole[: int(len(whole) * write)])
        part.flush()
        pipe.send("hanging")
        time.sleep(1000)

    if write is not None:
        BlockCache._keep = hang
    cache = BlockCache(folder, None)
    pipe.recv()
    for refs in blocks:
        pipe.send(digest_of(refs, cache))


@contextmanager
def started(
    count: int, folder: Path, blocks: list[Refs], write: float | None = None
) -> Iterator[list[Reader]]:
    """So many processes, that are yet to begin."""
    readers = [Reader(folder, blocks, write) for _ in range(count)]
    try:
        yield readers
    finally:
        for reader in readers:
            reader.process.kill()
            reader.process.join()


def digests(blocks: list[Refs], folder: Path) -> list[str]:
    """What a reader must say of each block: found without the cache, which a limit of 0 keeps
    empty.
    """
    return [digest_of(refs, BlockCache(folder, 0)) for refs in blocks]


def test_four_processes_ask_the_store_for_what_one_asks(
    s3, blocks: list[Refs], tmp_path: Path
) -> None:
    expected = digests(blocks, tmp_path / "none")
    before = len(s3.requests())
    for refs in blocks:
        read_tensors(refs)
    alone = Counter(path for method, path in s3.requests()[before:] if method == "GET")
    assert len(alone) == BLOCKS
    before = len(s3.requests())
    folder = tmp_path / "cache"
    with started(4, folder, blocks) as readers:
        for reader in readers:
            reader.begin()
        for reader in readers:
            assert [reader.says() for _ in blocks] == expected
    requests = s3.requests()[before:]
    assert Counter(path for method, path in requests if method == "GET") == alone
    assert len(requests) - alone.total() <= 5 * BLOCKS, (
        "more than a HEAD for each process, and one for who fetched"
    )
    assert len(list(folder.iterdir())) == BLOCKS


def test_who_waits_for_a_killed_process_goes_on(
    s3, blocks: list[Refs], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = digests(blocks, tmp_path / "none")
    folder = tmp_path / "cache"
    proxy = Proxy(int(s3.client.meta.endpoint_url.rsplit(":", 1)[1]))
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    fault = Fault(stalled, "GET", "/1.safetensors", times=FOREVER)
    proxy.inject(fault)
    try:
        with started(2, folder, blocks) as (victim, other):
            victim.begin()
            assert victim.says() == expected[0]
            wait_for(lambda: fault.hit == 3)
            other.begin()
            assert other.says() == expected[0]
            time.sleep(1)
            # 3 tensors, which the victim may ask for again if this machine is slow.
            assert fault.seen < 9, "nobody waited"
            victim.process.kill()
            proxy.inject()
            assert [other.says() for _ in blocks[1:]] == expected[1:]
    finally:
        proxy.stop()
    assert [path.suffix for path in folder.iterdir()] == [".block"] * BLOCKS


def test_a_file_half_written_by_a_killed_process_is_never_read(
    blocks: list[Refs], tmp_path: Path
) -> None:
    expected = digests(blocks, tmp_path / "none")
    folder = tmp_path / "cache"
    for number, written in enumerate([0.5, 1]):
        with started(1, folder, blocks[number:], written) as (victim,):
            victim.begin()
            assert victim.says() == "hanging"
            victim.process.kill()
        assert ".part" in {path.suffix for path in folder.iterdir()}
        assert digest_of(blocks[number], BlockCache(folder, None)) == expected[number]
        assert [path.suffix for path in folder.iterdir()] == [".block"] * (number + 1)
    assert [digest_of(refs, BlockCache(folder, None)) for refs in blocks] == expected


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
