"""`mi`: the block is dropped."""

from __future__ import annotations

from fusegpt_ray.methods.base import Method
from fusegpt_ray.methods.choosing import by_metric, drop

METHOD = Method("mi", by_metric, drop)
