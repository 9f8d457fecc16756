"""Windows that share no token: to train on, and held out."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from desk import LENGTH, Desk, random_text
from hypothesis import given, settings
from hypothesis import strategies as st

from fusegpt_ray.errors import UserError
from fusegpt_ray.planning.plan import plan
from fusegpt_ray.preparing.windows import all_windows
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.recipe.text_sections import Texts
from fusegpt_ray.run.shared import Shared
from fusegpt_ray.terminal.display import Display
from fusegpt_ray.text import calibration
from fusegpt_ray.text.calibration import Stream
from fusegpt_ray.text.fresh import fresh_windows
from fusegpt_ray.text.protocol import described
from fusegpt_ray.text.windows import Windows
from fusegpt_ray.workers.local import LocalWorkers

FAR = 100_000


class Corpus:
    """A text whose tokens tell their text and their place, and how often it was read."""

    def __init__(self, number: int, tokens: int, piece: int = 13) -> None:
        first = FAR * (number + 1)
        self.tokens = np.arange(first, first + tokens, dtype=np.int32)
        self.pieces = np.split(self.tokens, range(piece, tokens, piece))
        self.readings = 0

    def __call__(self) -> list[np.ndarray]:
        self.readings += 1
        return self.pieces


def texts(*weights: float) -> Texts:
    if len(weights) == 1:
        return Texts(data="0.txt")
    parts = [{"data": f"{n}.txt", "weight": weight} for n, weight in enumerate(weights)]
    return Texts.model_validate({"data": parts})


def fresh(streams: list[Stream], weights: tuple[float, ...], **asked: Any) -> tuple[Windows, ...]:
    usual = {"windows": 12, "held_out": 4, "length": 10, "seed": 3, "repeat": False, "bos": None}
    return fresh_windows(streams, texts(*weights), **usual | asked, key="heal")


def cells(windows: Windows, width: int) -> list[tuple[int, int]]:
    """(text, number of the consecutive window) of each, once it is found to be one."""
    texts_WT = windows.tokens_WT[:, -width:]
    assert (np.diff(texts_WT) == 1).all()
    starts_W = texts_WT[:, 0] % FAR
    assert (starts_W % width == 0).all()
    return list(zip(texts_WT[:, 0] // FAR - 1, starts_W // width, strict=True))


@settings(deadline=None)
@given(
    weights=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    windows=st.integers(16, 40),
    held_out=st.integers(0, 9),
    length=st.integers(2, 12),
    bos=st.sampled_from([None, 7]),
    seed=st.integers(0, 9),
    many=st.booleans(),
)
def test_no_token_is_in_two_windows(
    weights: list[int],
    windows: int,
    held_out: int,
    length: int,
    bos: int | None,
    seed: int,
    many: bool,
) -> None:
    corpora = [Corpus(number, 50 * length) for number in range(len(weights))]
    asked = {"windows": windows, "held_out": held_out, "length": length, "bos": bos, "seed": seed}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "HELD_TOKENS", 10 if many else 10**6)
        train, held = fresh(corpora, tuple(weights), **asked)
    assert {corpus.readings for corpus in corpora} == {2 if many else 1}
    assert train.tokens_WT.shape == (windows, length) and held.tokens_WT.shape == (held_out, length)
    assert train.tokens_WT.dtype == held.tokens_WT.dtype == np.int64
    width = length - (bos is not None)
    if bos is not None:
        assert (train.tokens_WT[:, 0] == bos).all() and (held.tokens_WT[:, 0] == bos).all()
    found = cells(train, width) + cells(held, width)
    assert len(set(found)) == len(found) == windows + held_out
    for part, wanted in ((train, windows), (held, held_out)):
        counts = Counter(text for text, _ in cells(part, width))
        for number, weight in enumerate(weights):
            assert abs(counts[number] - wanted * weight / sum(weights)) < 1


def test_they_are_in_no_order_and_mixed() -> None:
    train, held = fresh([Corpus(0, 5000), Corpus(1, 5000)], (1, 1), windows=80, held_out=20)
    for windows in (train, held):
        order = [text for text, _ in cells(windows, 10)]
        assert order == windows.text_W.tolist()
        for start in range(0, len(order), 10):
            assert 3 <= sum(order[start : start + 10]) <= 7
        places = [place for text, place in cells(windows, 10) if text == 0]
        assert places != sorted(places) and max(places) > 250 > min(places)


def test_the_seed_decides() -> None:
    def drawn(seed: int) -> bytes:
        windows = fresh([Corpus(0, 900), Corpus(1, 900)], (1, 1), seed=seed)
        return b"".join(each.tokens_WT.tobytes() for each in windows)

    assert drawn(1) == drawn(1) and drawn(1) != drawn(2)


@pytest.mark.parametrize("bos", [None, 7])
@pytest.mark.parametrize(("seen", "shared"), [(30, False), (200, True)])
def test_what_is_held_out_was_not_seen_before(bos: int | None, seen: int, shared: bool) -> None:
    """Of a text of 500 tokens 200 windows leave nothing over: then it is held out all the same."""
    text = Corpus(1, 500)
    width = 10 - (bos is not None)
    starts = np.array(calibration.window_starts(500, seen, 10, 3))
    trained, held = fresh([Corpus(0, 500), text], (1, 1), bos=bos, seen={1: starts}, held_out=8)
    known = {FAR * 2 + start + place for start in starts.tolist() for place in range(width)}
    rows = held.tokens_WT[held.text_W == 1, -width:]
    count = sum(token in known for token in rows.flatten().tolist())
    assert (count > 0.8 * rows.size) if shared else (count == 0)
    both = cells(trained, width) + cells(held, width)
    assert len(set(both)) == len(both) == 20
    # Nothing changes in a text that was not seen, nor where nothing was.
    plain, out = fresh([Corpus(0, 500), text], (1, 1), bos=bos, held_out=8)
    for one, other in ((trained, plain), (held, out)):
        assert np.array_equal(one.tokens_WT[one.text_W == 0], other.tokens_WT[other.text_W == 0])
    taken = sum(token in known for token in out.tokens_WT[out.text_W == 1, -width:].flatten())
    assert taken > 0


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("pack", [False, True])
def test_a_run_holds_out_what_its_rounds_have_not_seen(pack: bool, named: bool, desk: Desk) -> None:
    """`named`: `heal` names the calibration's text itself."""
    text = random_text(600, seed=1)
    file = desk.folder / "text.jsonl"
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in text.splitlines()))
    section = {"data": str(file), "windows": 12, "length": LENGTH, "pack": pack, "bos": "never"}
    heal = {"batch": 4, "held_out": 16, "tokens": 16 * LENGTH}
    heal |= {"data": str(file)} if named else {}
    planned = plan(Recipe.parse(desk.recipe(calibration=section, heal=heal)), Display())
    with LocalWorkers(planned.setup) as workers:
        given = (workers, planned.recipe, planned.leading, Display(), Shared())
        drawn, _, healing = all_windows(*given)
    assert healing is not None
    calibrated, healed, held = (
        {tuple(row[at : at + 6]) for row in each.tokens_WT.tolist() for at in range(LENGTH - 5)}
        for each in (drawn, *healing)
    )  # no six random words in a row are twice in a text of 600
    assert not held & calibrated and not held & healed and calibrated & healed


