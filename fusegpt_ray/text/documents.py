"""Documents kept apart (`pack: false`): each row of a table, or each file of plain text, is a
window of its own. A longer one is cut at the window's length, a shorter one padded.

Notable:
- a row may be a conversation, a list of messages, which the model's own chat template turns into
  text;
- which documents are drawn follows from the seed and their places in the text alone: each place has
  a random key, and those of the lowest keys are taken, in the order of their keys. So fewer windows
  are the first of more, and what is held out does not depend on how many are trained on;
- a document of less than two tokens has nothing to predict, and is passed over.
"""

from __future__ import annotations

import heapq
import json
import random
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from fusegpt_ray.errors import UserError
from fusegpt_ray.samples import PADDING
from fusegpt_ray.text.calibration import Reading, Stream, tokenize
from fusegpt_ray.text.corpus import explained
from fusegpt_ray.text.formats import Source, beside, of_all
from fusegpt_ray.text.rows import ROW, opened, values

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def documents(source: Source, piece_bytes: int) -> Iterator[str]:
    """The source's documents, each as JSON: a string, or a list of messages.

    `piece_bytes` is not needed: a document is a piece.

    Raises:
        UserError: see `corpus.pieces`; or a row holds neither.
    """
    with explained(source.key, source.uri):
        if source.format == "text":
            with opened(source) as file:
                yield json.dumps(file.read(ROW))
            return
        for row in values(source):
            if not isinstance(row.value, str) and not _is_conversation(row.value):
                problem = f"{row.where} of {source.uri} has neither text nor messages there"
                fix = "name a column of text, or of lists of {role, content}"
                key = beside(source.key, "column")
                raise UserError(key, source.text.column, f"{problem}: {row.value!r:.80}", fix)
            yield json.dumps(row.value)


def _is_conversation(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in value)
    )


def tokenize_document(document: str, tokenizer: PreTrainedTokenizerBase, key: str) -> np.ndarray:
    """Token ids of one document, as `documents` gives it: int32 [tokens]. Special tokens are those
    of the chat template alone.

    Raises:
        UserError: the tokenizer has no chat template for a conversation, or that refuses it.
    """
    value = json.loads(document)
    if isinstance(value, str):
        return tokenize(value, tokenizer)
    if not tokenizer.chat_template:
        problem = "the text is conversations, and the model's tokenizer has no chat template"
        fix = "use the tokenizer of a chat model, or name a column of text"
        raise UserError(key, document[:200], problem, fix)
    try:
        text = tokenizer.apply_chat_template(value, tokenize=False)
    except Exception as error:  # whatever a template raises is its word on these messages
        problem = f"the model's chat template refuses a conversation ({error})"
        fix = "give conversations as the model was trained on, such as user and assistant in turn"
        raise UserError(key, document[:200], problem, fix) from error
    return tokenize(text, tokenizer)


APART = Reading(documents, tokenize_document)
"""Documents, each by itself."""


def first(stream: Stream, limit: int | None, key: str) -> list[np.ndarray]:
    """The first `limit` documents (None: all).

    Raises:
        UserError: there is none.
    """
    found = list(islice(telling(stream), limit))
    enough(found, 1, key)
    return found


def drawn(stream: Stream, count: int, seed: int) -> tuple[list[np.ndarray], list[int], int]:
    """At most `count` documents, by the order of their random keys; their numbers, from 0; and how
    many there are.
    """
    kept: list[tuple[float, int, np.ndarray]] = []
    there = 0
    for there, tokens in enumerate(telling(stream), 1):
        # Negative: the heap's first is the highest of the lowest keys. No two places are equal.
        entry = (-random.Random(f"{seed} {there}").random(), there, tokens)
        if len(kept) < count:
            heapq.heappush(kept, entry)
        elif kept and entry[0] > kept[0][0]:
            heapq.heapreplace(kept, entry)
    kept.sort(key=lambda entry: -entry[0])
    return [tokens for _, _, tokens in kept], [number - 1 for _, number, _ in kept], there


def telling(stream: Stream) -> Iterator[np.ndarray]:
    """The documents in which something can be predicted."""
    return (tokens for tokens in stream() if len(tokens) > 1)


def as_windows(found: Sequence[np.ndarray], length: int, bos: int | None) -> tuple[np.ndarray, int]:
    """The documents as windows, int64 [documents, length], and how many of them were cut."""
    windows_WT = np.full((len(found), length), PADDING, dtype=np.int64)
    cut = [put(tokens, row, bos) for tokens, row in zip(found, windows_WT, strict=True)]
    return windows_WT, sum(cut)


def put(tokens: np.ndarray, row_T: np.ndarray, bos: int | None) -> bool:
    """Write a document into a row of padding; whether it is longer than that.

    `bos` stands at its beginning, once: a chat template may have put it there.
    """
    if bos is not None and tokens[0] != bos:
        tokens = np.concatenate([[bos], tokens])
    row_T[: len(tokens)] = tokens[: len(row_T)]
    return len(tokens) > len(row_T)


def enough(found: Sequence[np.ndarray], wanted: int, key: str) -> None:
    """
    Raises:
        UserError: there are fewer documents than are wanted.
    """
    if len(found) < wanted:
        problem = f"the text has {len(found)} documents of two tokens or more, of {wanted} wanted"
        fix = "ask for fewer windows, give more text, or leave pack: false out"
        raise UserError(beside(of_all(key), "pack"), False, problem, fix)
