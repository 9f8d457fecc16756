"""Windows of several texts: each one's share, where they stand, and what is told of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from desk import LENGTH, Desk, random_text
from hypothesis import given
from hypothesis import strategies as st
from mistakes import Bad, check, table
from recipes import recipe

from fusegpt_ray.cli import main
from fusegpt_ray.errors import UserError
from fusegpt_ray.recipe.sections import Calibration
from fusegpt_ray.recipe.text_sections import WeightedText
from fusegpt_ray.text import calibration
from fusegpt_ray.text.calibration import Stream, sample_windows
from fusegpt_ray.text.mixture import (
    apportioned,
    calibration_windows,
    data_keys,
    interleaved,
    opened,
    shares,
)
from fusegpt_ray.text.protocol import described, warnings
from fusegpt_ray.text.windows import FARTHEST

KEY = "calibration"


def several(*weights: float) -> list[dict[str, Any]]:
    return [{"data": f"{n}.txt", "weight": weight} for n, weight in enumerate(weights)]


def mixture(*weights: float, **keys: Any) -> Calibration:
    return recipe(
        calibration={"data": several(*weights), **keys}, importance={"windows": 1}, method="mi"
    ).calibration


def numbered(number: int, tokens: int = 1000) -> Stream:
    """Tokens that tell their text and their place."""
    first = 10_000 * (number + 1)
    return lambda: np.split(np.arange(first, first + tokens, dtype=np.int32), [7, tokens // 2])


# --- how many of each, and where ---


@pytest.mark.parametrize(
    ("weights", "windows", "counts"),
    [
        ((3, 1), 1024, [768, 256]),
        ((1, 1, 1), 8, [3, 3, 2]),
        ((0.5, 0.25, 0.25), 10, [5, 3, 2]),
        ((5, 3, 1), 10, [6, 3, 1]),  # 5.56, 3.33 and 1.11
        ((1e308, 1e308), 4, [2, 2]),
        ((2,), 5, [5]),
    ],
)
def test_shares_by_largest_remainder(
    weights: tuple[float, ...], windows: int, counts: list[int]
) -> None:
    assert shares(mixture(*weights), windows, KEY, f"{KEY}.windows") == counts


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(0, 500))
def test_shares_are_within_one_of_what_is_due(weights: list[float], windows: int) -> None:
    parts = [WeightedText(data=str(n), weight=weight) for n, weight in enumerate(weights)]
    counts = apportioned(parts, windows)
    assert sum(counts) == windows
    for weight, count in zip(weights, counts, strict=True):
        due = windows * Fraction(weight) / sum(map(Fraction, weights))
        assert abs(count - due) < 1


def test_a_share_of_none_is_a_mistake() -> None:
    with pytest.raises(UserError, match="share of 8 windows rounds to none") as caught:
        shares(mixture(100, 1), 8, KEY, f"{KEY}.windows")
    assert (caught.value.key, caught.value.value) == ("calibration.data.1.weight", 1)
    assert "raise it, or calibration.windows" in caught.value.fix
    with pytest.raises(UserError, match=r"raise it, or heal\.tokens"):
        shares(mixture(100, 1), 8, "heal", "heal.tokens")


@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.integers(0, 99))
def test_every_stretch_sees_the_mixture(counts: list[int], seed: int) -> None:
    order = interleaved(counts, seed)
    assert order.tolist() == interleaved(counts, seed).tolist()
    total = len(order)
    assert np.bincount(order, minlength=len(counts)).tolist() == counts
    for first in range(total + 1):
        for number, count in enumerate(counts):
            due = first * count / total if total else 0
            found = np.count_nonzero(order[:first] == number)
            assert abs(found - due) < 1 + len(counts) * count / max(1, total)


def test_another_seed_is_another_order() -> None:
    orders = {tuple(interleaved([50, 50], seed).tolist()) for seed in range(5)}
    assert len(orders) == 5


# --- the windows ---


@pytest.mark.parametrize("bos", [None, 1])
@pytest.mark.parametrize("held", [10**6, 10])
def test_a_single_text_is_what_it_was(
    bos: int | None, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "HELD_TOKENS", held)
    text = Calibration(data="a.txt", windows=24, length=9, seed=5)
    found = calibration_windows([numbered(0)], text, bos, KEY)
    alone = sample_windows(numbered(0), 24, 9, 5, "calibration.data", bos)
    assert found.tokens_WT.tobytes() == alone.tobytes() and found.tokens_WT.dtype == np.int64
    protocol = {"data": "a.txt", "windows": 24, "length": 9, "bos": bos is not None}
    seen = round(24 * (9 - (bos is not None)) / 1000, 3)
    assert found.protocol == protocol | {"text_tokens": 1000, "times_seen": seen}
    listed = text.model_copy(update={"data": (WeightedText(data="a.txt", weight=7),)})
    again = calibration_windows([numbered(0)], listed, bos, KEY)
    assert again.tokens_WT.tobytes() == alone.tobytes() and again.protocol == found.protocol


@pytest.mark.parametrize("bos", [None, 1])
def test_each_text_gives_its_windows(bos: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    text = mixture(3, 1, windows=64, length=9, seed=2)
    drawn = calibration_windows([numbered(0), numbered(1)], text, bos, KEY)
    place_WT, begin = drawn.place_WT, 0 if bos is None else 1
    assert (place_WT[:, :begin] < 0).all()
    stands_WT = drawn.tokens_WT % 10_000 + np.where(drawn.text_W, FARTHEST, 0)[:, None]
    assert place_WT[:, begin:].tolist() == stands_WT[:, begin:].tolist()
    assert drawn.first(5).place_WT.tolist() == place_WT[:5].tolist()
    source_W = drawn.tokens_WT[:, -1] // 10_000 - 1
    assert source_W.tolist() == drawn.text_W.tolist()
    assert Counter(source_W.tolist()) == {0: 48, 1: 16}
    assert (np.diff(drawn.tokens_WT[:, begin:]) == 1).all()  # each a stretch of its text
    assert bos is None or (drawn.tokens_WT[:, 0] == bos).all()
    first = sample_windows(numbered(0), 48, 9, 2, KEY, bos)  # the first text by the recipe's seed
    assert drawn.tokens_WT[source_W == 0].tolist() == first.tolist()
    places = drawn.tokens_WT[:, -1] % 10_000
    assert places[source_W == 1].tolist() != places[source_W == 0][:16].tolist()

    monkeypatch.setattr(calibration, "HELD_TOKENS", 10)
    again = calibration_windows([numbered(0), numbered(1)], text, bos, KEY)
    assert again.tokens_WT.tobytes() == drawn.tokens_WT.tobytes()
    other = text.model_copy(update={"seed": 3})
    changed = calibration_windows([numbered(0), numbered(1)], other, bos, KEY)
    assert changed.tokens_WT.tobytes() != drawn.tokens_WT.tobytes()


def test_the_same_text_under_two_names_gives_other_windows() -> None:
    drawn = calibration_windows([numbered(0)] * 2, mixture(1, 1, windows=40, length=9), None, KEY)
    one, other = (drawn.tokens_WT[drawn.text_W == number].tolist() for number in (0, 1))
    assert one != other


def test_each_text_is_asked_for_by_its_own_key() -> None:
    asked = []

    def tokens(text: WeightedText, key: str) -> Stream:
        asked.append((text.data, key))
        return numbered(0)

    assert len(opened(tokens, mixture(1, 2), KEY)) == 2
    assert asked == [("0.txt", "calibration.data.0"), ("1.txt", "calibration.data.1")]
    assert data_keys(Calibration(data="a.txt"), "heal") == ["heal.data"]


def test_a_text_that_changes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "HELD_TOKENS", 10)
    sizes = iter([100, 99])

    def shrinking() -> Iterator[np.ndarray]:
        yield np.arange(next(sizes))

    text = mixture(1, 1, windows=4, length=9)
    with pytest.raises(RuntimeError, match=r"calibration\.data\.1: first 100 tokens, then 99"):
        calibration_windows([numbered(0), shrinking], text, None, KEY)


# --- what is told ---


def test_the_protocol_names_each_text() -> None:
    text = mixture(3, 1, windows=64, length=9)
    drawn = calibration_windows([numbered(0), numbered(1, 50)], text, None, KEY)
    warning = "16 windows of 9 tokens from a text of 50 tokens: each token is seen about 3 times"
    rare = {"data": "0.txt", "windows": 48, "text_tokens": 1000, "times_seen": 0.432}
    often = {"data": "1.txt", "windows": 16, "text_tokens": 50, "times_seen": 2.88}
    often |= {"warning": f"{warning}; use a longer text"}
    protocol = {"data": "0.txt + 1.txt", "windows": 64, "length": 9, "bos": False}
    assert drawn.protocol == protocol | {"parts": [rare, often]}
    assert json.loads(json.dumps(drawn.protocol)) == drawn.protocol
    assert warnings(drawn.protocol) == [f"1.txt: {warning}; use a longer text"]
    said = "64 windows of 9 tokens (48 of 0.txt; 16 of 1.txt), without a beginning-of-sequence"
    assert described(drawn.protocol) == f"{said} token"
    part = drawn.first(32)
    counts = [about["windows"] for about in part.protocol["parts"]]
    assert sum(counts) == 32 and abs(counts[1] - 8) <= 2
    assert np.array_equal(part.tokens_WT, drawn.tokens_WT[:32])


def desk_with_two(desk: Desk, **keys: Any) -> dict[str, Any]:
    """The calibration section of a recipe for both of the desk's texts."""
    rows = "".join(json.dumps({"body": random_text(50, seed=seed)}) + "\n" for seed in range(4))
    (desk.folder / "more.jsonl").write_text(rows)
    texts = [{"data": "calibration.txt", "weight": 3}, {"data": "more.jsonl", "column": "body"}]
    return desk.recipe()["calibration"] | {"data": texts} | keys


