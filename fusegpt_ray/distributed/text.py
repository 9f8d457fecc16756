"""The token stream of `calibration.py`, produced by Ray Data on all nodes at once.

Notable:
- the same pieces, each one tokenizer call, arrive in the same order: windows do not depend on the
  cluster;
- cutting asks for less than a CPU: it does little but read, and Ray fuses stages of equal
  requirements, so that one large file would be tokenised by one CPU;
- a user's mistake travels as a row, in its place: it is the one that a single process would meet
  first, and the console shows its message, not Ray's account of a failed task;
- every node must reach the files: use a shared folder or an object store, unless the cluster is a
  single machine.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
import ray.data

from fusegpt_ray.errors import UserError
from fusegpt_ray.recipe.text_sections import Text
from fusegpt_ray.text.calibration import PACKED, Reading
from fusegpt_ray.text.corpus import sources

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def token_stream(
    text: Text,
    piece_bytes: int,
    tokenizer: PreTrainedTokenizerBase,
    key: str,
    reading: Reading = PACKED,
) -> Callable[[], Iterator[np.ndarray]]:
    """As `calibration.token_stream`: a function that yields the tokens of each piece, int32
    [tokens], in order.

    Each call of the function reads and tokenises the text again. The arrays are read-only.

    Raises:
        UserError: as `corpus.sources`, at once; as `corpus.pieces` on any node, while the tokens
        are drawn.
    """
    found = sources(text, key, reading.pieces)

    def cut(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        numbers = count()
        try:
            for piece in reading.pieces(found[row["source"]], piece_bytes):
                yield {"source": row["source"], "piece": next(numbers), "text": piece, "error": b""}
        except UserError as error:
            yield {
                "source": row["source"],
                "piece": next(numbers),
                "text": "",
                "error": pickle.dumps(error),
            }

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        if row["error"]:
            return {**row, "tokens": np.zeros(0, dtype=np.int32)}
        try:
            return {**row, "text": "", "tokens": reading.tokenize(row["text"], tokenizer, key)}
        except UserError as error:
            nothing = np.zeros(0, dtype=np.int32)
            return {**row, "text": "", "tokens": nothing, "error": pickle.dumps(error)}

    def stream() -> Iterator[np.ndarray]:
        # Half a piece: no task gets two large ones.
        with ray.data.DataContext.current(context(max(1, piece_bytes // 2))):
            rows = ray.data.from_items([{"source": index} for index in range(len(found))])
            rows = rows.flat_map(cut, num_cpus=0.5).map(encode, num_cpus=1)
        source, piece = 0, -1
        for row in rows.iter_rows():
            assert row["source"] >= source, "Ray Data changed the order of the sources"
            source, piece = row["source"], piece + 1 if row["source"] == source else 0
            assert row["piece"] == piece, "Ray Data changed the order of the pieces"
            if row["error"]:
                raise pickle.loads(row["error"])
            yield row["tokens"]

    return stream


def context(block_bytes: int) -> ray.data.DataContext:
    """The caller's settings, and ours for these datasets only: ordered, quiet, and a block closed
    when it is larger than so many bytes. Small rows share one; a large one has one of its own.
    """
    found = ray.data.DataContext.get_current().copy()
    found.execution_options.preserve_order = True
    found.enable_progress_bars = False
    found.target_max_block_size = block_bytes
    return found
