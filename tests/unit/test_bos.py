"""Windows that begin with a beginning-of-sequence token: numbers against windows made by hand, and
whole forward passes of the plain model. The protocol stands beside every number.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from desk import LENGTH, SPECIAL, Desk
from expected import macro_influence, tokens_of
from mistakes import tree
from models import load_model
from recipes import recipe
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer

from fusegpt_ray.cli import main
from fusegpt_ray.errors import UserError
from fusegpt_ray.publishing.verification import verify
from fusegpt_ray.run.identity import settings
from fusegpt_ray.samples import fingerprint
from fusegpt_ray.text.calibration import (
    consecutive_windows,
    leading_token,
    sample_windows,
    window_starts,
)
from fusegpt_ray.text.protocol import described
from fusegpt_ray.text.windows import Drawn, Windows

BOS = SPECIAL.index("<s>")
Capture = pytest.CaptureFixture[str]
KEY = "calibration.data"
TOKENS = np.arange(100, 160, dtype=np.int32)


def adds(folder: Path, token: str | None, bos: str | None = "<s>") -> None:
    """Make the model's tokenizer put this token before every text, and call `bos` the first one."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if token:
        special = [(token, SPECIAL.index(token))]
        single = f"{token} $A"
        tokenizer.post_processor = processors.TemplateProcessing(single, special_tokens=special)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"bos_token": bos}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def stream() -> list[np.ndarray]:
    return [TOKENS[:7], TOKENS[7:40], TOKENS[40:]]


# --- which token, and where ---


@pytest.mark.parametrize(
    ("token", "bos", "auto", "always"),
    [
        ("<s>", "<s>", BOS, BOS),
        (None, "<s>", None, BOS),
        ("<pad>", "<s>", None, BOS),  # some other token is put before the text
        (None, None, None, None),
        ("<s>", None, None, None),
    ],
)
def test_auto_is_what_the_tokenizer_does(
    desk: Desk,
    token: str | None,
    bos: str | None,
    auto: int | None,
    always: int | None,
) -> None:
    adds(desk.model, token, bos)
    tokenizer = AutoTokenizer.from_pretrained(desk.model)
    assert leading_token("auto", tokenizer, "calibration.bos") == auto
    assert leading_token("never", tokenizer, "calibration.bos") is None
    if always is not None:
        assert leading_token("always", tokenizer, "calibration.bos") == always
        return
    with pytest.raises(UserError, match="no beginning-of-sequence token") as caught:
        leading_token("always", tokenizer, "calibration.bos")
    assert (caught.value.key, caught.value.value) == ("calibration.bos", "always")


def test_the_embedded_example_adds_none() -> None:
    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "examples/tiny-llama")
    assert tokenizer.bos_token is not None
    assert leading_token("auto", tokenizer, "calibration.bos") is None


def test_random_windows_are_the_same_text_behind_the_token() -> None:
    without = sample_windows(stream, 9, 8, 5, KEY)
    with_it = sample_windows(stream, 9, 8, 5, KEY, bos=1)
    starts = window_starts(len(TOKENS), 9, 8, 5)
    assert with_it.tolist() == [[1, *TOKENS[start : start + 7].tolist()] for start in starts]
    assert with_it.shape == without.shape and with_it.dtype == np.int64
    assert np.array_equal(with_it[:, 1:], without[:, :-1])
    assert fingerprint(with_it) != fingerprint(without)


SHAPES = [(8, None, 8), (8, 3, 3), (61, None, 1), (2, 99, 60)]


@pytest.mark.parametrize(("length", "limit", "n"), SHAPES)
def test_consecutive_windows_leave_no_token_out(length: int, limit: int | None, n: int) -> None:
    found = consecutive_windows(stream, length, limit, KEY, bos=1)
    width = length - 1
    assert found.tolist() == [[1, *TOKENS[w * width : (w + 1) * width].tolist()] for w in range(n)]
    assert found.dtype == np.int64
    with pytest.raises(UserError, match=r"60 tokens.*need 61"):
        consecutive_windows(stream, 62, None, KEY, bos=1)


def test_the_token_is_part_of_what_a_run_is() -> None:
    one, other = (settings(recipe(calibration={"bos": bos})) for bos in ("never", "auto"))
    assert one != other


# --- numbers ---