def test_a_whole_run_on_a_mixture(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    written = desk.write(calibration=desk_with_two(desk))
    assert main(["compress", written]) == 0
    said, folder = capsys.readouterr().err, desk.out / "demo-p40"
    manifest = json.loads((folder / "fusegpt.json").read_text())
    assert [part["windows"] for part in manifest["calibration"]["parts"]] == [6, 2]
    assert manifest["recipe"]["calibration"]["data"][1]["column"] == "body"
    unknown = "(licence: not stated)"
    texts = f"6 of calibration.txt {unknown}; 2 of more.jsonl {unknown}"
    line = f"8 windows of {LENGTH} tokens ({texts}), without"
    assert f"calibration: {line}" in said
    assert f"Calibration: {line}" in (folder / "README.md").read_text()
    assert main(["compress", written]) == 0  # the same recipe is the same run
    assert "has published everything" in capsys.readouterr().err
    assert main(["score", written, "--json"]) == 0
    assert sum(part["windows"] for part in json.loads(capsys.readouterr().out)["parts"]) == 4


MISTAKES = {
    "missing": ({"data": "no.txt"}, "calibration.data.1", "no.txt", "no such file", "path or glob"),
    "column": (
        {"data": "more.jsonl", "column": "boby"},
        "calibration.data.1.column",
        "boby",
        "no such column",
        "body",
    ),
    "short": (
        {"data": "short.txt"},
        "calibration.length",
        str(LENGTH),
        "has 2 tokens",
        r"more text in calibration\.data\.1",
    ),
    "light": (
        {"data": "heldout.txt", "weight": 0.01},
        "calibration.data.1.weight",
        "0.01",
        "share of 8 windows rounds to none",
        r"raise it, or calibration\.windows",
    ),
}


@table([Bad(name, lambda desk: None, *said) for name, (_, *said) in MISTAKES.items()])
def test_a_mistake_in_one_of_several_texts(
    bad: Bad, desk: Desk, weight_reads: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    section = desk_with_two(desk)
    (desk.folder / "short.txt").write_text("w5 w6")
    section["data"] = [{"data": "calibration.txt"}, MISTAKES[bad.name][0]]
    written = desk.write(calibration=section)
    check(replace(bad, make=lambda desk: ["compress", written]), desk, weight_reads, capsys)
