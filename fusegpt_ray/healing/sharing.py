"""Groups of blocks that share one set of matrices (after FoldGPT, arXiv 2407.00928).

The N blocks that are left stand in N / k groups of k adjacent ones,

    group j = (b_jk, …, b_jk+k−1),   j = 0 … N / k − 1,

and each takes the layers with matrices, weights and biases, of its first block b_jk. All else in a
block, such as its norms, stays its own. Healing then learns one tensor for a group: its gradient is
the sum of those of the group's blocks,

    ∂L/∂W_j = Σ over the blocks b of group j of ∂L/∂W_b,

while norms learn apart. FoldGPT has no public code. Groups of one size that are cut by place alone,
and the first block's weights instead of a mean, are ours: adjacent blocks are taken to be similar,
which was not measured, and groups of equal size leave nothing to choose.
"""

from __future__ import annotations

from fusegpt_ray.errors import UserError
from fusegpt_ray.model.stack import Stack


def shared(stack: Stack, size: int | None) -> Stack:
    """In groups of so many adjacent blocks; None: as it is."""
    if size is None:
        return stack
    for group in groups(stack, size):
        stack = stack.share(*group)
    return stack


def groups(stack: Stack, size: int) -> list[tuple[int, ...]]:
    """The numbers of the blocks of each group."""
    assert len(stack) % size == 0, (len(stack), size)
    return [stack.kept[first : first + size] for first in range(0, len(stack), size)]


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
