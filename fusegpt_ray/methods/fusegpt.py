"""`fusegpt`: the block is fused into the blocks around it, which are fine-tuned (the paper)."""

from __future__ import annotations

from functools import partial

from fusegpt_ray.methods.base import Method
from fusegpt_ray.methods.choosing import by_metric
from fusegpt_ray.methods.group import train_group

METHOD = Method("fusegpt", by_metric, partial(train_group, fuse=True))
