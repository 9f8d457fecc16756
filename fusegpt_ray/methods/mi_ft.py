"""`mi+ft`: the block is dropped, and the blocks around it are fine-tuned."""

from __future__ import annotations

from functools import partial

from fusegpt_ray.methods.base import Method
from fusegpt_ray.methods.group import train_group

METHOD = Method(
    name="mi+ft",
    about="blocks with the lowest Macro Influence dropped, their neighbours fine-tuned",
    change=partial(train_group, fuse=False),
    trains=True,
)
