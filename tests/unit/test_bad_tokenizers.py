"""Tokenizers that are missing, damaged, of another model, or code."""

from __future__ import annotations

import json
from typing import Any

import pytest
from desk import Desk
from mistakes import Bad, check, edit, table
from models import VOCAB
from spoilt import model, replaced


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
