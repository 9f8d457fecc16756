"""Text to token windows, deterministic and without ever holding a corpus in memory.

Notable:
- the paper's recipe (its WikiText-2 code): join the rows by a blank line, tokenise once, cut
  `random.Random(seed)` windows. Each file is joined and tokenised on its own, and the files' tokens
  are concatenated;
- where windows begin with a beginning-of-sequence token, it is the first of their `length` tokens,
  and no special token is anywhere else;
- tokenising once does not stream, so a long text is cut into *pieces* at row (else line)
  boundaries, and each piece is one call of the tokenizer. A text of at most `piece_bytes` is one
  piece: exactly the paper's recipe.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fusegpt_ray.errors import UserError
from fusegpt_ray.recipe.sections import Bos
from fusegpt_ray.recipe.text_sections import Text
from fusegpt_ray.text.corpus import pieces, sources
from fusegpt_ray.text.formats import Source, beside, of_all

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Stream = Callable[[], Iterable[np.ndarray]]
"""Yields the tokens of a text piece by piece, int [tokens], from the beginning at each call."""
HELD_TOKENS = 64_000_000
"""So many tokens (256 MB) are kept between counting them and cutting windows; a longer text is
tokenised twice."""


def tokenize(piece: str, tokenizer: PreTrainedTokenizerBase, special: bool = False) -> np.ndarray:
    """Token ids of one piece, int32 [tokens], by one call of the tokenizer.

    `special`: with those that the tokenizer puts around a text by itself.
    """
    # verbose=False: pieces are longer than the model's context on purpose, which the tokenizer
    # would warn about.
    options = {"return_attention_mask": False, "verbose": False}
    encoded = tokenizer(piece, add_special_tokens=special, **options)
    return np.array(encoded["input_ids"], dtype=np.int32)


def leading_token(bos: Bos, tokenizer: PreTrainedTokenizerBase, key: str) -> int | None:
    """The id of the token that each window begins with: the beginning-of-sequence token, or none.

    `auto`: the one that the tokenizer itself puts before a text, if it does.

    Raises:
        UserError: `always`, and the tokenizer has none.
    """
    if bos == "never":
        return None
    token: int | None = tokenizer.bos_token_id
    if bos == "always":
        if token is None:
            problem = "the model's tokenizer has no beginning-of-sequence token"
            raise UserError(key, bos, problem, "use auto or never")
        return token
    return token if token is not None and tokenizer("x")["input_ids"][:1] == [token] else None


class Reading(NamedTuple):
    """How a text becomes tokens, a piece at a time."""

    pieces: Callable[[Source, int], Iterator[str]]
    """Of a source, of at most so many bytes where it is cut."""
    tokenize: Callable[[str, PreTrainedTokenizerBase, str], np.ndarray]
    """Token ids of a piece, int32 [tokens]; the last argument is the text's key, for messages."""


def _of_piece(piece: str, tokenizer: PreTrainedTokenizerBase, key: str) -> np.ndarray:
    return tokenize(piece, tokenizer)


PACKED = Reading(pieces, _of_piece)
"""Rows joined by blank lines."""


def token_stream(
    text: Text,
    piece_bytes: int,
    tokenizer: PreTrainedTokenizerBase,
    key: str,
    reading: Reading = PACKED,
) -> Callable[[], Iterator[np.ndarray]]:
    """A function that reads the text from its beginning and yields the tokens of each piece, int32
    [tokens].

    Raises:
        UserError: as `sources`, at once; as `pieces`, while the tokens are drawn.
    """
    found = sources(text, key, reading.pieces)
    return lambda: (
        reading.tokenize(piece, tokenizer, key)
        for source in found
        for piece in reading.pieces(source, piece_bytes)
    )


def window_starts(n_tokens: int, windows: int, length: int, seed: int) -> list[int]:
    """First token of each window, exactly as the paper's code draws them; needs `n_tokens` >
    `length`.
    """
    draw = random.Random(seed)
    return [draw.randint(0, n_tokens - length - 1) for _ in range(windows)]


