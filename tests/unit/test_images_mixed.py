"""Mixtures of plain text and of conversations with images: which windows are drawn, whole runs on
them, and what is refused.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from albums import WORDS, album, save_llava, write_lines
from desk import Desk
from models import save_tiny
from pictures import load_seeing, passes
from pictures import samples as seen_by
from test_images import by_hand
from test_runs_on_images import METHODS, answers_perplexity
from test_training_on_images import digests

from fusegpt_ray.errors import UserError
from fusegpt_ray.pipeline import compress, open_workers, score
from fusegpt_ray.planning.plan import mistakes, plan
from fusegpt_ray.preparing.windows import calibration_windows, healing_windows
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.run.shared import Shared
from fusegpt_ray.samples import PADDING, Samples, counting, fingerprint, with_an_image
from fusegpt_ray.terminal.display import Display
from fusegpt_ray.text.windows import Windows

LENGTH = 36


@pytest.fixture(name="model", scope="session")
def _model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava(tmp_path_factory.mktemp("mixed") / "llava")


def words(count: int, seed: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, count))


def asked(model: Path, folder: Path, calibration: Any = None, **more: Any) -> dict[str, Any]:
    """A recipe on three windows of text for each conversation, and its texts."""
    (folder / "plain.txt").write_text(words(2000, 1))
    (folder / "held.txt").write_text(words(200, 2))
    (folder / "held").mkdir(exist_ok=True)
    write_lines(folder / "seen.jsonl", album(folder, 12))
    write_lines(folder / "held" / "out.jsonl", album(folder / "held", 5, seed=1))
    parts = [
        {"data": str(folder / "plain.txt"), "weight": 3},
        {"data": str(folder / "seen.jsonl"), "images": True},
    ]
    given = {
        "model": {"source": str(model)},
        "sparsity": 0.2,
        "method": "mi",
        "calibration": {"data": parts, "windows": 16, "length": LENGTH} | (calibration or {}),
        "evaluation": {
            "plain": {"data": str(folder / "held.txt")},
            "chats": {"data": str(folder / "held" / "out.jsonl"), "images": True},
        },
        "importance": {"windows": 4, "batch": 2},
        "cluster": {"engine": "local"},
        "output": {"uri": str(folder / "out"), "name": "shallow"},
    }
    return given | more


def drawn(given: dict[str, Any]) -> tuple[Windows, ...]:
    """Those of the calibration; those to heal on, and held-out ones, if the recipe has them."""
    planned = plan(Recipe.parse(given), Display())
    leading = planned.leading["calibration"]
    with open_workers(planned.setup, Display()) as workers:
        found = calibration_windows(workers, planned.recipe, leading, Display(), Shared())
        if planned.recipe.heal is None:
            return (found,)
        return (found, *healing_windows(workers, planned.recipe, leading, Display(), Shared()))


def of_text(windows: Windows, number: int) -> Samples:
    assert isinstance(windows.tokens_WT, Samples)
    return windows.tokens_WT[np.flatnonzero(windows.text_W == number)]


def test_each_part_gives_its_share_and_what_it_would_alone(model: Path, tmp_path: Path) -> None:
    given = asked(model, tmp_path)
    (found,) = drawn(given)
    plain, seen = of_text(found, 0), of_text(found, 1)
    assert (len(plain), len(seen)) == (12, 4)
    assert seen.images_WT.any(axis=1).all() and not plain.images_WT.any()
    assert not any(inputs.load() for inputs in plain.inputs)
    assert plain.targets_WT.all()
    alone = {"data": given["calibration"]["data"][0]["data"], "windows": 12}
    (text,) = drawn(asked(model, tmp_path, alone))
    assert np.array_equal(plain.tokens_WT, text.tokens_WT)
    # The other way round, so that the album is the first text, which has the recipe's own seed.
    turned = {"data": given["calibration"]["data"][::-1]}
    (other,) = drawn(asked(model, tmp_path, turned))
    alone = {"data": given["calibration"]["data"][1]["data"], "windows": 4, "images": True}
    (chats,) = drawn(asked(model, tmp_path, alone))
    assert fingerprint(of_text(other, 0)) == fingerprint(chats.tokens_WT)
    about = found.protocol
    assert [part["windows"] for part in about["parts"]] == [12, 4]
    assert about["parts"][0]["text_tokens"] == 2000
    assert about["parts"][1]["conversations"] == 12
    assert about["tokens"] == 12 * LENGTH + (seen.tokens_WT != PADDING).sum()


def test_two_albums_are_a_mixture_too(model: Path, tmp_path: Path) -> None:
    parts = [{"data": str(tmp_path / "seen.jsonl")}, {"data": str(tmp_path / "held/out.jsonl")}]
    (found,) = drawn(asked(model, tmp_path, {"data": parts, "images": True, "windows": 8}))
    assert [len(of_text(found, number)) for number in (0, 1)] == [4, 4]
    assert counting(found.tokens_WT, "image").any(axis=1).all()


@pytest.mark.parametrize("tokens", [None, 20 * LENGTH])
def test_healing_draws_from_both_and_holds_out_others(
    tokens: int | None, model: Path, tmp_path: Path
) -> None:
    heal = {"batch": 4, "held_out": 8, "tokens": tokens}
    _, train, held = drawn(asked(model, tmp_path, heal=heal))
    assert [len(of_text(train, n)) for n in (0, 1)] == ([12, 4] if tokens is None else [15, 5])
    assert [len(of_text(held, n)) for n in (0, 1)] == [6, 2]
    rows = [{row.tobytes() for row in of_text(each, 0).tokens_WT} for each in (train, held)]
    pixels = [{each.digest for each in of_text(part, 1).inputs} for part in (train, held)]
    assert len(pixels[0] | pixels[1]) == len(of_text(train, 1)) + 2  # no image is in two
    assert not rows[0] & rows[1]


def test_a_text_of_too_few_conversations_is_named(model: Path, tmp_path: Path) -> None:
    few = {"windows": 64}
    with pytest.raises(UserError) as caught:
        drawn(asked(model, tmp_path, few))
    assert (caught.value.key, caught.value.value) == ("calibration.windows", 64)
    assert "calibration.data.1 has 12 conversations that fit" in caught.value.problem
    heal = {"batch": 4, "held_out": 4, "tokens": 48 * LENGTH}
    with pytest.raises(UserError) as caught:
        drawn(asked(model, tmp_path, heal=heal))
    assert caught.value.key == "heal.tokens"
    assert "calibration.data.1 has 12 conversations that fit" in caught.value.problem
    assert f"at most {44 * LENGTH}" in caught.value.fix
    _, train, _ = drawn(asked(model, tmp_path, heal=heal | {"tokens": None, "batch": 2}))
    assert len(train.tokens_WT) == 16
    _, train, _ = drawn(asked(model, tmp_path, heal=heal | {"repeat": True}))
    assert [len(of_text(train, n)) for n in (0, 1)] == [36, 12]
    assert train.protocol["parts"][1]["repeated"] == pytest.approx(12 / 11, abs=1e-3)


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("tokens", ["all", "text", "image"])
def test_scores_are_those_of_whole_passes(
    tokens: Any, pack: bool, model: Path, tmp_path: Path
) -> None:
    """Padding of documents and of conversations counts nowhere."""
    importance = {"windows": 8, "batch": 1, "tokens": tokens}
    given = asked(model, tmp_path, {"pack": pack, "windows": 8}, importance=importance)
    rows = [{"text": words(5 + number, number)} for number in range(9)]
    given["calibration"]["data"][0]["data"] = str(write_lines(tmp_path / "rows.jsonl", rows))
    (found,) = drawn(given)
    assert isinstance(found.tokens_WT, Samples)
    assert pack != (of_text(found, 0).tokens_WT == PADDING).any()
    expected = by_hand(model, found.tokens_WT, tokens)
    blocks = score(Recipe.parse(given))["blocks"]
    assert [block["score"] for block in blocks] == pytest.approx(expected, rel=1e-4)
    # Also where the first windows have none of the tokens that count, and blocks are given up.
    chosen = Recipe.parse(given | {"method": "mi", "sparsity": 0.2, "evaluation": {}})
    (published,) = compress(chosen)
    assert published.manifest["removed"] == [int(np.argmin(expected))]


@torch.no_grad()
def text_perplexity(model: Path, text: str) -> float:
    """Of consecutive windows, by plain transformers."""
    from transformers import AutoProcessor

    ids = AutoProcessor.from_pretrained(model).tokenizer(text, add_special_tokens=False)
    tokens_T = torch.tensor(ids["input_ids"])
    windows_WT = tokens_T[: len(tokens_T) // LENGTH * LENGTH].view(-1, LENGTH)
    log_p = load_seeing(model)(input_ids=windows_WT).logits.double().log_softmax(-1)
    targets_WS1 = windows_WT[:, 1:, None]
    return math.exp(-log_p[:, :-1].gather(2, targets_WS1).mean().item())


@pytest.mark.parametrize("method", METHODS)
def test_a_run_on_a_mixture(method: str, model: Path, tmp_path: Path) -> None:
    given = asked(model, tmp_path, **METHODS[method])
    (published,) = compress(Recipe.parse(given))
    out, last = Path(published.uri), "healed" if method == "fusegpt" else "dropped"
    table = published.manifest["perplexity"]
    for stage, folder in (("dense", model), (last, out)):
        assert table["chats"][stage] == pytest.approx(
            answers_perplexity(folder, tmp_path / "held"), rel=1e-4
        )
        assert table["plain"][stage] == pytest.approx(
            text_perplexity(folder, (tmp_path / "held.txt").read_text()), rel=1e-4
        )
    assert [part["windows"] for part in published.manifest["calibration"]["parts"]] == [12, 4]
    assert "images" not in published.manifest["recipe"]["calibration"]["data"][0]
    for part in ("vision", "projector"):
        assert digests(out, part) == digests(model, part)
    (again,) = compress(Recipe.parse(given))
    assert again.manifest == published.manifest


def test_what_is_compared_has_an_image(model: Path, tmp_path: Path) -> None:
    (found,) = drawn(asked(model, tmp_path))
    first = int(np.flatnonzero(found.text_W == 1)[0])
    assert first > 0
    for count in (1, 2, 16):
        part = with_an_image(found.tokens_WT, count)
        assert len(part) == count and part.images_WT.any()
        assert np.array_equal(part.tokens_WT[: count - 1], found.tokens_WT.tokens_WT[: count - 1])
    plain = seen_by("llava").tokens_WT
    assert with_an_image(plain, 3) is not plain and np.array_equal(
        with_an_image(plain, 3), plain[:3]
    )


def test_a_text_in_a_mixture_computes_what_it_would_alone(model: Path, tmp_path: Path) -> None:
    """By the real model: no input stands for an image that is not there."""
    (found,) = drawn(asked(model, tmp_path))
    plain = of_text(found, 0)
    ids = torch.tensor(plain.tokens_WT)
    logits = load_seeing(model)(input_ids=ids).logits
    for row, (_, alone) in enumerate(passes(load_seeing(model), plain)):
        assert torch.allclose(logits[row], alone, atol=1e-4)


def refused(given: dict[str, Any]) -> UserError:
    with pytest.raises(UserError) as caught:
        compress(Recipe.parse(given))
    assert not Path(given["output"]["uri"]).exists()
    return caught.value


def test_wrong_combinations_are_refused(model: Path, desk: Desk, tmp_path: Path) -> None:
    given = asked(model, tmp_path)
    error = refused(given | {"model": {"source": str(save_tiny("llama", tmp_path / "blind"))}})
    assert error.key == "calibration.data.1.images" and "a model of text alone" in error.problem
    error = refused(given | {"method": "mi+linear"})
    assert error.key == "fusion.start" and "images" in error.problem
    plain = given["calibration"]["data"][0] | {"images": True}
    error = refused(asked(model, tmp_path, {"data": [plain, given["calibration"]["data"][1]]}))
    assert error.key == "calibration.data.0" and "JSON Lines, JSON or Parquet" in error.fix
    healed = given["calibration"] | {"data": given["calibration"]["data"][0]["data"]}
    heal = {"batch": 2, "held_out": 2, "data": [plain]}
    error = refused(asked(model, tmp_path, healed, heal=heal))
    assert error.key == "heal.data.0" and "JSON Lines, JSON or Parquet" in error.fix
    with pytest.raises(UserError, match="rows of text name no images") as caught:
        Recipe.parse(asked(model, tmp_path, healed | {"image_folder": str(tmp_path)}))
    assert caught.value.key == "calibration.image_folder"
    with pytest.raises(UserError, match="the calibration has no images") as caught:
        Recipe.parse(asked(model, tmp_path, healed, importance={"tokens": "image", "windows": 4}))
    assert caught.value.key == "importance.tokens"
    written = [given["calibration"]["data"][1], {"generate": True, "images": True}]
    with pytest.raises(UserError) as caught:
        Recipe.parse(asked(model, tmp_path, {"data": written}))
    assert caught.value.key == "calibration.data.1"
    assert "text that the model writes has no images" in caught.value.problem


def test_texts_of_conversations_are_looked_at_in_the_plan(model: Path, tmp_path: Path) -> None:
    given = asked(model, tmp_path)
    assert mistakes(Recipe.parse(given), Display()) == []
    write_lines(tmp_path / "seen.jsonl", [{"conversations": "none"}])
    write_lines(tmp_path / "held" / "out.jsonl", [{"text": "no conversation"}])
    found = mistakes(Recipe.parse(given), Display())
    assert [each.key for each in found] == ["calibration.data.1", "evaluation.chats.data"]
