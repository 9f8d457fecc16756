"""Walks that read every block of a model from object storage, with and without the node's cache:
one process after another.

    python benchmarks/cache.py [--blocks 6] [--hidden 2048] [--intermediate 5632] [--megabytes 100]
    [--walks 3] [--json out.json]

Random LLaMA blocks in bfloat16 lie in an S3 server of this machine (moto, from the `test` extra),
behind a proxy that passes `--megabytes` a second in all. Only the reading of weights is timed, into
tensors on the CPU, as `Runner.load` does it:

- **store**: every walk from the server;
- **fill**: the first walk with an empty cache: fetch and write;
- **walk**: the later walks, of this process or another; every entry's checksum is computed.

The page cache holds what was just written: the walks are those of a node whose memory is larger
than the model. Else its disk's own time comes on top.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import torch

from fusegpt_ray.model.cache import BlockCache
from fusegpt_ray.model.stack import Refs
from fusegpt_ray.store.checkpoint import read_tensors
from fusegpt_ray.store.writer import Entry, write_safetensors


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=5632)
    parser.add_argument("--megabytes", type=float, default=100, help="a second, from the store")
    parser.add_argument("--walks", type=int, default=3)
    parser.add_argument("--json", help="write all numbers to this file")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder, _store(arguments.megabytes * 1e6):
        blocks = [
            _block(f"s3://models/{number}.safetensors", arguments)
            for number in range(arguments.blocks)
        ]
        size = sum(ref.end - ref.begin for refs in blocks for ref in refs.values())
        cache = BlockCache(Path(folder) / "cache", None)
        seconds: dict[str, list[float]] = {
            "store": [_walk(read_tensors, blocks) for _ in range(arguments.walks)]
        }
        seconds["fill"] = [_walk(cache.tensors, blocks)]
        seconds["walk"] = [_walk(cache.tensors, blocks) for _ in range(arguments.walks)]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(
        f"{arguments.blocks} blocks, {size / 1e6:.0f} MB in all, {arguments.megabytes:g} MB/s from"
        " the store\n"
    )
    print("| walk | seconds | MB/s | store ÷ |")
    print("|---|---|---|---|")
    for name, value in medians.items():
        print(
            f"| {name} | {value:.2f} | {size / 1e6 / value:.0f} | {medians['store'] / value:.1f} |"
        )
    if arguments.json:
        result = {
            "arguments": vars(arguments),
            "bytes": size,
            "seconds": seconds,
            "threads": torch.get_num_threads(),
        }
        Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _walk(read: Callable[[Refs], dict[str, torch.Tensor]], blocks: list[Refs]) -> float:
    begin = time.perf_counter()
    for refs in blocks:
        read(refs)
    return time.perf_counter() - begin


def _block(uri: str, arguments: argparse.Namespace) -> Refs:
    d, f = arguments.hidden, arguments.intermediate
    shapes = {f"self_attn.{name}_proj.weight": (d, d) for name in "qkvo"}
    shapes |= {
        "mlp.gate_proj.weight": (f, d),
        "mlp.up_proj.weight": (f, d),
        "mlp.down_proj.weight": (d, f),
    }
    entries = [
        Entry(name, torch.bfloat16, shape, partial(torch.randn, shape))
        for name, shape in shapes.items()
    ]
    return write_safetensors(uri, entries)[1]


@contextmanager
def _store(rate: float) -> Iterator[None]:
    """An S3 server with one bucket, `models`, behind a proxy that passes `rate` bytes of
    answers a second.
    """
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    faults = importlib.import_module("faults")
    turn = threading.Lock()

    def throttled(exchange: Any) -> None:
        response, data = exchange.upstream()
        with turn:
            time.sleep(len(data) / rate)
        exchange.send(response, data)

    os.environ |= {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", "0"], stderr=subprocess.PIPE, text=True
    )
    assert server.stderr
    try:
        port = next(int(line.rsplit(":", 1)[1]) for line in server.stderr if "Running on" in line)
        threading.Thread(target=server.stderr.read, daemon=True).start()
        proxy = faults.Proxy(
            port, [faults.Fault(throttled, "GET", r"\.safetensors", times=faults.FOREVER)]
        )
        os.environ["AWS_ENDPOINT_URL"] = proxy.url
        fsspec.filesystem("s3").mkdir("models")
        yield
        proxy.stop()
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    sys.exit(main())
