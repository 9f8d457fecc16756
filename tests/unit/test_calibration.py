"""Windows of text, checked against the formula: join everything, tokenise once, slice."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from texts import KEY, LARGE, write_jsonl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fusegpt_ray.errors import UserError
from fusegpt_ray.recipe.text_sections import Text
from fusegpt_ray.samples import fingerprint
from fusegpt_ray.text import calibration
from fusegpt_ray.text.calibration import (
    consecutive_windows,
    sample_windows,
    token_stream,
    tokenize,
    window_starts,
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte; it would add `<s>` if asked to, and its model_max_length is far below a
    piece.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(alphabet)} | {"<s>": 256}, merges=[])
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 256)]
    )
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", model_max_length=8)


def test_tokenize_is_one_quiet_call_without_special_tokens(tokenizer, caplog, capfd):
    tokens = tokenize("héllo " * 50, tokenizer)
    assert tokens.dtype == np.int32
    assert tokenizer.decode(tokens) == "héllo " * 50
    assert len(tokens) == len("héllo ".encode()) * 50
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


def test_windows_are_the_papers(tmp_path, tokenizer):
    """Join the rows, tokenise once, and slice where random.Random(seed) says."""
    rows = [f"row {n} of the corpus, 漢字\n" for n in range(40)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    ids = tokenizer("\n\n".join(rows), add_special_tokens=False)["input_ids"]
    draw, expected = random.Random(7), []
    for _ in range(20):
        start = draw.randint(0, len(ids) - 16 - 1)
        expected.append(ids[start : start + 16])
    stream = token_stream(Text(data=str(tmp_path / "rows.jsonl")), LARGE, tokenizer, KEY)
    windows = sample_windows(stream, 20, 16, 7, KEY)
    assert windows.dtype == np.int64
    assert windows.tolist() == expected
    assert (
        fingerprint(windows)
        == hashlib.sha256(np.array(expected, dtype="<i8").tobytes()).hexdigest()
    )
    # With a byte a token the tokens do not depend on where the text is cut; windows then cross the
    # pieces.
    cut = token_stream(Text(data=str(tmp_path / "rows.jsonl")), 64, tokenizer, KEY)
    assert len(list(cut())) == 20
    assert sample_windows(cut, 20, 16, 7, KEY).tolist() == expected


def test_window_starts_leave_one_token_after_the_last_window():
    assert window_starts(12, 6, 8, seed=0) == [
        3,
        3,
        0,
        2,
        3,
        3,
    ]  # random.Random(0).randint(0, 3), six times
    assert set(window_starts(12, 200, 8, seed=1)) == {0, 1, 2, 3}
    assert set(window_starts(9, 5, 8, seed=2)) == {0}


def test_files_are_concatenated_token_by_token(tmp_path, tokenizer):
    (tmp_path / "1.txt").write_text("first")
    (tmp_path / "2.txt").write_text("second")
    stream = token_stream(Text(data=str(tmp_path / "*.txt")), LARGE, tokenizer, KEY)
    assert tokenizer.decode(np.concatenate(list(stream()))) == "firstsecond"


PIECES = st.lists(st.integers(0, 30), min_size=1, max_size=12)


@given(sizes=PIECES, windows=st.integers(1, 9), length=st.integers(2, 40), seed=st.integers(0, 99))
def test_windows_from_any_pieces_and_both_paths_are_slices(sizes, windows, length, seed):
    flat = np.arange(sum(sizes), dtype=np.int32)
    parts = np.split(flat, np.cumsum(sizes)[:-1])
    calls = []

    def stream():
        calls.append(1)
        yield from parts

    with pytest.MonkeyPatch.context() as patch:
        for held_tokens, passes in ((len(flat), 1), (len(flat) - 1, 2)):
            patch.setattr(calibration, "HELD_TOKENS", held_tokens)
            calls.clear()
            if len(flat) < length + 1:
                with pytest.raises(UserError):
                    sample_windows(stream, windows, length, seed, KEY)
                continue
            got = sample_windows(stream, windows, length, seed, KEY)
            starts = window_starts(len(flat), windows, length, seed)
            assert got.tolist() == [flat[start : start + length].tolist() for start in starts]
            assert len(calls) == passes

    n = len(flat) // length
    for limit in (None, 1, 2, 1000):
        if n:
            expected = flat[: min(n, limit or n) * length].reshape(-1, length)
            assert consecutive_windows(stream, length, limit, KEY).tolist() == expected.tolist()


def test_a_text_that_changes_between_two_readings_is_refused(monkeypatch):
    monkeypatch.setattr(calibration, "HELD_TOKENS", 1)
    readings = iter([[np.arange(9)], [np.arange(8)]])
    with pytest.raises(RuntimeError, match=r"calibration\.data: first 9 tokens, then 8"):
        sample_windows(lambda: next(readings), 1, 2, 0, KEY)


def test_consecutive_windows_stop_reading_at_the_limit():
    drawn = []

    def stream():
        for n in range(100):
            drawn.append(n)
            yield np.full(10, n, dtype=np.int32)

    windows = consecutive_windows(stream, 15, 2, KEY)
    assert windows.shape == (2, 15)
    assert windows.dtype == np.int64
    assert drawn == [0, 1, 2]


@pytest.mark.parametrize("found", [0, 8])
def test_too_little_text(found):
    def stream():
        return [np.arange(found)]

    with pytest.raises(UserError, match=rf"{found} tokens.*need 9.*calibration\.data") as caught:
        sample_windows(stream, 1, 8, 0, KEY)
    assert (caught.value.key, caught.value.value) == ("calibration.length", 8)
    with pytest.raises(
        UserError, match=rf"{found} tokens.*need 10.*evaluation\.wiki\.data"
    ) as caught:
        consecutive_windows(stream, 10, None, "evaluation.wiki.data")
    assert (caught.value.key, caught.value.value) == ("evaluation.wiki.length", 10)
