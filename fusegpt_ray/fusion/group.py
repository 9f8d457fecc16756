"""Which blocks take part when one is fused away (method.md, "Partial group")."""

from __future__ import annotations


def group_span(position: int, blocks: int, neighbours: int) -> range:
    """Positions of the partial group around the donor at `position`, the donor included.

    With 7 neighbours: four blocks left of the donor and three right of it, moved inwards at the
    edges (the paper's code); fewer blocks than that in the model: all of them. With G neighbours:
    ceil(G / 2) left, floor(G / 2) right.
    """
    assert 0 <= position < blocks, (position, blocks)
    size = min(neighbours + 1, blocks)
    first = position - (neighbours + 1) // 2
    first = min(max(first, 0), blocks - size)
    return range(first, first + size)
