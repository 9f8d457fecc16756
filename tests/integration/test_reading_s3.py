"""Tensors of object storage are read in ranges, several at a time; only a range that fails is read
again.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from faults import FOREVER, Exchange, Fault, Proxy, answers, reset, reset_halfway, truncated
from s3fs import S3FileSystem
from safetensors.torch import load

from fusegpt_ray.model.staging import Staging
from fusegpt_ray.store import ranges
from fusegpt_ray.store.checkpoint import TensorRef, read_tensors
from fusegpt_ray.store.ranges import EndedEarly
from fusegpt_ray.store.writer import Entry, write_safetensors

pytestmark = pytest.mark.integration

PIECE = 200_000
SHAPES = {"small": (3,), "large": (700, 500), "empty": (0, 3), "odd": (77_777,), "last": (9, 99)}
KEY = "model.safetensors"


class Watched(Proxy):
    """Passes on what is asked of the server, and counts the ranges."""

    def __post_init__(self) -> None:
        self.asked: Counter[str] = Counter()
        super().__post_init__()

    def watch(self, happens: Callable[[Exchange], None], times: int = FOREVER) -> None:
        """From now on count, and let this happen to the first so many requests for ranges."""
        self.asked.clear()
        left = threading.Semaphore(times) if times < FOREVER else None

        def counted(exchange: Exchange) -> None:
            with self.lock:
                self.asked[exchange.headers["Range"]] += 1
            if left is None or left.acquire(blocking=False):
                happens(exchange)
            else:
                exchange.pass_on()

        self.inject(Fault(counted, "GET", KEY, times=FOREVER))


@pytest.fixture
def proxy(s3, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    proxy = Watched(int(s3.client.meta.endpoint_url.rsplit(":", 1)[1]))
    monkeypatch.setattr(ranges, "PIECE", PIECE)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    S3FileSystem.clear_instance_cache()
    yield proxy
    proxy.stop()
    S3FileSystem.clear_instance_cache()


@pytest.fixture
def refs(s3, bucket: str, proxy: Watched) -> dict[str, TensorRef]:
    entries = [
        Entry(name, torch.float32, shape, partial(torch.randn, shape))
        for name, shape in SHAPES.items()
    ]
    return write_safetensors(f"s3://{bucket}/{KEY}", entries)[1]


def assert_right(found: dict[str, torch.Tensor], data: bytes) -> None:
    expected = load(data)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def in_pieces(refs: dict[str, TensorRef]) -> set[str]:
    """The header `Range` of each request that all of these neighbours take."""
    begin, end = min(ref.begin for ref in refs.values()), max(ref.end for ref in refs.values())
    return {f"bytes={at}-{min(at + PIECE, end) - 1}" for at in range(begin, end, PIECE)}


def test_each_range_once_and_several_at_a_time(s3, bucket: str, refs, proxy: Watched) -> None:
    together = threading.Barrier(4, timeout=30)

    def waits(exchange: Exchange) -> None:
        together.wait()  # breaks, unless four requests are on their way at the same time
        exchange.pass_on()

    data = s3.objects(bucket)[KEY]
    proxy.watch(waits, times=8)
    assert_right(read_tensors(refs), data)
    assert not together.broken
    assert proxy.asked == dict.fromkeys(in_pieces(refs), 1)
    assert len(proxy.asked) == 9
    proxy.watch(Exchange.pass_on)
    assert_right(Staging(torch.device("cpu"), torch.float32, 3 * PIECE).read(refs), data)
    assert proxy.asked == dict.fromkeys(in_pieces(refs), 1)


@pytest.mark.parametrize(
    "happens",
    [answers(503, "SlowDown"), reset, reset_halfway, truncated],
    ids=["503", "reset", "reset-halfway", "truncated"],
)
def test_only_what_failed_is_read_again(
    happens: Callable[[Exchange], None], s3, bucket: str, refs, proxy: Watched
) -> None:
    data = s3.objects(bucket)[KEY]
    proxy.watch(happens, times=3)
    assert_right(read_tensors(refs), data)
    assert proxy.asked.keys() == in_pieces(refs)
    assert proxy.asked.total() == len(in_pieces(refs)) + 3


def test_an_object_that_has_shrunk(s3, bucket: str, refs, proxy: Watched) -> None:
    data = s3.objects(bucket)[KEY]
    s3.client.put_object(Bucket=bucket, Key=KEY, Body=data[:-1])
    with pytest.raises(EndedEarly, match="ended early"):
        read_tensors(refs)
