"""Text to token windows, deterministic and without ever holding a corpus in memory.

Notable:
- the paper's recipe (its WikiText-2 code): join the rows by a blank line, tokenise once, cut `random.Random(seed)`
  windows. Each file is joined and tokenised on its own, and the files' tokens are concatenated;
- tokenising once does not stream, so a long text is cut into *pieces* at row (else line) boundaries, and each piece is
  one call of the tokenizer. A text of at most `piece_bytes` is one piece: exactly the paper's recipe.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from fusegpt_ray.errors import UserError
from fusegpt_ray.sections import Text
from fusegpt_ray.text.corpus import pieces, sources
from fusegpt_ray.text.formats import beside

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELD_TOKENS = 64_000_000
"""So many tokens (256 MB) are kept between counting them and cutting windows; a longer text is tokenised twice."""


def tokenize(piece: str, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Token ids of one piece, int32 [tokens], without special tokens, by one call of the tokenizer."""
    # verbose=False: pieces are longer than the model's context on purpose, which the tokenizer would warn about.
    encoded = tokenizer(piece, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return np.array(encoded["input_ids"], dtype=np.int32)


def token_stream(text: Text, piece_bytes: int, tokenizer: PreTrainedTokenizerBase, key: str) -> Callable[[], Iterator[np.ndarray]]:
    """A function that reads the text from its beginning and yields the tokens of each piece, int32 [tokens].

    Raises:
        UserError: as `sources`, at once; as `pieces`, while the tokens are drawn.
    """
    found = sources(text, key)
    return lambda: (tokenize(piece, tokenizer) for source in found for piece in pieces(source, piece_bytes))


def window_starts(n_tokens: int, windows: int, length: int, seed: int) -> list[int]:
    """First token of each window, exactly as the paper's code draws them; needs `n_tokens` > `length`."""
    draw = random.Random(seed)
    return [draw.randint(0, n_tokens - length - 1) for _ in range(windows)]


def sample_windows(stream: Callable[[], Iterable[np.ndarray]], windows: int, length: int, seed: int, key: str) -> np.ndarray:
    """Random windows of the concatenated tokens, int64 [windows, length], in the order of `window_starts`.

    `stream()` yields the tokens piece by piece, from the beginning at each call. It is called once, or twice if there
    are more than `HELD_TOKENS` tokens.

    Raises:
        UserError: fewer than `length` + 1 tokens.
    """
    held: list[np.ndarray] | None = []
    n_tokens = 0
    for tokens in stream():
        n_tokens += len(tokens)
        if n_tokens > HELD_TOKENS:
            held = None
        if held is not None:
            held.append(tokens)
    if n_tokens < length + 1:
        raise _too_short(key, length, n_tokens, length + 1)
    starts = window_starts(n_tokens, windows, length, seed)
    sampled = np.empty((windows, length), dtype=np.int64)
    first = 0
    for tokens in stream() if held is None else held:
        end = first + len(tokens)
        for window, start in zip(sampled, starts, strict=True):
            low, high = max(start, first), min(start + length, end)
            if low < high:
                window[low - start : high - start] = tokens[low - first : high - first]
        first = end
    if first != n_tokens:
        raise RuntimeError(f"{key}: first {n_tokens} tokens, then {first}: the text changed while it was read")
    return sampled


def consecutive_windows(stream: Callable[[], Iterable[np.ndarray]], length: int, limit: int | None, key: str) -> np.ndarray:
    """The text as windows one after another, int64 [n, length]: at most `limit`, and no incomplete one at the end.

    Raises:
        UserError: fewer than `length` tokens.
    """
    held: list[np.ndarray] = []
    n_tokens = 0
    for tokens in stream():
        held.append(tokens)
        n_tokens += len(tokens)
        if limit is not None and n_tokens >= limit * length:
            break
    if n_tokens < length:
        raise _too_short(key, length, n_tokens, length)
    n = n_tokens // length if limit is None else min(limit, n_tokens // length)
    return np.concatenate(held)[: n * length].astype(np.int64).reshape(n, length)


def fingerprint(windows: np.ndarray) -> str:
    """SHA-256 of the windows' bytes, in hex: equal for the same text, tokenizer, length and seed."""
    return hashlib.sha256(windows.tobytes()).hexdigest()


def _too_short(key: str, length: int, found: int, needed: int) -> UserError:
    problem = f"the text has {found} tokens, and windows of this length need {needed}"
    return UserError(beside(key, "length"), length, problem, f"give more text in {key}, or lower the length")
