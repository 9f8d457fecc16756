"""`fusegpt`: the block is fused into the blocks around it, which are fine-tuned (FuseGPT, the
paper, arXiv 2411.14507).

The block is chosen as by `mi`. Then the group around it is trained as by `mi+ft`, but each of its
linear layers also takes in those of the same name of the blocks W_k that were fused into it (Eq. 7
to 10),

    W' = W + B·A + Σ_k (C_k·D_k) ⊙ W_k,

so that at first, with B = C_k = 0, the block is only dropped (`fusion/linear.py`). A round costs
what one of `mi+ft` does, and in each step the effective weights of the group: for each term a
product of rank `fusion.rank` and one of each weight.
"""

from __future__ import annotations

from functools import partial

from fusegpt_ray.methods.base import Method
from fusegpt_ray.methods.choosing import by_metric
from fusegpt_ray.methods.group import train_group

METHOD = Method("fusegpt", by_metric, partial(train_group, fuse=True))
