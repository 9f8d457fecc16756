"""`dus`: the first n blocks of a model, then its last n (depth up-scaling, SOLAR, Kim et al., arXiv
2312.15166).

With b_0 … b_N−1 the blocks of a model, and M = 2 n those there are to be, the deeper model is

    b_0 … b_n−1, b_N−n … b_N−1.

SOLAR makes 48 blocks of 32: n = 24, so that the 8 blocks at either end are there once, and the 16
between them twice. Here `depth` says how many blocks there are to be. If M is odd, one block more
is of the first ones, which is our choice. Nothing is computed or written for it: a copy refers to
its original, and is a block of its own in the finished model. SOLAR then pretrains the whole model
further; here that is the recipe's `heal`, in which `heal.train` says what learns.
"""

from __future__ import annotations

from functools import partial

from fusegpt_ray.methods.base import Copy, Growth, Method
from fusegpt_ray.methods.inserting import insert
from fusegpt_ray.recipe.recipe import Recipe


def again(recipe: Recipe, blocks: int) -> list[Copy]:
    """Behind the first ⌈M / 2⌉ blocks come those of the last ⌊M / 2⌋ that are among them."""
    depth = blocks + recipe.blocks_to_add(blocks)
    first = -(-depth // 2)
    return [Copy(after=first - 1, like=number) for number in range(blocks - depth // 2, first)]


METHOD = Method("dus", None, partial(insert, place=again, zero=False), Growth(again, zero=False))
