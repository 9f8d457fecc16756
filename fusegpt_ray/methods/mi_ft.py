"""`mi+ft`: the block is dropped, and the blocks around it are fine-tuned (FuseGPT's ablation
without fusing, arXiv 2411.14507).

The block is chosen as by `mi`. Then up to `fusion.group_size` blocks around the gap are trained as
a group, its linear layers by W' = W + B·A of a low rank and its norms by their own weights, to

    min of  ℓ(states that leave the group, states of the teacher at that place),

with ℓ as `fusion.loss` (`training/losses.py`) and the teacher as `fusion.teacher` says. Beside the
scores of `mi` a round costs one walk up to the group's end, or two where the teacher's blocks
before it are others, and `fusion.epochs` passes there and back through the group.
"""

from __future__ import annotations

from functools import partial

from fusegpt_ray.methods.base import Method
from fusegpt_ray.methods.choosing import by_metric
from fusegpt_ray.methods.group import train_group

METHOD = Method("mi+ft", by_metric, partial(train_group, fuse=False))
