"""Macro Influence of every block in one walk over the model, exactly.

Shapes: W windows, N blocks of the stack, T tokens, D hidden size.

At block k the walk carries the full model's states and those of the k candidates already left out, stacked along the batch: the
block's weights are read once and used for all. Candidate k joins as a copy of the full model's states entering block k. Block k costs
k + 1 block-forwards, N (N + 1) / 2 in all, about half of N (N − 1) + N for a full forward pass for every candidate.
"""

from __future__ import annotations

import math

import torch

from fusegpt_ray.importance.metrics import macro_influence
from fusegpt_ray.runner import Runner
from fusegpt_ray.stack import Stack


@torch.no_grad()
def sweep(runner: Runner, stack: Stack, windows_WT: torch.Tensor, batch: int) -> torch.Tensor:
    """1 − cos summed over tokens for every window and block: [W, N] float64 on the CPU; column i is the block at position i.

    `batch` windows walk together. The arithmetic of a window depends on its batch alone, so that splitting the batches over
    replicas changes nothing: batch i is windows i·batch … (i+1)·batch − 1.
    """
    parts = windows_WT.split(batch)
    # For each batch of windows: states [1 + candidates, W, T, D], the full model's first.
    walking = [runner.embed(part)[None] for part in parts]
    for block in stack.blocks:
        module = runner.load(block)
        for i, h_CWTD in enumerate(walking):
            after_CWTD = runner.apply(module, block.dense, h_CWTD.flatten(0, 1)).view_as(h_CWTD)
            walking[i] = torch.cat([after_CWTD, h_CWTD[:1]])  # the new candidate: what entered this block
        del module  # before the next one is read
    return torch.cat([torch.stack([macro_influence(h[0], without) for without in h[1:]], dim=1) for h in walking]).cpu()


def scores(stack: Stack, sums_WN: torch.Tensor, length: int) -> dict[int, float]:
    """Dense block number → Macro Influence: the mean over all tokens of all windows.

    Raises:
        FloatingPointError: the model's states are not finite.
    """
    means_N = sums_WN.sum(dim=0) / (sums_WN.shape[0] * length)
    table = dict(zip(stack.kept, means_N.tolist(), strict=True))
    if bad := [dense for dense, value in table.items() if not math.isfinite(value)]:
        reason = "NaN or Inf in the model's weights, or an overflow in its arithmetic"
        raise FloatingPointError(f"the scores of {len(bad)} of {len(table)} blocks, such as block {bad[0]}, are nan: {reason}")
    return table


def lowest(table: dict[int, float]) -> int:
    """The block to remove: the lowest score, the earlier block on a tie."""
    return min(table, key=lambda dense: (table[dense], dense))
