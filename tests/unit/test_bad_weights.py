"""Weights and tokenizers that are malformed, hostile, or not those of the configuration."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from desk import Desk
from mistakes import Bad, check, edit, table
from models import VOCAB
from safetensors.torch import load_file, save_file
from test_bad_models import AGAIN, FOLDER, INDEX, SINGLE, configured, model, replaced, unreadable

NAME, BIAS = "model.layers.2.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.bias"


class Trap:
    """Pickled, it makes a file where it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("ran", "w")


def test_the_trap_is_one(desk: Desk) -> None:
    pickle.loads(pickle.dumps(Trap()))
    assert (desk.folder / "ran").exists()


def only(name: str, data: bytes) -> Callable[[Desk], object]:
    """The model has this file and no other weights."""

    def spoil(desk: Desk) -> None:
        (desk.model / SINGLE).unlink()
        (desk.model / name).write_bytes(data)

    return spoil


def rewritten(change: Callable[[bytes], bytes]) -> Callable[[Desk], object]:
    return lambda desk: (desk.model / SINGLE).write_bytes(
        change((desk.model / SINGLE).read_bytes())
    )


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Desk], object]:
    def spoil(desk: Desk) -> None:
        held = load_file(desk.model / SINGLE)
        change(held)
        save_file(held, desk.model / SINGLE, metadata={"format": "pt"})

    return spoil


def changed(value: torch.Tensor, name: str = NAME) -> Callable[[Desk], object]:
    """Another tensor of this name, or one more."""
    return tensors(lambda held: held.update({name: value}))


def sharded(spoil: Callable[[Path], object]) -> Callable[[Desk], object]:
    """Two shards with an index, then spoilt."""

    def make(desk: Desk) -> None:
        tf.AutoModelForCausalLM.from_pretrained(desk.model).save_pretrained(
            desk.folder / "shards", max_shard_size="100KB"
        )
        (desk.model / SINGLE).unlink()
        shutil.copytree(desk.folder / "shards", desk.model, dirs_exist_ok=True)
        spoil(desk.model)

    return make


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


TRAP = pickle.dumps(Trap())


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


HEADER, DAMAGED, OUTSIDE = (
    "header does not fit",
    "damaged safetensors header",
    "points outside its folder",
)
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
    model(
        "whole-numbers",
        tensors(lambda held: held.update({NAME: held[NAME].long()})),
        NAME,
        "stored as I64",
        "original dtype",
    ),
    model(
        "yes-and-no",
        tensors(lambda held: held.update({NAME: held[NAME] > 0})),
        NAME,
        "stored as BOOL",
        "original dtype",
    ),
    model(
        "float8",
        tensors(lambda held: held.update({NAME: held[NAME].to(torch.float8_e4m3fn)})),
        NAME,
        "stored as F8_E4M3",
        "dtype",
    ),
    model(
        "an-empty-tensor",
        changed(torch.zeros(0, 32)),
        NAME,
        r"saved empty.*\[0, 32\].*\[48, 32\]",
        "ZeRO-3",
    ),
    model(
        "a-tensor-too-many",
        changed(torch.zeros(2), "more"),
        "more",
        "1 tensors that .* not use",
        "belongs",
    ),
    model("biases", changed(torch.zeros(48), BIAS), BIAS, "1 tensors that .* not use", "belongs"),
    model(
        "no-tensor",
        tensors(lambda held: held.pop(NAME)),
        NAME,
        "lacks 1 tensors",
        "download it again",
    ),
    model(
        "no-head",
        tensors(lambda held: held.pop("lm_head.weight")),
        "lm_head.weight",
        "lacks 1 tensors",
        "download it again",
    ),
    model(
        "wrong-shape",
        tensors(lambda held: held.update({NAME: torch.zeros(2, 3)})),
        NAME,
        r"\[2, 3\].*\[48, 32\]",
        "config.json",
    ),
    model(
        "more-blocks-in-config",
        configured(num_hidden_layers=7),
        "model.layers.5",
        "lacks 18 tensors",
        "again",
    ),
    model(
        "fewer-blocks-in-config",
        configured(num_hidden_layers=4),
        "model.layers.4",
        "5 blocks, its config.json says 4.*MTP",
        "of these weights",
    ),
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


def no_tokenizer(desk: Desk) -> None:
    for file in desk.model.glob("tokenizer*"):
        file.unlink()


def tokenizer(name: str, data: bytes) -> Bad:
    """tokenizer.json holds this."""
    return model(
        name,
        lambda desk: (desk.model / "tokenizer.json").write_bytes(data),
        "model'",
        NO_TOKENIZER,
        AGAIN_ITS,
    )


def of_another_model(desk: Desk) -> None:
    """Every word is seven tokens further."""

    def later(data: dict[str, Any]) -> None:
        data["model"]["vocab"] = {
            word: number + 7 for word, number in data["model"]["vocab"].items()
        }

    edit(desk, "tokenizer.json", later)
    with (desk.folder / "calibration.txt").open("a") as text:
        text.write(f"w{VOCAB - 1} " * 500)


def tokenizer_code(desk: Desk) -> None:
    """A tokenizer of its own, whose code leaves a trace where it runs."""
    no_tokenizer(desk)
    (desk.model / "own.py").write_text("open('ran', 'w')")
    data = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    (desk.model / "tokenizer_config.json").write_text(json.dumps(data))


AGAIN_ITS = "tokenizer's files again"
NO_TOKENIZER, BESIDE = "tokenizer does not load", "tokenizer.json beside its weights"
TOKENIZERS = [
    model("none", no_tokenizer, "model'", NO_TOKENIZER, BESIDE),
    tokenizer("garbage", b"{"),
    tokenizer("binary", bytes(range(256))),
    tokenizer("a-list", b"[]"),
    tokenizer("nothing-in-it", b"{}"),
    tokenizer("deep", b"[" * 100_000),
    tokenizer("deep-and-whole", b"[" * 100_000 + b"]" * 100_000),
    tokenizer(
        "words-below-zero",
        b'{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": -1}, "unk_token": "a"}}',
    ),
    model(
        "its-own-link",
        replaced("tokenizer.json", lambda path: path.symlink_to(path)),
        "model'",
        NO_TOKENIZER,
        BESIDE,
    ),
    model(
        "of-another-model",
        of_another_model,
        "model'",
        f"the token {VOCAB + 6}, its config.json knows {VOCAB}",
        "that belongs",
    ),
    model("with-code", tokenizer_code, "model'", NO_TOKENIZER, BESIDE),
]


@table(TOKENIZERS)
def test_tokenizers(
    bad: Bad, desk: Desk, weight_reads: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    check(bad, desk, weight_reads, capsys)
