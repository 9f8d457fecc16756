"""Before any work: the model that is walked block by block is the one that users load."""

from __future__ import annotations

import math

from fusegpt_ray.errors import UserError
from fusegpt_ray.measuring import evaluation
from fusegpt_ray.model.finite import explained
from fusegpt_ray.model.source import Source
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.samples import Batch
from fusegpt_ray.terminal.display import Display
from fusegpt_ray.workers.base import Workers


def compare_source(
    workers: Workers, source: Source, dense: Stack, windows: Batch, show: Display
) -> None:
    """
    Raises:
        UserError: what is walked block by block is not the model that plain `from_pretrained`
        loads.
    """
    show.stage("comparing with what from_pretrained loads")
    with explained(dense, source.name, workers.dtype):
        plain = evaluation.compare_source(workers, windows)
        if plain.kl is not None and math.isnan(plain.kl):
            raise FloatingPointError(plain.problem)
    if plain.problem:
        fix = (
            "use a checkpoint that plain from_pretrained loads, of an architecture that can be run"
            " block by block"
        )
        raise UserError("model.source", source.name, plain.problem, fix)