def sample_windows(
    stream: Stream,
    windows: int,
    length: int,
    seed: int,
    key: str,
    bos: int | None = None,
) -> np.ndarray:
    """Random windows of the concatenated tokens, int64 [windows, length], in the order of
    `window_starts`.

    With `bos`, a window is this token and the first `length` − 1 tokens of the same text.

    Raises:
        UserError: fewer than `length` + 1 tokens.
    """
    n_tokens, again = counted(stream)
    if n_tokens < length + 1:
        raise _too_short(key, length, n_tokens, length + 1)
    starts = window_starts(n_tokens, windows, length, seed)
    sampled_WT = blank_windows(windows, length, bos)
    texts = list(sampled_WT if bos is None else sampled_WT[:, 1:])
    fill(texts, starts, again, n_tokens, key)
    return sampled_WT


def counted(stream: Stream) -> tuple[int, Stream]:
    """How many tokens there are, and a stream of the same ones: of those that were kept, if there
    are no more than `HELD_TOKENS`, else of the text once more.
    """
    held: list[np.ndarray] | None = []
    n_tokens = 0
    for tokens in stream():
        n_tokens += len(tokens)
        if n_tokens > HELD_TOKENS:
            held = None
        if held is not None:
            held.append(tokens)
    kept = held
    return n_tokens, stream if kept is None else lambda: kept


def blank_windows(windows: int, length: int, bos: int | None) -> np.ndarray:
    """Windows whose text is still to be filled in, int64 [windows, length]; `bos` stands there."""
    windows_WT = np.zeros((windows, length), dtype=np.int64)
    if bos is not None:
        windows_WT[:, 0] = bos
    return windows_WT


def fill(
    texts: Sequence[np.ndarray], starts: Sequence[int], stream: Stream, n_tokens: int, key: str
) -> None:
    """Write into each of the `texts`, all of one length, the tokens that begin at its start. They
    may overlap. The tokens, `n_tokens` of them, are read once.
    """
    width = len(texts[0]) if texts else 0
    order = np.argsort(np.asarray(starts, dtype=np.int64), kind="stable")
    ascending = np.asarray(starts, dtype=np.int64)[order]
    first = 0
    for tokens in stream():
        end = first + len(tokens)
        # Those that begin before the end of this piece, and end behind its beginning.
        low, high = np.searchsorted(ascending, [first - width + 1, end])
        for number in order[low:high]:
            text, start = texts[number], starts[number]
            begin, stop = max(start, first), min(start + width, end)
            text[begin - start : stop - start] = tokens[begin - first : stop - first]
        first = end
    if first != n_tokens:
        raise RuntimeError(
            f"{key}: first {n_tokens} tokens, then {first}: the text changed while it was read"
        )


def consecutive_windows(
    stream: Stream,
    length: int,
    limit: int | None,
    key: str,
    bos: int | None = None,
) -> np.ndarray:
    """The text as windows one after another, int64 [n, length]: at most `limit`, no incomplete one.

    With `bos`, each window is this token and `length` − 1 of the text's: no token is left out
    between two windows.

    Raises:
        UserError: less text than a window takes.
    """
    width = length if bos is None else length - 1
    held: list[np.ndarray] = []
    n_tokens = 0
    for tokens in stream():
        held.append(tokens)
        n_tokens += len(tokens)
        if limit is not None and n_tokens >= limit * width:
            break
    if n_tokens < width:
        raise _too_short(key, length, n_tokens, width)
    n = n_tokens // width if limit is None else min(limit, n_tokens // width)
    texts_WT = np.concatenate(held)[: n * width].astype(np.int64).reshape(n, width)
    return texts_WT if bos is None else np.pad(texts_WT, ((0, 0), (1, 0)), constant_values=bos)


def _too_short(key: str, length: int, found: int, needed: int) -> UserError:
    problem = f"the text has {found} tokens, and windows of this length need {needed}"
    fix = f"give more text in {key}, or lower the length"
    return UserError(beside(of_all(key), "length"), length, problem, fix)
