"""`fusegpt evaluate` with several models and texts."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from desk import LENGTH, SPECIAL, Desk, random_text
from expected import perplexity, tokens_of
from mistakes import tree
from models import load_model
from safetensors.torch import load_file, save_file
from test_report import Page, drawn

from fusegpt_ray import Evaluation, evaluate, pipeline
from fusegpt_ray.cli import main
from fusegpt_ray.errors import UserError
from fusegpt_ray.measuring.bootstrap import paired_difference

WINDOWS = 9
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def three(desk: Desk) -> Desk:
    """Beside the model one that is almost it, and one with other weights; and two texts."""
    for name, spread in (("near", 1e-6), ("far", 0.5)):
        shutil.copytree(desk.model, desk.folder / name)
        file = desk.folder / name / "model.safetensors"
        tensors = load_file(file)
        draw = torch.Generator().manual_seed(3)
        for key, tensor in sorted(tensors.items()):
            tensors[key] = tensor + spread * torch.randn(tensor.shape, generator=draw)
        save_file(tensors, file, metadata={"format": "pt"})
    for number, name in enumerate(("a.txt", "b.txt")):
        (desk.folder / name).write_text(random_text(WINDOWS * LENGTH + 3, seed=10 + number))
    return desk


def measured(capsys: Capture, *arguments: str) -> dict[str, Any]:
    assert main(["evaluate", *arguments, "--length", str(LENGTH), "--json"]) == 0
    stdout = capsys.readouterr().out
    assert stdout.count("\n") == 1
    found: dict[str, Any] = json.loads(stdout)
    return found


def losses_by_hand(folder: Path, text: Path) -> list[float]:
    model = load_model(folder)
    windows = [window for window in tokens_of(text).split(LENGTH) if len(window) == LENGTH]
    return [
        torch.nn.functional.cross_entropy(model(input_ids=w[None]).logits[0, :-1], w[1:]).item()
        for w in windows
    ]


def test_every_model_on_every_text_beside_the_first(three: Desk, capsys: Capture) -> None:
    models, texts = ("model", "near", "far"), ("a.txt", "b.txt")
    asked = ("--data", "a.txt", "--data", "b.txt", "--report", "page.html")
    found = measured(capsys, *models, *asked)
    assert list(found) == ["results"]
    rows = found["results"]
    page = Path("page.html").read_text()
    assert [chart["data"]["values"][1]["model"] for chart in drawn(page)] == ["near", "near"]
    for row in rows:
        assert f"{row['perplexity']:.4f}" in Page(page).text
    assert [(row["data"], row["model"]) for row in rows] == [(t, m) for t in texts for m in models]
    for row in rows:
        folder, text = three.folder / row["model"], three.folder / row["data"]
        assert row["perplexity"] == pytest.approx(perplexity(load_model(folder), text), rel=1e-5)
        assert row["loss"] == pytest.approx(math.log(row["perplexity"]))
        assert (row["windows"], row["targets"]) == (WINDOWS, WINDOWS * (LENGTH - 1))
        assert row["protocol"].startswith(f"{WINDOWS} windows of {LENGTH} tokens of {row['data']}")
        assert ("against" in row) == (row["model"] != "model")
        if row["model"] == "far":
            by_hand = [losses_by_hand(three.folder / name, text) for name in ("model", "far")]
            first_W, second_W = map(np.array, by_hand)
            expected = paired_difference(first_W, second_W, np.full(WINDOWS, LENGTH - 1))
            against = row["against"]
            assert against["model"] == "model"
            assert against["difference"] == pytest.approx(expected.mean, abs=1e-5)
            assert against["interval"] == pytest.approx(expected.interval, abs=1e-5)
            ratio = row["perplexity"] / of_the_first(rows, row)
            assert against["ratio"] == pytest.approx(ratio, rel=1e-9)
            assert against["distinguishable"] is (expected.mean > 0)


def of_the_first(rows: list[dict[str, Any]], row: dict[str, Any]) -> float:
    """The perplexity of the first model on the same text."""
    return next(r["perplexity"] for r in rows if r["data"] == row["data"] and "against" not in r)


def test_each_is_what_it_is_alone(three: Desk, capsys: Capture) -> None:
    together = measured(capsys, "model", "far", "--data", "a.txt", "--data", "b.txt")["results"]
    for row in together:
        alone = measured(capsys, row["model"], "--data", row["data"])
        assert alone.pop("results") == [alone]
        assert {key: value for key, value in row.items() if key != "against"} == alone


def test_workers_are_opened_once_a_model(three: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    real = pipeline.open_workers
    monkeypatch.setattr(
        pipeline,
        "open_workers",
        lambda setup, show: opened.append(setup.source.name) or real(setup, show),
    )
    texts = [Evaluation(data=name, length=LENGTH) for name in ("a.txt", "b.txt")]
    assert len(evaluate(["model", "far"], texts)["results"]) == 4
    assert opened == ["model", "far"]


def test_the_table(three: Desk, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    options = ["--data", "a.txt", "--length", str(LENGTH)]
    assert main(["evaluate", "model", "near", "far", *options]) == 0
    shown = capsys.readouterr().out
    rows = measured(capsys, "model", "near", "far", "--data", "a.txt")["results"]
    cells = [re.split(r" *[│┃] *", line.strip("│ ")) for line in shown.splitlines() if "│" in line]
    assert f"perplexity on {rows[0]['data']}" in shown
    assert [row[:2] for row in cells] == [
        [row["model"], f"{row['perplexity']:.4f}"] for row in rows
    ]
    assert cells[0][2:] == ["–"] * 3
    far = rows[2]["against"]
    low, high = far["ratio_interval"]
    assert cells[2][2:] == [f"{far['ratio']:.4f}", f"{low:.4f} … {high:.4f}", "yes"]
    assert cells[1][-1] == ("yes" if rows[1]["against"]["distinguishable"] else "perhaps")
    assert rows[0]["protocol"] in shown.splitlines()
    assert "ratio: to the perplexity of model; its interval: of 10000 resamples" in shown


def test_of_few_windows_no_interval_is_told(three: Desk, capsys: Capture) -> None:
    options = ["--data", "a.txt", "--windows", "5"]
    row = measured(capsys, "model", "far", *options)["results"][1]
    assert row["against"]["interval"] is row["against"]["distinguishable"] is None
    assert main(["evaluate", "model", "far", *options, "--length", str(LENGTH)]) == 0
    assert "windows" in capsys.readouterr().out


def other_tokens(folder: Path) -> None:
    """Exchange the words of the tokenizer, the last with the first and so on."""
    file = folder / "tokenizer.json"
    inner = json.loads(file.read_text())
    words = [word for word in inner["model"]["vocab"] if word not in SPECIAL]
    numbers = [inner["model"]["vocab"][word] for word in words]
    inner["model"]["vocab"] |= dict(zip(words, reversed(numbers), strict=True))
    file.write_text(json.dumps(inner))


def test_of_other_tokens_there_is_no_difference(three: Desk, capsys: Capture) -> None:
    other_tokens(three.folder / "far")
    found = measured(capsys, "model", "far", "near", "--data", "a.txt")["results"]
    assert found[1]["against"].keys() == {"model", "problem"}
    assert found[2]["against"]["interval"] and found[1]["perplexity"] > 1
    options = ["--data", "a.txt", "--length", str(LENGTH)]
    assert main(["evaluate", "model", "far", *options]) == 0
    said = capsys.readouterr().out
    assert "far and model on a.txt: no ratio is told, because their tokenizers make" in said


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("model nowhere --data a.txt", "MODEL = 'nowhere': no such folder"),
        ("model ./model/ --data a.txt", "MODEL = './model/': the same folder as model"),
        ("model far model --data a.txt", "MODEL = 'model': given twice"),
        ("model --data a.txt --data a.txt", "--data = 'a.txt': given twice"),
        ("model far --data a.txt --revision main", "--revision = 'main': which of the 2 models"),
        ("model bare --data a.txt", "MODEL = 'bare': .*tokenizer"),
        ("model far --data a.txt --data no.txt", "--data = 'no.txt': no such file"),
        (
            "model far --data a.txt --data short.txt",
            r"--length = 12: the text has 3 tokens.* \(short.txt\)",
        ),
        ("model --data a.txt --column body --data c4=no.jsonl", "--data = 'no.jsonl': no such"),
        ("model --data c4=no.jsonl --apart", "--apart = False: stands beside c4"),
        ("model --data c4=no.jsonl --column x", "--column = 'x': stands beside c4"),
    ],
)
def test_mistakes(arguments: str, told: str, three: Desk, capsys: Capture) -> None:
    shutil.copytree(three.model, three.folder / "bare")
    for file in (three.folder / "bare").glob("tokenizer*"):
        file.unlink()
    (three.folder / "short.txt").write_text(random_text(3, seed=1))
    before = tree(three.folder)
    assert main(["evaluate", *arguments.split(), "--length", str(LENGTH)]) == 2
    stdout, stderr = capsys.readouterr()
    *_, last = stderr.splitlines()
    assert stdout == "" and stderr.count("error:") == 1
    assert re.match(f"error: {told}.*Fix: .+", last), last
    assert tree(three.folder) == before


def test_without_a_length_a_text_that_is_not_published_is_refused(
    desk: Desk, capsys: Capture
) -> None:
    assert main(["evaluate", "model", "--data", "heldout.txt"]) == 2
    assert (
        "--length = None: missing for heldout.txt. Fix: give the tokens a window"
        in capsys.readouterr().err
    )


def test_nothing_to_measure_is_said() -> None:
    with pytest.raises(UserError, match="none is given"):
        evaluate([], Evaluation(data="heldout.txt", length=LENGTH))
    with pytest.raises(UserError, match="none is given"):
        evaluate("model", [])
