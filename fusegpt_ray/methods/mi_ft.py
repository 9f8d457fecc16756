"""`mi+ft`: the block is dropped, and the blocks around it are fine-tuned."""

from __future__ import annotations

from functools import partial

from fusegpt_ray.methods.base import Method
from fusegpt_ray.methods.choosing import by_metric
from fusegpt_ray.methods.group import train_group

METHOD = Method("mi+ft", by_metric, partial(train_group, fuse=False))
