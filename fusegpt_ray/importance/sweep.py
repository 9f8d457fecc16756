"""The metric of many candidates in one walk over the model, exactly.

Shapes: W windows, C candidates, T tokens, D hidden size.

The walk carries the full model's states and those of every candidate that is already left out: a
block is read once and used for all. A candidate joins as a copy of the full model's states entering
its block. In a model of N blocks a window costs N block-forwards and N − 1 − i more for a candidate
at position i: N (N + 1) / 2 for all of them, about half of N² for N + 1 full forward passes.

A metric that compares at the block itself needs the full model's states only, and walks nobody on.
One that compares with the dense model walks that first, where it is not the full model itself.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import torch

from fusegpt_ray.importance.metrics import METRICS, Metric
from fusegpt_ray.model.memory import empty_cache, free_bytes, is_out_of_memory
from fusegpt_ray.model.rows import Rows, ids_of
from fusegpt_ray.model.runner import Runner, state_bytes
from fusegpt_ray.model.stack import Stack

STATES_SHARE = 0.7
"""Of the free memory that states may take while they walk; the rest is for blocks and activations.
"""


class Part(NamedTuple):
    """A batch of windows, and the candidates to leave out for it."""

    windows: Rows
    positions: tuple[int, ...]
    """In the stack, in any order."""
    counted_WT: torch.Tensor | None = None
    """Which tokens count, bool; None: all of them."""


Walk = Callable[[Sequence[Part]], list[torch.Tensor]]


def sweep(
    runner: Runner,
    stack: Stack,
    parts: Sequence[Part],
    metric: Metric = METRICS["mi"],
    dense: Stack | None = None,
) -> list[torch.Tensor]:
    """For each part, the metric summed over tokens for every window and candidate: [W, C] float64
    on the CPU.

    `dense`: the dense model, if the metric compares with it and `stack` is not it.

    As many parts walk together, in order, as their states fit into memory; one candidate of one
    part passes a block at a time. So the arithmetic of a window depends on the windows of its batch
    alone: neither on the other candidates, nor on the other parts, nor on where they are walked.
    """
    room = STATES_SHARE * runner.memory_share * free_bytes(runner.device)
    token_bytes = state_bytes(stack, 1, runner.dtype)
    walk = partial(_walk, runner, stack, metric, dense)
    sums: list[torch.Tensor] = []
    while len(sums) < len(parts):
        left = parts[len(sums) :]
        sets = [_state_sets(part, metric, dense) * part.windows.numel() for part in left]
        sums += _sweep(walk, left[: _how_many_fit(sets, int(room / token_bytes))])
    return sums


def _state_sets(part: Part, metric: Metric, dense: Stack | None) -> int:
    """How many states of each of its tokens are in memory at once."""
    candidates = len(part.positions) if metric.spec.walks_on else 1
    return 1 + candidates + (dense is not None)


def _how_many_fit(sizes: Sequence[int], room: int) -> int:
    """How many parts, from the first on, are together no larger than `room`; at least one."""
    together = list(accumulate(sizes))
    return max(1, bisect_right(together, room))


def _sweep(walk: Walk, parts: Sequence[Part]) -> list[torch.Tensor]:
    """All parts in one walk; each half of them, if memory runs out all the same."""
    try:
        return walk(parts)
    except Exception as error:
        if len(parts) == 1 or not is_out_of_memory(error):
            raise
    empty_cache()
    half = len(parts) // 2
    return _sweep(walk, parts[:half]) + _sweep(walk, parts[half:])


@torch.no_grad()
def _walk(
    runner: Runner, stack: Stack, metric: Metric, dense: Stack | None, parts: Sequence[Part]
) -> list[torch.Tensor]:
    dense_states = None if dense is None else _final_states(runner, dense, parts)
    entered = [runner.enter(part.windows) for part in parts]
    fulls, samples = map(list, zip(*entered, strict=True))
    without: list[dict[int, torch.Tensor]] = [
        {} for _ in parts
    ]  # by position: states [W, T, D] of the model without it
    sums: list[dict[int, torch.Tensor]] = [{} for _ in parts]  # by position: [W]

    def compare(i: int) -> None:
        """Measure the candidates of part i, and take them off the walk."""
        reference = {
            "current": fulls[i],
            "dense": fulls[i] if dense_states is None else dense_states[i],
            "tokens": ids_of(parts[i].windows),
        }[metric.spec.against]
        others = list(without[i].values())
        found = metric.sums(runner.trunk.logits, reference, others, parts[i].counted_WT)
        sums[i] |= zip(without[i], found, strict=True)
        without[i] = {}

    for block, module in runner.weights.walk(stack.blocks):
        position = stack.position(block.dense)
        for i, part in enumerate(parts):
            for other, h_WTD in without[i].items():
                without[i][other] = runner.apply(module, block.kind, h_WTD, samples[i])
            if position in part.positions:
                without[i][position] = fulls[i]
            fulls[i] = runner.apply(module, block.kind, fulls[i], samples[i])
            if not metric.spec.walks_on:
                compare(i)
        del module  # before the next one is asked for
    for i in range(len(parts)):
        compare(i)
    return [
        torch.stack([found[position] for position in part.positions], dim=1).cpu()
        for part, found in zip(parts, sums, strict=True)
    ]


def _final_states(runner: Runner, stack: Stack, parts: Sequence[Part]) -> list[torch.Tensor]:
    """What leaves the last block, for each part: [W, T, D]."""
    entered = [runner.enter(part.windows) for part in parts]
    states = [h_WTD for h_WTD, _ in entered]
    for block, module in runner.weights.walk(stack.blocks):
        for i, (_, samples) in enumerate(entered):
            states[i] = runner.apply(module, block.kind, states[i], samples)
        del module  # before the next one is asked for
    return states
