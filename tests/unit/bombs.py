"""Inputs that are small and stand for more than a memory holds.

Run as a program with a folder and `some` or `others`, it sets those bombs off one by one, each in
a process of its own, and prints a line of JSON for each: name, exit code, seconds (of CPU), the
most memory that the process took, and what it said.
"""

from __future__ import annotations

import gzip
import json
import lzma
import os
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from desk import Desk
from mistakes import tree
from models import save_tiny

import fusegpt_ray.pipeline
import fusegpt_ray.publishing.download
import fusegpt_ray.publishing.verification  # noqa: F401 - imported before the measurement, as all of the above
from fusegpt_ray.cli import main

MB, TB = 1_000_000, 1 << 40
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
Bomb = Callable[[Desk], object]
"""Makes it; returns what follows `fusegpt` on the command line, if that is not `compress` and
the desk's recipe."""


def sparse(name: str) -> Bomb:
    """A file of the model has a terabyte, of which none is on the disk."""
    return lambda desk: os.truncate(_touched(desk.model / name), TB)


def _touched(path: Path) -> Path:
    path.touch()
    return path


def recipe(data: bytes, size: int = 0) -> Bomb:
    def make(desk: Desk) -> list[str]:
        path = desk.folder / "own.yaml"
        path.write_bytes(data)
        os.truncate(path, size or len(data))
        return ["compress", str(path)]

    return make


def header(raw: bytes) -> Bomb:
    return lambda desk: (desk.model / SINGLE).write_bytes(struct.pack("<Q", len(raw)) + raw)


def configured(**changes: Any) -> Bomb:
    path = "config.json"

    def make(desk: Desk) -> None:
        (desk.model / path).write_text(
            json.dumps(json.loads((desk.model / path).read_text()) | changes)
        )

    return make


def without_single(make: Bomb) -> Bomb:
    """An index counts only where there is no single file of weights."""

    def both(desk: Desk) -> object:
        (desk.model / SINGLE).unlink()
        return make(desk)

    return both


def text(name: str, opened: Callable[..., Any], parts: Iterator[bytes]) -> Bomb:
    """A text for calibration."""

    def make(desk: Desk) -> list[str]:
        with opened(desk.folder / name, "wb") as file:
            for part in parts:
                file.write(part)
        return [
            "compress",
            desk.write(calibration=desk.recipe()["calibration"] | {"data": name, "piece_mb": 1}),
        ]

    return make


def parquet(desk: Desk) -> list[str]:
    """A dictionary of one text, and a thousand rows that name it."""
    values = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0] * 1000, pyarrow.int32()), pyarrow.array(["a" * 70 * MB])
    )
    pyarrow.parquet.write_table(
        pyarrow.table({"text": values}),
        desk.folder / "bomb.parquet",
        compression="zstd",
        store_schema=False,
    )
    return [
        "compress",
        desk.write(
            calibration=desk.recipe()["calibration"] | {"data": "bomb.parquet", "piece_mb": 1}
        ),
    ]


def manifest(verb: str, make: Callable[[Path], object]) -> Bomb:
    def arguments(desk: Desk) -> list[str]:
        make(_touched(desk.model / "fusegpt.json"))
        return [verb, str(desk.model), *(["here"] if verb == "pull" else [])]

    return arguments


def _repeated(part: bytes, times: int) -> Iterator[bytes]:
    return (part for _ in range(times))


