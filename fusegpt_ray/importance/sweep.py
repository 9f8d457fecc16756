"""Macro Influence of many candidates in one walk over the model, exactly.

Shapes: W windows, C candidates, T tokens, D hidden size.

The walk carries the full model's states and those of every candidate that is already left out: a
block is read once and used for all. A candidate joins as a copy of the full model's states entering
its block. In a model of N blocks a window costs N block-forwards and N − 1 − i more for a candidate
at position i: N (N + 1) / 2 for all of them, about half of N² for N + 1 full forward passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fusegpt_ray.importance.metrics import macro_influence
from fusegpt_ray.model.memory import empty_cache, free_bytes, is_out_of_memory
from fusegpt_ray.model.runner import Runner, state_bytes
from fusegpt_ray.model.stack import Stack

STATES_SHARE = 0.7
"""Of the free memory that states may take while they walk; the rest is for blocks and activations.
"""


class Part(NamedTuple):
    """A batch of windows, and the candidates to leave out for it."""

    windows_WT: torch.Tensor
    positions: tuple[int, ...]
    """In the stack, in any order."""


def sweep(runner: Runner, stack: Stack, parts: Sequence[Part]) -> list[torch.Tensor]:
    """For each part, 1 − cos summed over tokens for every window and candidate: [W, C] float64 on
    the CPU.

    As many parts walk together, in order, as their states fit into memory; one candidate of one
    part passes a block at a time. So the arithmetic of a window depends on the windows of its batch
    alone: neither on the other candidates, nor on the other parts, nor on where they are walked.
    """
    room = STATES_SHARE * runner.memory_share * free_bytes(runner.device)
    token_bytes = state_bytes(stack, 1, runner.dtype)
    sums: list[torch.Tensor] = []
    while len(sums) < len(parts):
        sums += _sweep(runner, stack, _first_that_fit(parts[len(sums) :], token_bytes, room))
    return sums


def _first_that_fit(parts: Sequence[Part], token_bytes: int, room: float) -> Sequence[Part]:
    """The first parts whose states take at most `room` bytes, but at least one."""
    for count, part in enumerate(parts):
        room -= part.windows_WT.numel() * (1 + len(part.positions)) * token_bytes
        if room < 0 and count:
            return parts[:count]
    return parts


def _sweep(runner: Runner, stack: Stack, parts: Sequence[Part]) -> list[torch.Tensor]:
    """All parts in one walk; each half of them, if memory runs out all the same."""
    try:
        return _walk(runner, stack, parts)
    except Exception as error:
        if len(parts) == 1 or not is_out_of_memory(error):
            raise
    empty_cache()
    half = len(parts) // 2
    return _sweep(runner, stack, parts[:half]) + _sweep(runner, stack, parts[half:])


@torch.no_grad()
def _walk(runner: Runner, stack: Stack, parts: Sequence[Part]) -> list[torch.Tensor]:
    fulls = [runner.embed(part.windows_WT) for part in parts]
    without: list[dict[int, torch.Tensor]] = [
        {} for _ in parts
    ]  # by position: states [W, T, D] of the model without it
    for block, module in runner.weights.walk(stack.blocks):
        position = stack.position(block.dense)
        for i, part in enumerate(parts):
            for other, h_WTD in without[i].items():
                without[i][other] = runner.apply(module, block.dense, h_WTD)
            if position in part.positions:
                without[i][position] = fulls[i]
            fulls[i] = runner.apply(module, block.dense, fulls[i])
        del module  # before the next one is asked for
    return [
        torch.stack(
            [macro_influence(full_WTD, h[position]) for position in part.positions], dim=1
        ).cpu()
        for part, full_WTD, h in zip(parts, fulls, without, strict=True)
    ]
