"""Ray Data's token stream is the one-process stream, on any number of CPUs, and carries a user's
mistakes home.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fusegpt_ray.distributed import text as distributed_text
from fusegpt_ray.errors import UserError
from fusegpt_ray.recipe.text_sections import Text
from fusegpt_ray.text import calibration
from fusegpt_ray.text.calibration import consecutive_windows, sample_windows

pytestmark = pytest.mark.integration

KEY = "calibration.data"
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module", params=[1, 2])
def cluster(request: pytest.FixtureRequest, ray_session: None) -> Iterator[None]:
    """So many of the shared Ray's CPUs for Ray Data."""
    context = ray.data.DataContext.get_current().copy()
    context.execution_options.resource_limits = ray.data.ExecutionResources(cpu=request.param)
    with ray.data.DataContext.current(context):
        yield


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(EXAMPLES / "tiny-llama")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Text:
    """Files of very different sizes: two are many pieces, most less than one, some are empty."""
    folder = tmp_path_factory.mktemp("corpus")
    text = (EXAMPLES / "text" / "calibration.txt").read_text(encoding="utf-8")
    (folder / "a.txt").write_text(text[:300_000])
    (folder / "b.txt").write_text("")
    for n in range(10):
        (folder / f"c{n:02}.txt").write_text(text[n * 100 : n * 200])
    (folder / "d.txt").write_text(text[300_000:])
    return Text(data=str(folder / "*.txt"))


@pytest.mark.parametrize("piece_bytes", [50_000, 10_000_000])
def test_the_stream_is_that_of_one_process(cluster, corpus, tokenizer, piece_bytes):
    expected = list(calibration.token_stream(corpus, piece_bytes, tokenizer, KEY)())
    stream = distributed_text.token_stream(corpus, piece_bytes, tokenizer, KEY)
    got = list(stream())
    assert [len(tokens) for tokens in got] == [len(tokens) for tokens in expected]
    assert all(np.array_equal(one, other) for one, other in zip(got, expected, strict=True))
    assert all(tokens.dtype == np.int32 for tokens in got)
    # Reading again gives the same, and windows cut from it are the same.
    alone = calibration.token_stream(corpus, piece_bytes, tokenizer, KEY)
    assert np.array_equal(
        sample_windows(stream, 16, 64, 3, KEY), sample_windows(alone, 16, 64, 3, KEY)
    )


@pytest.mark.parametrize("cluster", [2], indirect=True)
def test_pieces_of_one_file_are_tokenised_side_by_side_and_arrive_in_order(
    cluster, tmp_path, tokenizer
):
    def first_waits_for_last(piece: str, **options: Any) -> Any:
        if piece == "piece 9\n":
            (tmp_path / "last").touch()
        deadline = time.monotonic() + 60
        while piece == "piece 0\n" and not (tmp_path / "last").exists():
            assert time.monotonic() < deadline, "the last piece waits for the first"
            time.sleep(0.05)
        return tokenizer(piece, **options)

    lines = [f"piece {n}\n" for n in range(10)]
    (tmp_path / "one.txt").write_text("".join(lines))
    stream = distributed_text.token_stream(
        Text(data=str(tmp_path / "one.txt")), len(lines[0]), first_waits_for_last, KEY
    )
    assert [tokenizer.decode(tokens) for tokens in stream()] == lines


def test_reading_may_stop_early(cluster, corpus, tokenizer):
    stream = distributed_text.token_stream(corpus, 5_000, tokenizer, KEY)
    alone = calibration.token_stream(corpus, 5_000, tokenizer, KEY)
    expected = consecutive_windows(alone, 64, 3, KEY)
    for _ in range(3):
        assert np.array_equal(consecutive_windows(stream, 64, 3, KEY), expected)


def test_the_callers_settings_stay(cluster, corpus, tokenizer):
    context = ray.data.DataContext.get_current()
    before = context.copy()
    next(distributed_text.token_stream(corpus, 20_000, tokenizer, KEY)())
    assert ray.data.DataContext.get_current() is context
    assert context.execution_options.resource_limits == before.execution_options.resource_limits
    assert context.execution_options.preserve_order == before.execution_options.preserve_order
    assert context.target_max_block_size == before.target_max_block_size
    assert context.enable_progress_bars == before.enable_progress_bars


def test_a_users_mistake_comes_home_in_its_place(cluster, tmp_path, tokenizer):
    (tmp_path / "1.txt").write_text("fine\n" * 10_000)
    (tmp_path / "2.txt").write_bytes(b"fine\n" * 10_000 + b"\xff")
    (tmp_path / "3.txt").write_bytes(b"\xff")
    text = Text(data=str(tmp_path / "*.txt"))
    arrived, expected = [], []
    with pytest.raises(UserError) as alone:
        expected.extend(calibration.token_stream(text, 20_000, tokenizer, KEY)())
    with pytest.raises(UserError, match="not UTF-8") as caught:
        arrived.extend(distributed_text.token_stream(text, 20_000, tokenizer, KEY)())
    assert type(caught.value) is UserError
    assert str(caught.value) == str(alone.value)
    assert caught.value.key == KEY
    assert str(tmp_path / "2.txt") in caught.value.value
    assert [len(tokens) for tokens in arrived] == [len(tokens) for tokens in expected]
    assert len(arrived) == 5


def test_a_missing_file_is_found_before_anything_runs(cluster, tmp_path, tokenizer):
    missing = Text(data=str(tmp_path / "missing.txt"))
    with pytest.raises(UserError, match="no such file"):
        distributed_text.token_stream(missing, 20_000, tokenizer, KEY)
