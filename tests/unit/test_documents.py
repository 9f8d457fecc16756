"""Documents kept apart: how they are read, drawn and padded, and whole runs on them."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from desk import LENGTH, Desk, random_text, text_of
from models import load_model
from transformers import AutoTokenizer

from fusegpt_ray.cli import main
from fusegpt_ray.errors import UserError
from fusegpt_ray.recipe.text_sections import Text, Texts
from fusegpt_ray.samples import PADDING
from fusegpt_ray.text import calibration
from fusegpt_ray.text.calibration import token_stream
from fusegpt_ray.text.documents import APART, as_windows, drawn, enough
from fusegpt_ray.text.fresh import fresh_windows

KEY = "calibration.data"
TEMPLATE = (
    "<s> {% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('no system here') }}{% endif %}"
    "{{ 'w50' if m['role'] == 'user' else 'w60' }} {{ m['content'] }} {% endfor %}</s>"
)


def documents(count: int, seed: int = 0) -> list[list[int]]:
    """Of 1 to 18 tokens, so that some are shorter than a window and some longer."""
    draw = random.Random(seed)
    return [[draw.randint(3, 90) for _ in range(draw.randint(1, 18))] for _ in range(count)]


def written(file: Path, found: list[list[int]]) -> str:
    lines = (json.dumps({"text": text_of(torch.tensor(ids))}) for ids in found)
    file.write_text("\n".join(lines) + "\n")
    return str(file)


def stream_of(found: list[list[int]]) -> Any:
    def stream() -> Iterator[np.ndarray]:
        return (np.array(ids, dtype=np.int32) for ids in found)

    return stream


@pytest.fixture(name="desk")
def _desk(checkpoint: Any, tmp_path: Path) -> Desk:
    return Desk.make(tmp_path / "desk", checkpoint("llama"))


def read(desk: Desk, data: str, column: str = "text") -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(desk.model)
    stream = token_stream(Text(data=data, column=column), 10, tokenizer, KEY, APART)
    return [tokens.tolist() for tokens in stream()]


def with_template(desk: Desk) -> None:
    (desk.model / "chat_template.jinja").write_text(TEMPLATE)


CHATS = [
    [{"role": "user", "content": "w3 w4"}, {"role": "assistant", "content": "w5"}],
    [{"role": "user", "content": "w6"}],
]
AS_TEXT = [[1, 50, 3, 4, 60, 5, 2], [1, 50, 6, 2]]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_row_is_a_document_or_a_conversation(desk: Desk, kind: str) -> None:
    with_template(desk)
    rows = [
        {"messages": chat, "text": f"w7 w{number + 10}\n\nw9"} for number, chat in enumerate(CHATS)
    ]
    file = desk.folder / f"chats.{kind}"
    if kind == "jsonl":
        file.write_text("\n".join(map(json.dumps, rows)))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    assert read(desk, str(file)) == [[7, 10, 9], [7, 11, 9]]
    assert read(desk, str(file), "messages") == AS_TEXT


def test_a_file_of_plain_text_is_a_document(desk: Desk) -> None:
    for name, text in (("a", "w3 w4\n\nw5"), ("b", "w6")):
        (desk.folder / f"doc-{name}.txt").write_text(text)
    assert read(desk, str(desk.folder / "doc-*.txt")) == [[3, 4, 5], [6]]


@pytest.mark.parametrize(
    ("row", "template", "column", "problem"),
    [
        ({"messages": CHATS[0]}, False, "messages", "no chat template"),
        ({"messages": [{"role": "system", "content": "w3"}]}, True, "messages", "no system here"),
        ({"messages": [{"who": "user"}]}, True, "messages", "neither text nor messages"),
        ({"text": 3}, True, "text", "neither text nor messages"),
    ],
)
def test_what_is_no_document_is_refused(
    desk: Desk, row: Any, template: bool, column: str, problem: str
) -> None:
    if template:
        with_template(desk)
    (desk.folder / "bad.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match=problem):
        read(desk, str(desk.folder / "bad.jsonl"), column)


def test_conversations_are_not_packed(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    file = desk.folder / "chats.jsonl"
    file.write_text(json.dumps({"messages": CHATS[0]}))
    text = {"data": str(file), "column": "messages", "windows": 4, "length": LENGTH}
    assert main(["score", desk.write(calibration=text)]) == 2
    assert "set calibration.pack: false" in capsys.readouterr().err


def test_fewer_are_the_first_of_more_and_all_are_as_likely() -> None:
    found = documents(60)
    long = [ids for ids in found if len(ids) > 1]
    many, numbers, there = drawn(stream_of(found), 40, 7)
    few, *_ = drawn(stream_of(found), 9, 7)
    assert there == len(long) < 60
    assert [x.tolist() for x in many] == [long[number] for number in numbers]
    assert [x.tolist() for x in few] == [x.tolist() for x in many][:9]
    assert [x.tolist() for x in drawn(stream_of(found), 9, 8)[0]] != [x.tolist() for x in few]
    everything, *_ = drawn(stream_of(found), 99, 7)
    assert sorted(x.tolist() for x in everything) == sorted(long)
    with pytest.raises(UserError, match=f"{there} documents.*of 99 wanted"):
        enough(everything, 99, KEY)
    firsts = [drawn(stream_of([[n, n] for n in range(5)]), 1, seed)[0][0][0] for seed in range(500)]
    assert min(np.bincount(firsts)) > 60


def test_a_window_is_a_document_cut_or_padded() -> None:
    tokens = [np.array(ids) for ids in ([5, 6], [1, 5, 6], [5, 6, 7, 8])]
    plain, cut = as_windows(tokens, 3, None)
    assert plain.tolist() == [[5, 6, PADDING], [1, 5, 6], [5, 6, 7]] and cut == 1
    begun, cut = as_windows(tokens, 4, 1)
    assert begun.tolist() == [[1, 5, 6, PADDING], [1, 5, 6, PADDING], [1, 5, 6, 7]] and cut == 1


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("repeat", [False, True])
def test_no_document_is_trained_on_and_held_out(
    repeat: bool, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`kept`: the text is short enough to be tokenised once."""
    monkeypatch.setattr(calibration, "HELD_TOKENS", 10**6 if kept else 10)
    found = [[number, *ids] for number, ids in enumerate(documents(30))]
    held, passes = [], []

    def stream() -> Iterator[np.ndarray]:
        passes.append(len(held))
        yield from stream_of(found)()

    for windows in (8, 16, 40 if repeat else 20):
        texts = Texts(data="x")
        trained, out = fresh_windows(
            [stream], texts, windows, 4, 19, 3, repeat, None, "heal", pack=False
        )
        ids = trained.tokens_WT[:, 0].tolist()
        assert len(ids) == windows and (repeat or len(set(ids)) == windows)
        assert not set(ids) & set(out.tokens_WT[:, 0].tolist())
        for row in (*trained.tokens_WT, *out.tokens_WT):
            assert row[row != PADDING].tolist() == found[row[0]]
        held.append(out.tokens_WT.tolist())
    assert held[0] == held[1] == held[2]
    assert passes == ([0, 1, 2] if kept else [0, 0, 1, 1, 2, 2])
    with pytest.raises(UserError, match="has 30 documents"):
        fresh_windows(
            [stream_of(found)], Texts(data="x"), 40, 4, 19, 3, False, None, "heal", None, False
        )