def windows_by_hand(text: Path, bos: bool) -> list[torch.Tensor]:
    ids, width = tokens_of(text), LENGTH - bos
    windows = [ids[start : start + width] for start in range(0, len(ids) - width + 1, width)]
    return [torch.cat([torch.tensor([BOS] * bos, dtype=torch.long), window]) for window in windows]


@torch.no_grad()
def perplexity_by_hand(folder: Path, text: Path, bos: bool) -> float:
    """Each token of a window from those before it, by a forward pass of its own."""
    model, losses = load_model(folder), []
    for window in windows_by_hand(text, bos):
        assert len(window) == LENGTH
        losses.append(0.0)
        for at in range(1, LENGTH):
            logits = model(input_ids=window[None, :at]).logits[0, -1].double()
            losses[-1] -= logits.log_softmax(-1)[window[at]].item() / (LENGTH - 1)
    return math.exp(sum(losses) / len(losses))


def evaluated(desk: Desk, capsys: Capture, *options: str) -> dict[str, Any]:
    arguments = ["--data", str(desk.heldout), "--length", str(LENGTH), "--json", *options]
    assert main(["evaluate", str(desk.model), *arguments]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


@pytest.mark.parametrize(
    ("token", "bos", "used"),
    [
        ("<s>", "auto", True),
        ("<s>", "never", False),
        ("<s>", "always", True),
        (None, "auto", False),
        (None, "always", True),
    ],
)
def test_evaluate(desk: Desk, capsys: Capture, token: str | None, bos: str, used: bool) -> None:
    adds(desk.model, token)
    found = evaluated(desk, capsys, "--bos", bos)
    expected = perplexity_by_hand(desk.model, desk.heldout, used)
    assert found.pop("perplexity") == pytest.approx(expected, rel=1e-5)
    n = len(windows_by_hand(desk.heldout, used))
    protocol = {"data": str(desk.heldout), "windows": n, "length": LENGTH, "bos": used}
    assert found.items() >= {"model": str(desk.model), **protocol}.items()


def test_evaluate_asks_the_tokenizer_unless_told(desk: Desk, capsys: Capture) -> None:
    adds(desk.model, "<s>")
    assert evaluated(desk, capsys) == evaluated(desk, capsys, "--bos", "auto")
    assert main(["evaluate", str(desk.model), "--data", str(desk.heldout), "--length", "12"]) == 0
    assert "tokens of " in (said := capsys.readouterr().out)
    assert ", with a beginning-of-sequence token)" in said


def calibration_by_hand(desk: Desk, windows: int) -> torch.Tensor:
    ids = tokens_of(desk.folder / "calibration.txt")
    draw = random.Random(0)
    starts = [draw.randint(0, len(ids) - LENGTH - 1) for _ in range(windows)]
    texts = torch.stack([ids[start : start + LENGTH - 1] for start in starts])
    return torch.cat([torch.full((windows, 1), BOS), texts], dim=1)


def test_score(desk: Desk, capsys: Capture) -> None:
    adds(desk.model, "<s>")
    assert main(["score", desk.write(), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = macro_influence(load_model(desk.model), calibration_by_hand(desk, 4))
    assert [row["score"] for row in found["blocks"]] == pytest.approx(expected, rel=1e-4)
    assert (found["windows"], found["length"], found["bos"]) == (4, LENGTH, True)
    assert found["data"] == str(desk.folder / "calibration.txt")
    assert (found["text_tokens"], found["times_seen"]) == (200, round(4 * (LENGTH - 1) / 200, 3))
    assert main(["score", desk.write()]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == described(found) and last.endswith("with a beginning-of-sequence token")


def test_compress_names_the_protocol_everywhere(desk: Desk, capsys: Capture) -> None:
    adds(desk.model, "<s>")
    held_out = {"a": {"data": str(desk.heldout)}, "b": {"data": str(desk.heldout), "bos": "never"}}
    assert main(["compress", desk.write(evaluation=held_out)]) == 0
    said, folder = capsys.readouterr().err, desk.out / "demo-p40"
    manifest = json.loads((folder / "fusegpt.json").read_text())
    card = (folder / "README.md").read_text()

    assert manifest["recipe"]["calibration"]["bos"] == "auto"
    data = str(desk.folder / "calibration.txt")
    protocol = {"data": data, "windows": 8, "length": LENGTH, "bos": True, "text_tokens": 200}
    protocol |= {"times_seen": 0.44, "licence": "not stated"}
    assert manifest["calibration"] == protocol
    scores = macro_influence(load_model(desk.model), calibration_by_hand(desk, 4))
    assert manifest["removed"][0] == scores.index(min(scores))
    for name, bos in {"a": True, "b": False}.items():
        row = manifest["perplexity"][name]
        windows = len(windows_by_hand(desk.heldout, bos))
        about = {"data": str(desk.heldout), "windows": windows, "length": LENGTH, "bos": bos}
        assert {key: row[key] for key in about} == about
        for key, model in {"dense": desk.model, "fused": folder}.items():
            expected = perplexity_by_hand(model, desk.heldout, bos)
            assert row[key] == pytest.approx(expected, rel=1e-4)
        line = f"{name}: {windows} windows of {LENGTH} tokens of {desk.heldout} "
        line += (
            f"(licence: not stated), {'with' if bos else 'without'} a beginning-of-sequence token"
        )
        assert line in said and line.replace(str(desk.heldout), desk.heldout.name) in card
    line = f"{described(protocol)}"
    assert f"calibration: {line}\n" in said
    assert f"Calibration: {line.replace(data, Path(data).name)}." in card

    assert main(["status", str(desk.out)]) == 0
    assert f"a: {described(manifest['perplexity']['a'])}\n" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["compress", "score", "evaluate"])
def test_a_token_that_there_is_not(
    desk: Desk,
    weight_reads: list[str],
    capsys: Capture,
    verb: str,
) -> None:
    adds(desk.model, None, bos=None)
    calibration = desk.recipe()["calibration"] | {"bos": "always"}
    arguments = [verb, desk.write(calibration=calibration)]
    if verb == "evaluate":
        options = ["--data", str(desk.heldout), "--length", "12", "--bos", "always"]
        arguments = [verb, str(desk.model), *options]
    before = tree(desk.folder)
    assert main(arguments) == 2
    key = "--bos" if verb == "evaluate" else "calibration.bos"
    assert f"error: {key} = 'always': the model's tokenizer has no" in capsys.readouterr().err
    assert (tree(desk.folder), weight_reads) == (before, [])


def test_a_manifest_without_the_key_is_still_good(desk: Desk, capsys: Capture) -> None:
    evaluation = {"a": {"data": str(desk.heldout)}}
    assert main(["compress", desk.write(method="mi", evaluation=evaluation)]) == 0
    file = desk.out / "demo-p40/fusegpt.json"
    manifest = json.loads(file.read_text())
    del manifest["calibration"], manifest["recipe"]["calibration"]["bos"]
    for key in ("bos", "data", "windows"):
        del manifest["perplexity"]["a"][key]
    file.write_text(json.dumps(manifest))
    assert verify(str(desk.out / "demo-p40"))["good"]
    assert main(["pull", str(desk.out / "demo-p40"), str(desk.folder / "pulled")]) == 0
    assert main(["status", str(desk.out)]) == 0
    line = f"a: windows of {LENGTH} tokens, without a beginning-of-sequence token\n"
    assert line in capsys.readouterr().out


# --- a short text ---


def test_a_text_that_is_seen_often_is_warned_of(desk: Desk, capsys: Capture) -> None:
    calibration = desk.recipe()["calibration"] | {"windows": 64}
    assert main(["compress", desk.write(method="mi", calibration=calibration)]) == 0
    folder, said = desk.out / "demo-p40", capsys.readouterr().err
    warning = f"64 windows of {LENGTH} tokens from a text of 200 tokens: "
    warning += "each token is seen about 4 times; use a longer text"
    assert f"warning: calibration: {warning}\n" in said
    manifest = json.loads((folder / "fusegpt.json").read_text())
    assert manifest["calibration"]["warning"] == warning
    assert manifest["calibration"]["times_seen"] == 64 * LENGTH / 200
    assert warning in (folder / "README.md").read_text()


@pytest.mark.parametrize(("windows", "warned"), [(20, False), (21, True)])
def test_what_is_seen_twice_is_not_warned_of(windows: int, warned: bool) -> None:
    drawn = Windows.of(np.zeros((windows, 11), dtype=np.int64), True, Drawn("a.txt", 100))
    assert ("warning" in drawn.protocol) is warned
    assert "warning" not in Windows.of(drawn.tokens_WT, True, Drawn("a.txt")).protocol
