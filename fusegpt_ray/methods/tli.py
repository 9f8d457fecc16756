"""`tli`: copies of blocks whose output layers are zero are put between blocks (Transformer Layer
Injection, arXiv 2410.11654).

With block i the map h ↦ h + f_i(h), a copy of it in which the layers that write to the residual
stream are zero is h ↦ h, so that

    M'(x) = M(x)    for all x, to the last bit,

and what was inserted learns from there. No window is walked: the zeros are all that is computed and
written, and all else of a copy refers to its original. What it costs is the work of the added
blocks, in healing and ever after. Of the paper there is an abstract and no code. Ours is: after
every K-th block stands a copy of it; `depth` spreads its copies as evenly, ⌈i N / m⌉ blocks before
copy i of m; and what is zero is found by trying (`fusion/writers.py`).
"""

from __future__ import annotations

from functools import partial

from fusegpt_ray.methods.base import Copy, Growth, Method
from fusegpt_ray.methods.inserting import insert
from fusegpt_ray.recipe.recipe import Recipe


def spread(recipe: Recipe, blocks: int) -> list[Copy]:
    """A copy after every K blocks, or evenly."""
    add = recipe.blocks_to_add(blocks)
    if recipe.every is not None:
        before = [recipe.every * i for i in range(1, add + 1)]
    else:
        before = [-(-i * blocks // add) for i in range(1, add + 1)]
    return [Copy(after=number - 1, like=number - 1) for number in before]


METHOD = Method("tli", None, partial(insert, place=spread, zero=True), Growth(spread, zero=True))