def perplexity_by_hand(folder: Path, found: list[list[int]]) -> float:
    model, losses = load_model(folder), list[float]()
    for ids in found:
        if len(ids) > 1:
            row = torch.tensor(ids[:LENGTH])
            with torch.no_grad():
                logits = model(input_ids=row[None]).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, row[1:], reduction="none")
            losses += loss.tolist()
    return math.exp(sum(losses) / len(losses))


def test_a_whole_run_keeps_documents_apart(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    """Scored, fused, healed and published; the perplexities are those of plain transformers on
    each document alone.
    """
    data = written(desk.folder / "docs.jsonl", documents(60))
    held = documents(9, seed=5)
    recipe = desk.write(
        sparsity=0.2,
        calibration={"data": data, "windows": 8, "length": LENGTH, "pack": False},
        evaluation={"held": {"data": written(desk.folder / "held.jsonl", held)}},
        heal={"batch": 4, "held_out": 4, "tokens": 8 * LENGTH, "rank": 2},
    )
    assert main(["compress", recipe]) == 0
    model = desk.out / "demo-p20"
    manifest = json.loads((model / "fusegpt.json").read_text())
    measured = manifest["perplexity"]["held"]
    assert measured["dense"] == pytest.approx(perplexity_by_hand(desk.model, held), rel=1e-5)
    published = perplexity_by_hand(model, held)
    assert measured["healed"] == pytest.approx(published, rel=1e-5)
    kept = [ids[:LENGTH] for ids in held if len(ids) > 1]
    assert measured["tokens"] == sum(map(len, kept)) and measured["documents"] == len(kept)
    capsys.readouterr()
    data = ["--data", str(desk.folder / "held.jsonl"), "--length", str(LENGTH)]
    assert main(["evaluate", str(desk.model), *data, "--apart", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["perplexity"] == measured["dense"]


def test_too_few_documents_are_a_users_mistake(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    (desk.folder / "one.txt").write_text(random_text(50, 3))
    text = {"data": str(desk.folder / "one.txt"), "windows": 8, "length": LENGTH, "pack": False}
    assert main(["compress", desk.write(calibration=text)]) == 2
    assert "1 documents of two tokens or more, of 8 wanted" in capsys.readouterr().err
