"""Weights in a single file that is damaged, or no safetensors file at all: pickles, headers that
lie, folders, links and devices."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from desk import Desk
from mistakes import Bad, check, table
from spoilt import FOLDER, SINGLE, model, replaced, unreadable
from spoilt_weights import TRAP, Trap, only


def test_the_trap_is_one(desk: Desk) -> None:
    pickle.loads(pickle.dumps(Trap()))
    assert (desk.folder / "ran").exists()


def rewritten(change: Callable[[bytes], bytes]) -> Callable[[Desk], object]:
    return lambda desk: (desk.model / SINGLE).write_bytes(
        change((desk.model / SINGLE).read_bytes())
    )


def zipped_pickle(desk: Desk) -> None:
    torch.save({"x": Trap()}, desk.model / SINGLE)


def headed(header: Any, data: int = 0) -> Callable[[Desk], object]:
    """The file is this header, JSON or bytes, and so many zeros."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return only(SINGLE, struct.pack("<Q", len(raw)) + raw + bytes(data))


def one(**changes: Any) -> Callable[[Desk], object]:
    """The file holds one tensor, and its header says something else of it."""
    return headed({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | changes}, 16)


ENTRY = '"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}'


def length_field(value: int) -> Callable[[bytes], bytes]:
    return lambda data: struct.pack("<Q", value) + data[8:]


HEADER, DAMAGED = "header does not fit", "damaged safetensors header"
PICKLE = "found pytorch_model.bin.*never opened"
WEIGHTS = [
    model(
        "pickle",
        only("pytorch_model.bin", pickle.dumps(Trap())),
        "model'",
        PICKLE,
        "save_pretrained",
    ),
    model(
        "pickle-renamed",
        only(SINGLE, pickle.dumps(Trap())),
        SINGLE,
        "but a pickle",
        "safetensors only",
    ),
    model("no-weights", only("notes.txt", b""), "model'", "holds no model.safetensors", FOLDER),
    model("empty", only(SINGLE, b""), SINGLE, HEADER, "again"),
    model("cut-in-the-header", rewritten(lambda data: data[:100]), SINGLE, HEADER, "again"),
    model(
        "cut-in-the-tensors",
        rewritten(lambda data: data[:-1000]),
        SINGLE,
        f"{DAMAGED}.*outside the file",
        "again",
    ),
    model(
        "with-more-at-its-end",
        rewritten(lambda data: data + b"x"),
        SINGLE,
        "bytes that belong to no tensor",
        "again",
    ),
    model(
        "pickle-with-a-length",
        only(SINGLE, struct.pack("<Q", len(TRAP)) + TRAP),
        SINGLE,
        DAMAGED,
        "again",
    ),
    model("zipped-pickle-renamed", zipped_pickle, SINGLE, "zipped pickle", "safetensors only"),
    model("absurd-length", rewritten(length_field(2**63)), SINGLE, HEADER, "again"),
    model("short-length", rewritten(length_field(50)), SINGLE, DAMAGED, "again"),
    model(
        "a-shape-of-2**60",
        one(shape=[2**60], data_offsets=[0, 2**62]),
        SINGLE,
        f"{DAMAGED}.*absurd",
        "again",
    ),
    model(
        "a-shape-that-hides-its-size",
        one(shape=[2**40, 0, 2**40], data_offsets=[0, 0]),
        SINGLE,
        f"{DAMAGED}.*absurd",
        "again",
    ),
    model("a-shape-of-more-digits", one(shape=[10**30]), SINGLE, f"{DAMAGED}.*no size", "again"),
    model("a-shape-below-zero", one(shape=[-4]), SINGLE, f"{DAMAGED}.*no size", "again"),
    model("a-shape-of-fractions", one(shape=[4.0]), SINGLE, f"{DAMAGED}.*shape", "again"),
    model("a-shape-of-names", one(shape={"4": 4}), SINGLE, f"{DAMAGED}.*shape", "again"),
    model("a-shape-of-everything", one(shape=[1] * 100_000), SINGLE, f"{DAMAGED}.*shape", "again"),
    model("offsets-below-zero", one(data_offsets=[-16, 0]), SINGLE, f"{DAMAGED}.*no size", "again"),
    model("offsets-reversed", one(data_offsets=[16, 0]), SINGLE, f"{DAMAGED}.*outside", "again"),
    model(
        "offsets-beyond-the-file",
        one(data_offsets=[16, 32]),
        SINGLE,
        f"{DAMAGED}.*outside",
        "again",
    ),
    model("three-offsets", one(data_offsets=[0, 16, 32]), SINGLE, DAMAGED, "again"),
    model("a-dtype-nobody-knows", one(dtype="F31"), SINGLE, f"{DAMAGED}.*F31", "again"),
    model("a-dtype-of-numbers", one(dtype=[32]), SINGLE, DAMAGED, "again"),
    model(
        "a-tensor-twice",
        headed(f"{{{ENTRY}, {ENTRY}}}".encode(), 16),
        SINGLE,
        f"{DAMAGED}.*twice",
        "again",
    ),
    model(
        "a-tensor-of-half-a-character",
        headed(f"{{{ENTRY}}}".replace("x", "\\ud800").encode(), 16),
        SINGLE,
        DAMAGED,
        "again",
    ),
    model("a-tensor-that-is-none", headed({"x": 5}), SINGLE, DAMAGED, "again"),
    model("a-list-for-a-header", headed([]), SINGLE, DAMAGED, "again"),
    model("a-header-of-brackets", headed(b"[" * 1_000_000), SINGLE, DAMAGED, "again"),
    model(
        "a-header-in-utf-16", headed(f"{{{ENTRY}}}".encode("utf-16"), 16), SINGLE, DAMAGED, "again"
    ),
    model(
        "about-itself-no-text",
        headed(f'{{"__metadata__": {{"a": 1}}, {ENTRY}}}'.encode(), 16),
        SINGLE,
        DAMAGED,
        "again",
    ),
    model(
        "a-folder-for-weights",
        replaced(SINGLE, Path.mkdir),
        "model'",
        "holds no model.safetensors",
        FOLDER,
    ),
    model(
        "weights-their-own-link",
        replaced(SINGLE, lambda path: path.symlink_to(path)),
        "model'",
        "holds no model.safetensors",
        "",
    ),
    model(
        "a-device-for-weights",
        replaced(SINGLE, lambda path: path.symlink_to("/dev/zero")),
        "model'",
        "holds no model.saf",
        "",
    ),
    model("weights-unreadable", unreadable(SINGLE), SINGLE, "may not be read|cannot be read", ""),
]


@table(WEIGHTS)
def test_weights(
    bad: Bad, desk: Desk, weight_reads: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    check(bad, desk, weight_reads, capsys)
