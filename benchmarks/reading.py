"""How fast weights come from files: plain reading, the safetensors library and this package.

    python benchmarks/reading.py [--blocks 5] [--hidden 4096] [--intermediate 11008] [--repeats 7]
    [--cold] [--folder DIR] [--json out.json]

A checkpoint of random bfloat16 LLaMA blocks is written in shards of half a gigabyte (2 GB in all)
and read in turn, a shard or a block at a time, each let go before the next one:

- **readinto, one buffer**: the shards, by a plain loop into memory that was used before;
- **readinto, new memory**: the same, into new memory for each shard;
- **safetensors**: `load_file` of the shards, and a copy of each tensor: what it gives is the mapped
  file, of which nothing has been read yet;
- **read_tensors**: what this package does for a block on a CPU;
- on a GPU **streamed**: what it does for a block there, and **memcpy**: as many bytes, copied from
  pinned memory that holds them already.

The files are in the page cache; with `--cold` they are dropped from it before each reading.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from fusegpt_ray.store.checkpoint import TensorRef, read_tensors
from fusegpt_ray.store.writer import Entry, plan_shards, write_safetensors

PIECE = 1 << 24
"""Bytes of one call of the plain loop."""
SHARD = 500_000_000

Refs = dict[str, TensorRef]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--cold", action="store_true", help="from the disk, not the page cache")
    parser.add_argument("--folder", help="write the checkpoint below it, not where temporary is")
    parser.add_argument("--json", help="write all numbers to this file")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        blocks, files = _checkpoint(Path(folder), arguments)
        size = sum(ref.end - ref.begin for refs in blocks for ref in refs.values())
        ways = _ways(blocks, files)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(-1, arguments.repeats):  # the first turn is not counted
            for name, way in ways.items():
                if arguments.cold:
                    _drop(files)
                begin = time.perf_counter()
                way()
                if turn >= 0:
                    seconds[name].append(time.perf_counter() - begin)
    print(f"{size / 1e9:.2f} GB in {len(files)} files, {arguments.repeats} turns\n")
    print("| way | GB/s | ÷ readinto, one buffer | ÷ readinto, new memory |\n|---|---|---|---|")
    for name, values in seconds.items():
        rate = size / 1e9 / statistics.median(values)
        ratios = [_ratio(seconds[plain], values) for plain in list(seconds)[:2]]
        print(f"| {name} | {rate:.2f} | {ratios[0]:.2f} | {ratios[1]:.2f} |")
    if arguments.json:
        result = {"arguments": vars(arguments), "bytes": size, "seconds": seconds}
        Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _ratio(plain: list[float], values: list[float]) -> float:
    """How many times as fast, in the median of the turns."""
    return statistics.median(one / other for one, other in zip(plain, values, strict=True))


def _ways(blocks: list[Refs], files: list[Path]) -> dict[str, Callable[[], None]]:
    used = torch.ones(max(file.stat().st_size for file in files), dtype=torch.uint8)
    ways: dict[str, Callable[[], None]] = {
        "readinto, one buffer": partial(_plain, files, lambda size: used[:size]),
        "readinto, new memory": partial(_plain, files, partial(torch.empty, dtype=torch.uint8)),
        "safetensors": partial(_each, files, _copied),
        "read_tensors": partial(_each, blocks, read_tensors),
    }
    if not torch.cuda.is_available():
        return ways
    from fusegpt_ray.model.staging import BUFFER, Staging

    device = torch.device("cuda")
    staging = Staging(device, torch.bfloat16)
    sizes = [sum(ref.end - ref.begin for ref in refs.values()) for refs in blocks]
    there = torch.empty(max(sizes), dtype=torch.uint8, device=device)
    pinned = torch.ones(BUFFER, dtype=torch.uint8, pin_memory=True)

    def streamed() -> None:
        _each(blocks, staging.read)
        torch.cuda.synchronize()

    def memcpy() -> None:
        for size in sizes:
            for at in range(0, size, BUFFER):
                piece = there[at : min(at + BUFFER, size)]
                piece.copy_(pinned[: len(piece)], non_blocking=True)
        torch.cuda.synchronize()

    return ways | {"streamed": streamed, "memcpy": memcpy}


def _plain(files: list[Path], empty: Callable[[int], torch.Tensor]) -> None:
    for path in files:
        memory = empty(path.stat().st_size)
        view, at = memory.numpy().data, 0
        with path.open("rb", buffering=0) as file:
            while got := file.readinto(view[at : at + PIECE]):
                at += got


def _each(parts: Iterable[Any], read: Callable[[Any], object]) -> None:
    for part in parts:
        read(part)


def _copied(file: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in load_file(file).items()}


def _drop(files: list[Path]) -> None:
    """From the page cache."""
    for path in files:
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def _checkpoint(folder: Path, arguments: argparse.Namespace) -> tuple[list[Refs], list[Path]]:
    """The blocks' references, and the shards that they lie in."""
    d, f = arguments.hidden, arguments.intermediate
    shapes: dict[str, tuple[int, ...]] = {
        f"self_attn.{name}_proj.weight": (d, d) for name in "qkvo"
    }
    shapes |= {f"mlp.{name}_proj.weight": (f, d) for name in ("gate", "up")}
    shapes |= {"mlp.down_proj.weight": (d, f), "input_layernorm.weight": (d,)}
    entries = [
        Entry(f"{number}.{name}", torch.bfloat16, shape, partial(_random, shape))
        for number in range(arguments.blocks)
        for name, shape in shapes.items()
    ]
    refs: Refs = {}
    shards = plan_shards(entries, SHARD)
    for file, members in shards.items():
        refs |= write_safetensors(str(folder / file), members)[1]
    blocks = [
        {name: refs[f"{number}.{name}"] for name in shapes} for number in range(arguments.blocks)
    ]
    return blocks, [folder / file for file in shards]


def _random(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randint(-1000, 1000, shape, dtype=torch.int16).view(torch.bfloat16)


if __name__ == "__main__":
    sys.exit(main())
