"""Groups of blocks that share one set of matrices (after FoldGPT, arXiv 2407.00928).

The N blocks that are left, b_1 … b_N, stand in N / k groups of adjacent ones. Each group takes the
layers with matrices, weights and biases, of its first block. All else in a block, such as its
norms, stays its own. Healing then learns one tensor for a group: its gradient is the sum of those
of the group's blocks,

    ∂L/∂W_j = Σ over the blocks b of group j of ∂L/∂W_b,

while norms learn apart. Groups are cut in one of two ways (`heal.share_by`):

- `place`: after every k-th block.
- `similarity`: so that those blocks get another's matrices which change states least. With

      d_b = 1 − E over t of  cos(h_b,t, h_b+1,t)

  of the states that enter and leave block b in the dense model (its Block Influence, measured once
  on the windows that score), a partition into N / k groups of any sizes is chosen to

      min of  Σ over blocks b that are not the first of their group of d_b.

  As the sum over all blocks is the same for each partition, that is the one whose groups begin at
  b_1 and at the N / k − 1 others of the highest d_b, of equal ones the first. It costs one walk of
  the dense model.

FoldGPT has no public code. Both ways are ours, as are the first block's weights instead of a mean.
The second can leave one long group beside blocks by themselves. Which heals better is not measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from fusegpt_ray.errors import UserError
from fusegpt_ray.model.stack import Stack


@dataclass(frozen=True)
class Sharing:
    """How the blocks that are left form groups."""

    size: int | None = None
    """k, of which there are on average so many in a group; None: no groups."""
    changes: tuple[float, ...] = ()
    """d by number in the dense model, or a multiple of it; nothing: they are cut by place."""

    def groups(self, kept: Sequence[int]) -> list[tuple[int, ...]]:
        """The numbers of the blocks of each group."""
        if self.size is None:
            return []
        assert len(kept) % self.size == 0, (len(kept), self.size)
        first = [*range(0, len(kept), self.size)]
        if self.changes:
            others = sorted(range(1, len(kept)), key=lambda place: -self.changes[kept[place]])
            first = [0, *sorted(others[: len(first) - 1])]
        return [tuple(kept[begin:end]) for begin, end in pairwise([*first, len(kept)])]

    def of(self, stack: Stack) -> Stack:
        """The stack in its groups."""
        for group in self.groups(stack.kept):
            stack = stack.share(*group)
        return stack


def check_groups(size: int | None, dense: Stack, depths: list[int]) -> None:
    """
    Args:
        depths: how many blocks are left in each model.

    Raises:
        UserError: the groups cannot be made.
    """
    if size is None:
        return
    for depth in depths:
        if depth % size:
            fits = [n for n in range(2, depth + 1) if not any(d % n for d in depths)]
            problem = f"does not divide the {depth} blocks that are left"
            fix = f"use one of {fits}, or leave it out" if fits else "use another sparsity"
            raise UserError("heal.share", size, problem, fix)
    shapes = [{n: ref.shape for n, ref in b.of_matrices().items()} for b in dense.blocks]
    if any(one != shapes[0] for one in shapes):
        problem = "the model's blocks have matrices of several shapes or names"
        raise UserError("heal.share", size, problem, "leave it out")
