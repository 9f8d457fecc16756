"""Weights in several files: an index that is damaged or leads elsewhere, and shards that are
missing or something else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from desk import Desk
from mistakes import Bad, check, table
from spoilt import AGAIN, INDEX, model
from spoilt_weights import TRAP, sharded


def shard(make: Callable[[Path], object]) -> Callable[[Path], object]:
    """Something else is in the last shard's place."""

    def spoil(folder: Path) -> None:
        path = max(folder.glob("*.safetensors"))
        path.unlink()
        make(path)

    return spoil


def pointing(shard: Any) -> Callable[[Path], object]:
    """The index says that the head is in this file."""

    def spoil(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"]["lm_head.weight"] = shard
        (folder / INDEX).write_text(json.dumps(index))

    return spoil


OUTSIDE = "points outside its folder"
WEIGHTS = [
    model(
        "index-not-json",
        sharded(lambda folder: (folder / INDEX).write_text("{")),
        "model'",
        "damaged model.saf.*index",
        "again",
    ),
    model("index-leads-up", sharded(pointing("../x.safetensors")), "model'", OUTSIDE, "trusted"),
    model("index-leads-away", sharded(pointing("/etc/passwd")), "model'", OUTSIDE, "trusted"),
    model("index-names-a-number", sharded(pointing(5)), "model'", "index", AGAIN),
    model(
        "index-names-no-shard",
        sharded(pointing("more.safetensors")),
        "more.safetensors",
        "missing",
        "again",
    ),
    model(
        "index-leads-into-a-folder",
        sharded(pointing("sub/x.safetensors")),
        "model'",
        OUTSIDE,
        "trusted",
    ),
    model(
        "index-leads-up-on-windows",
        sharded(pointing("..\\x.safetensors")),
        "model'",
        OUTSIDE,
        "trusted",
    ),
    model(
        "index-names-no-file", sharded(pointing("a\0.safetensors")), "model'", OUTSIDE, "trusted"
    ),
    model(
        "index-names-a-pickle", sharded(pointing("pytorch_model.bin")), "model'", OUTSIDE, "trusted"
    ),
    model(
        "index-names-a-long-file",
        sharded(pointing("x" * 9000 + ".safetensors")),
        "model'",
        OUTSIDE,
        "trusted",
    ),
    model(
        "index-a-list",
        sharded(lambda folder: (folder / INDEX).write_text('{"weight_map": [1]}')),
        "model'",
        "index",
        AGAIN,
    ),
    model(
        "index-deep",
        sharded(lambda folder: (folder / INDEX).write_text("[" * 100_000)),
        "model'",
        "damaged model.saf.*index",
        AGAIN,
    ),
    model(
        "index-unreadable",
        sharded(lambda folder: (folder / INDEX).chmod(0)),
        "model'",
        "damaged model.*index.*ermission",
        AGAIN,
    ),
    model(
        "shard-a-folder",
        sharded(shard(Path.mkdir)),
        "of-0000",
        "cannot be read|not a safetensors file",
        "again",
    ),
    model(
        "shard-its-own-link",
        sharded(shard(lambda path: path.symlink_to(path))),
        "of-0000",
        "cannot be read|missing",
        "again",
    ),
    model(
        "shard-a-device",
        sharded(shard(lambda path: path.symlink_to("/dev/zero"))),
        "of-0000",
        "not a safetensors file",
        "again",
    ),
    model(
        "shard-a-pickle",
        sharded(shard(lambda path: path.write_bytes(TRAP))),
        "of-0000",
        "but a pickle",
        "again",
    ),
    model(
        "shard-missing",
        sharded(lambda folder: max(folder.glob("*.safetensors")).unlink()),
        "of-0000",
        "file is missing",
        "again",
    ),
]


@table(WEIGHTS)
def test_weights(
    bad: Bad, desk: Desk, weight_reads: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    check(bad, desk, weight_reads, capsys)