LAUGHS = "\n".join(
    ["a0: &a0 [lol]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12))]
).encode()
TENSORS = ",".join(
    f'"{n}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for n in range(500_000)
)
BOMBS: dict[str, Bomb] = {
    "recipe, aliases": recipe(LAUGHS),
    "recipe, a terabyte": recipe(b"a: 1\n", TB),
    "recipe, endless": lambda desk: ["score", "/dev/zero"],
    "config.json, a terabyte": sparse("config.json"),
    "config.json, a billion blocks": configured(num_hidden_layers=10**9),
    "config.json, a billion experts": configured(
        model_type="mixtral", architectures=["MixtralForCausalLM"], num_local_experts=10**9
    ),
    "index, a terabyte": without_single(sparse(INDEX)),
    "index, 30 MB of brackets": without_single(
        lambda desk: (desk.model / INDEX).write_bytes(b"[[]," * 7_500_000)
    ),
    "header, 2**60 bytes": lambda desk: (desk.model / SINGLE).write_bytes(
        struct.pack("<Q", 1 << 60) + b"{}"
    ),
    "header, half of a terabyte": lambda desk: os.truncate(
        _written(desk.model / SINGLE, struct.pack("<Q", TB >> 1)), TB
    ),
    "header, 500,000 tensors": header(f"{{{TENSORS}}}".encode()),
    "header, 30 MB of lists": header(b'{"a":[' + b"[]," * 10_000_000 + b"[]]}"),
    "tokenizer.json, a terabyte": sparse("tokenizer.json"),
    "text, 100 MB of blanks, gzip": text("bomb.txt.gz", gzip.open, _repeated(b" " * MB, 100)),
    "text, 100 MB of blanks, xz": text("bomb.txt.xz", lzma.open, _repeated(b" " * MB, 100)),
    "text, a line of 200 MB": text("bomb.txt", open, _repeated(b" " * MB, 200)),
    "JSON Lines, a line of 150 MB, gzip": text(
        "bomb.jsonl.gz", gzip.open, _repeated(b"a" * MB, 150)
    ),
    "JSON, 30 MB of lists": text("bomb.json", open, iter([b"[" + b"[]," * 10_000_000 + b"[]]"])),
    "CSV, a field of 150 MB, gzip": text(
        "bomb.csv.gz", gzip.open, iter([b'text\n"', *_repeated(b"a" * MB + b"\n", 150), b'"\n'])
    ),
    "parquet, 70 GB of one text": parquet,
    "manifest, a terabyte, verify": manifest("verify", lambda path: os.truncate(path, TB)),
    "manifest, a terabyte, pull": manifest("pull", lambda path: os.truncate(path, TB)),
    "manifest, 30 MB of lists": manifest(
        "pull", lambda path: path.write_bytes(b'{"files":[' + b"[]," * 10_000_000 + b"[]]}")
    ),
}


SOME = ["recipe, aliases", "header, 30 MB of lists"]
"""A few that really hold much."""
CHOICES = {"some": SOME, "others": [name for name in BOMBS if name not in SOME]}


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def set_off(name: str, folder: Path, checkpoint: Path) -> dict[str, Any]:
    """What becomes of a process that meets the bomb."""
    folder.mkdir()
    desk = Desk.make(folder, checkpoint)
    os.chdir(folder)
    asked = folder.with_suffix(".arguments")
    if (child := os.fork()) == 0:  # what making it takes shall not be counted
        made = BOMBS[name](desk)
        asked.write_text(json.dumps(made if isinstance(made, list) else ["compress", desk.write()]))
        os._exit(0)
    os.waitpid(child, 0)
    arguments = json.loads(asked.read_text())
    before, said = tree(folder), folder.with_suffix(".err")
    if (child := os.fork()) == 0:
        with said.open("w") as file, redirect_stderr(file):
            code = main(arguments)
        os._exit(code)
    _, status, usage = os.wait4(child, 0)
    return {
        "name": name,
        "code": os.waitstatus_to_exitcode(status),
        "seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mb": round(usage.ru_maxrss * 1024 / MB),
        "said": said.read_text()[-2000:],
        "untouched": tree(folder) == before,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    work = Path(sys.argv[1])
    tiny = save_tiny("llama", work / "checkpoint")
    for number, one in enumerate(CHOICES[sys.argv[2]]):
        print(json.dumps(set_off(one, work / str(number), tiny)), flush=True)
