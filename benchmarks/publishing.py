"""Saving a model: written, hashed, read back, hashed again, and looked at for NaN and Inf. Three
ways, in turn, in one process:

    python benchmarks/publishing.py [--blocks 12] [--hidden 2048] [--intermediate 5632]
    [--shard-gb 0.35 5] [--turns 5] [--folder DIR] [--json out.json]

- **plain**: one shard after the other: safetensors' `load_file` and `save_file`; SHA-256 of the
  file, twice, as of what was sent and of what is stored; `load_file` and `isfinite` of each tensor;
- **before**: as this package did it before ADR 24: a tensor at a time is read, written and hashed,
  four shards at once, and read back in steps, each hashed and then copied and looked at;
- **now**: `put_shards` of this package.

A random LLaMA in bfloat16 with a small vocabulary lies on disk, in the page cache; what is written
is removed after each turn. Below it the rates of the single parts, on one thread, which say where
the time goes.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from fusegpt_ray.model.finite import finite
from fusegpt_ray.model.source import Source
from fusegpt_ray.publishing.shards import AT_ONCE, Shards, put_shards
from fusegpt_ray.publishing.shrink import model_entries
from fusegpt_ray.store import storage
from fusegpt_ray.store.checkpoint import read_header
from fusegpt_ray.store.writer import Entry, layout, plan_shards


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=5632)
    parser.add_argument("--shard-gb", type=float, nargs="+", default=[0.35, 5.0])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--folder", help="where to write; default: the system's temporary folder")
    parser.add_argument("--json", help="write all numbers to this file")
    arguments = parser.parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        _checkpoint(Path(folder) / "model", arguments)
        dense = Source.find(f"{folder}/model", None).stack()
        for shard_gb in arguments.shard_gb:
            shards = plan_shards(model_entries(dense, dense), int(shard_gb * 1e9))
            rows.append(_measure(Path(folder), shards, arguments.turns))
        parts = _parts(next(Path(folder, "model").glob("*.safetensors")))
    _show(rows, parts)
    if arguments.json:
        found = {"arguments": vars(arguments), "rows": rows, "parts": parts}
        Path(arguments.json).write_text(json.dumps(found | {"cores": os.cpu_count()}, indent=1))
    return 0


def _checkpoint(folder: Path, arguments: argparse.Namespace) -> None:
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.intermediate,
        num_hidden_layers=arguments.blocks,
        num_attention_heads=arguments.hidden // 64,
        dtype="bfloat16",
    )
    model = transformers.LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(folder, max_shard_size="100GB")


def _measure(folder: Path, shards: Shards, turns: int) -> dict[str, Any]:
    """Seconds of each way, in turn, and those of CPU, of all its threads together."""
    size = sum(entry.bytes for entries in shards.values() for entry in entries)
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    cpu: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(turns):
        for name, way in WAYS.items():
            out = folder / name
            out.mkdir()
            began, began_cpu = time.perf_counter(), time.process_time()
            way(str(out), shards)
            seconds[name].append(time.perf_counter() - began)
            cpu[name].append(time.process_time() - began_cpu)
            shutil.rmtree(out)
            gc.collect()
    return {"shards": len(shards), "bytes": size, "seconds": seconds, "cpu_seconds": cpu}


def _show(rows: Sequence[dict[str, Any]], parts: dict[str, float]) -> None:
    print("| shards | GB | way | seconds | GB/s | before ÷ | CPU seconds | before ÷ |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        size = row["bytes"] / 1e9
        for name in WAYS:
            cells = [name]
            for key in ("seconds", "cpu_seconds"):
                own, before = row[key][name], row[key]["before"]
                value = statistics.median(own)
                ratio = statistics.median(b / a for a, b in zip(own, before, strict=True))
                speed = [f"{size / value:.2f}"] if key == "seconds" else []
                cells += [f"{value:.2f}", *speed, f"{ratio:.2f}"]
            print(f"| {row['shards']} | {size:.2f} | {' | '.join(cells)} |")
    print("\n| part, on one thread | GB/s |\n|---|---|")
    for part, rate in parts.items():
        print(f"| {part} | {rate:.2f} |")


# --- the ways ---


def _plain(folder: str, shards: Shards) -> None:
    for name, entries in shards.items():
        (source,) = {entry.load.args[0].file for entry in entries}  # type: ignore[attr-defined]
        names = {entry.name for entry in entries}
        whole = load_file(source)
        save_file({key: value for key, value in whole.items() if key in names}, f"{folder}/{name}")
        del whole
        sent, stored = hashlib.sha256(), hashlib.sha256()
        for digest in (sent, stored):
            with open(f"{folder}/{name}", "rb") as file:
                while part := file.read(1 << 25):
                    digest.update(part)
        assert sent.digest() == stored.digest()
        assert all(bool(value.isfinite().all()) for value in load_file(f"{folder}/{name}").values())


def _before(folder: str, shards: Shards) -> None:
    with ThreadPoolExecutor(AT_ONCE) as threads:
        paths = [f"{folder}/{name}" for name in shards]
        assert all(threads.map(_one_before, paths, shards.values()))


def _one_before(path: str, entries: Sequence[Entry]) -> bool:
    head, _ = layout(path, ((entry.name, entry.dtype, entry.shape) for entry in entries))
    sent, stored = hashlib.sha256(), hashlib.sha256()
    fs, _ = storage.filesystem(path)
    with fs.open(path, "wb") as file:
        for data in _one_after_another(head, entries):
            file.write(data)
            sent.update(data)
    refs = sorted(read_header(path, "model").values(), key=lambda ref: ref.begin)
    at, rest = 0, b""
    for begin in range(0, os.path.getsize(path), storage.STEP):
        (part,) = storage.read_ranges(path, [(begin, begin + storage.STEP)])
        stored.update(part)
        for ref in refs:
            if ref.begin < begin + len(part) and ref.end > at:
                inside = rest + part[max(ref.begin - begin, 0) : ref.end - begin]
                whole = len(inside) - len(inside) % ref.dtype.itemsize
                values = torch.frombuffer(bytearray(inside[:whole]), dtype=ref.dtype)
                assert bool(values.isfinite().all())
                rest = inside[whole:]
        at = begin + len(part)
    return sent.digest() == stored.digest()


def _one_after_another(head: bytes, entries: Sequence[Entry]) -> Iterator[bytes | memoryview]:
    yield head
    for entry in entries:
        yield entry.load().view(-1).view(torch.uint8).numpy().data


def _now(folder: str, shards: Shards) -> None:
    put_shards(folder, shards, lambda: None)


WAYS: dict[str, Callable[[str, Shards], None]] = {"plain": _plain, "before": _before, "now": _now}


# --- the parts ---


def _parts(file: Path) -> dict[str, float]:
    """GB/s of what there is to do, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    memory = bytearray(min(1 << 28, file.stat().st_size) // 2 * 2)
    values = torch.frombuffer(memory, dtype=torch.bfloat16)
    values.normal_()

    def read(into: bool) -> None:
        step = memoryview(bytearray(storage.STEP))
        with open(file, "rb", buffering=0) as opened:
            for _ in range(0, len(memory), storage.STEP):
                opened.readinto(step) if into else opened.read(storage.STEP)

    jobs: dict[str, Callable[[], object]] = {
        "SHA-256 (hashlib)": lambda: hashlib.sha256(memory),
        "`isfinite().all()` of a copy (before)": lambda: values.clone().isfinite().all(),
        "the smallest and the largest value (now)": lambda: finite(values),
        "reading into new memory (before)": lambda: read(False),
        "reading into the same memory (now)": lambda: read(True),
    }
    found = {}
    for name, job in jobs.items():
        took = []
        for _ in range(5):
            began = time.perf_counter()
            job()
            took.append(time.perf_counter() - began)
        found[name] = len(memory) / 1e9 / statistics.median(took)
    torch.set_num_threads(threads)
    return found


if __name__ == "__main__":
    sys.exit(main())
