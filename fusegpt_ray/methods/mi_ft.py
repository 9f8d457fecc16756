"""`mi+ft`: the block is dropped, and the blocks around it are fine-tuned."""

from __future__ import annotations

from functools import partial

from fusegpt_ray.importance.scoring import score
from fusegpt_ray.methods.base import Method
from fusegpt_ray.methods.group import train_group

METHOD = Method("mi+ft", score, partial(train_group, fuse=False))
