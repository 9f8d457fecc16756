"""How many windows walk a model together. Numbers only, without torch."""

from __future__ import annotations

import math

HELD_BYTES = 4_000_000_000
"""Bytes of one set of states, counted in float32: 238 windows of 2048 tokens of LLaMA-2-7B, or 59
of LLaMA-2-70B."""


def chunk_size(windows: int, batch_size: int, state_bytes: int, held: float = HELD_BYTES) -> int:
    """How many windows should walk the model together.

    Every block is fetched once for all of them, and their states are held: at most `held` bytes,
    `state_bytes` for each window. It is a multiple of `batch_size`, so that the arithmetic of a
    window is the same in any chunk.
    """
    batches = math.ceil(windows / batch_size)
    return batch_size * max(1, min(batches, int(held) // (batch_size * state_bytes)))