def test_what_is_held_out_does_not_depend_on_how_much_is_trained() -> None:
    few, many = (fresh([Corpus(0, 900)], (1,), windows=n)[1] for n in (8, 64))
    assert few.tokens_WT.tolist() == many.tokens_WT.tolist()


@pytest.mark.parametrize("held", [10**6, 10])
def test_repeated_windows_are_cycled_through(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "HELD_TOKENS", held)
    corpus = Corpus(0, 109)  # 10 windows, and a rest
    train, kept = fresh([corpus], (1,), windows=21, repeat=True)
    used = [place for _, place in cells(train, 10)]
    held_out = {place for _, place in cells(kept, 10)}
    assert len(held_out) == 4 and not held_out & set(used)
    cycles = [used[start : start + 6] for start in range(0, 21, 6)]
    assert all(len(set(cycle)) == len(cycle) for cycle in cycles)
    assert {*cycles[0]} == {*cycles[1]} == {*cycles[2]} == {*range(10)} - held_out
    assert len({tuple(cycle) for cycle in cycles[:3]}) == 3
    assert corpus.readings == (1 if held > 10 else 2)

    about = {"data": "0.txt", "windows": 21, "length": 10, "bos": False}
    assert train.protocol == about | {"repeated": 3.5}
    assert kept.protocol == about | {"windows": 4}
    token = "without a beginning-of-sequence token"
    assert described(train.protocol) == (
        f"21 windows of 10 tokens of 0.txt, each 3.5 times, {token}"
    )
    assert "repeated" not in train.first(6).protocol


