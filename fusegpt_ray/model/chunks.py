"""How many windows walk a model together. Numbers only: the simulator in `benchmarks/` uses it, without torch."""

from __future__ import annotations

import math

HELD_BYTES = 4_000_000_000
"""Of one set of states, counted in float32: 238 windows of 2048 tokens of LLaMA-2-7B, 59 of LLaMA-2-70B."""


def chunk_size(
    windows: int, rows: int, state_bytes: int, pieces: int = 1, held: float = HELD_BYTES
) -> int:
    """How many windows should walk the model together: every block is fetched once for them, and their states are held.

    Whole calls of `rows` windows, so that the arithmetic is the same in any chunks; an even share for each of the pieces; and at
    most `held` bytes of states, `state_bytes` a window.
    """
    share = math.ceil(math.ceil(windows / rows) / pieces)
    return rows * max(1, min(share, int(held) // (rows * state_bytes)))
