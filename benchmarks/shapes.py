"""The shapes of the models that benchmarks speak of. Numbers only."""

from __future__ import annotations

import math
from typing import NamedTuple


class Shape(NamedTuple):
    blocks: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int

    @property
    def linears(self) -> list[tuple[int, int]]:
        keys = self.hidden * self.kv_heads // self.heads
        return (
            [(self.hidden, self.hidden)] * 2
            + [(self.hidden, keys)] * 2
            + [(self.hidden, self.intermediate)] * 3
        )

    @property
    def products(self) -> int:
        """Weights of a block's linear layers: multiplications a token."""
        return sum(math.prod(size) for size in self.linears)

    def pairs(self, rank: int) -> int:
        """What a neighbour learns: A and B, C and D of every layer."""
        return 2 * rank * sum(map(sum, self.linears))

    def forward_flops(self, length: int) -> int:
        """Of one block for one token; attention looks at half the window on average."""
        return 2 * self.products + 2 * length * self.hidden


SHAPES = {
    "toy": Shape(8, 64, 128, 4, 2, 256),
    "llama2-7b": Shape(32, 4096, 11008, 32, 32, 32000),
    "llama2-13b": Shape(40, 5120, 13824, 40, 40, 32000),
    "llama3-8b": Shape(32, 4096, 14336, 32, 8, 128256),
    "llama2-70b": Shape(80, 8192, 28672, 64, 8, 32000),
}