def test_only_the_short_text_of_a_mixture_is_repeated() -> None:
    train, kept = fresh([Corpus(0, 500), Corpus(1, 40)], (1, 1), repeat=True)
    first = {"data": "0.txt", "windows": 6}
    assert train.protocol["parts"] == [first, {"data": "1.txt", "windows": 6, "repeated": 3.0}]
    assert [part["windows"] for part in kept.protocol["parts"]] == [2, 2]
    assert not set(cells(kept, 10)) & set(cells(train, 10))
    assert "(6 of 0.txt; 6 of 1.txt, each 3 times)" in described(train.protocol)


def test_enough_text_is_not_repeated() -> None:
    with_it, without = (fresh([Corpus(0, 160)], (1,), repeat=repeat) for repeat in (True, False))
    for one, other in zip(with_it, without, strict=True):
        assert one.tokens_WT.tobytes() == other.tokens_WT.tobytes()
        assert one.protocol == other.protocol and "repeated" not in one.protocol


@pytest.mark.parametrize(
    ("weights", "tokens", "name", "there", "most"),
    [
        ((1,), [159], "heal.data", 15, 110),
        ((3, 1), [400, 39], "heal.data.1", 3, 80),  # 2 are left of one in four
    ],
)
def test_too_little_text(
    weights: tuple[float, ...], tokens: list[int], name: str, there: int, most: int
) -> None:
    corpora = [Corpus(number, count) for number, count in enumerate(tokens)]
    with pytest.raises(UserError) as caught:
        fresh(corpora, weights)
    error = caught.value
    assert (error.key, error.value) == ("heal.tokens", 120)
    assert f"{name} has {tokens[-1]} tokens, which are {there} windows of 10" in error.problem
    assert f"at most {most}, give more text in {name}, or set heal.repeat: true" in error.fix
    fresh(corpora, weights, windows=most // 10)
    with pytest.raises(UserError, match=r"heal\.tokens"):
        fresh(corpora, weights, windows=12)
    with pytest.raises(UserError) as caught:
        fresh(corpora, weights, tokens=127)
    assert caught.value.value == 127, "the number that was written, not the windows' tokens"
    fresh(corpora, weights, repeat=True)


@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize("tokens", [0, 9, 49])
def test_a_text_that_is_held_out_whole(tokens: int, repeat: bool) -> None:
    with pytest.raises(UserError, match="left to train on") as caught:
        fresh([Corpus(0, tokens)], (1,), repeat=repeat)
    assert (caught.value.key, caught.value.value) == ("heal.data", "0.txt")
    assert caught.value.fix == "give more text in heal.data, or lower heal.held_out"


def test_a_weight_that_comes_to_nothing() -> None:
    corpora = [Corpus(0, 900), Corpus(1, 900)]
    with pytest.raises(UserError, match=r"heal\.tokens") as caught:
        fresh(corpora, (99, 1))
    assert caught.value.key == "heal.data.1.weight"
    # Of the few that are held out, a text may have none.
    _, held = fresh(corpora, (11, 1), held_out=2)
    assert [part["windows"] for part in held.protocol["parts"]] == [2, 0]
