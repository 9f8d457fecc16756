"""Frozen weights of a span, of which each worker holds an equal part: what ZeRO 3 does with what
learns, for what does not.

A block's parts are gathered when the block runs. What the backward pass needs of them stays alive
with the graph, so that with recomputed activations one block is whole at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from fusegpt_ray.model.compiled import RunBlock
from fusegpt_ray.model.recorder import Context


@dataclass(frozen=True)
class _Frozen:
    """One weight of a block, and where it lies in the block's row of numbers."""

    module: nn.Module
    key: str
    shape: torch.Size
    first: int

    @property
    def end(self) -> int:
        return self.first + self.shape.numel()


class Partition:
    """One worker's parts of the frozen weights of blocks."""

    def __init__(self, rank: int, count: int) -> None:
        self.rank, self.count = rank, count
        self._parts: dict[nn.Module, dict[torch.dtype, tuple[torch.Tensor, list[_Frozen]]]] = {}

    def keep(self, block: nn.Module) -> None:
        """Keep this worker's part of all frozen weights of a block, which it loses."""
        rows: dict[torch.dtype, list[tuple[_Frozen, torch.Tensor]]] = {}
        for module in block.modules():
            for key, value in module.named_parameters(recurse=False):
                if not value.numel():  # it learns, and is given later
                    continue
                row = rows.setdefault(value.dtype, [])
                first = row[-1][0].end if row else 0
                row.append((_Frozen(module, key, value.shape, first), value.detach()))
        self._parts[block] = {}
        for dtype, row in rows.items():
            numbers = torch.cat([value.reshape(-1) for _, value in row])
            self._parts[block][dtype] = self._part(numbers), [weight for weight, _ in row]
        self._release(block)

    def run(self, run: RunBlock) -> RunBlock:
        """`run`, for blocks whose weights are in parts. All workers run the same blocks in the same
        order.
        """

        def gathered(block: nn.Module, h_BTD: torch.Tensor, context: Context) -> torch.Tensor:
            self._gather(block)
            try:
                return run(block, h_BTD, context)
            finally:
                self._release(block)

        return gathered

    def _part(self, row: torch.Tensor) -> torch.Tensor:
        size = -(-len(row) // self.count)
        part = row.new_zeros(size)
        mine = row[self.rank * size : (self.rank + 1) * size]
        part[: len(mine)] = mine
        return part

    def _gather(self, block: nn.Module) -> None:
        for part, weights in self._parts[block].values():
            row = part.new_empty(self.count * len(part))
            dist.all_gather_into_tensor(row, part)
            for weight in weights:
                value = row[weight.first : weight.end].view(weight.shape)
                # A new parameter each time: the graph of an earlier call has its own.
                parameter = nn.Parameter(value, requires_grad=False)
                setattr(weight.module, weight.key, parameter)

    def _release(self, block: nn.Module) -> None:
        for part, weights in self._parts[block].values():
            for weight in weights:
                empty = nn.Parameter(part.new_empty(0), requires_grad=False)
                setattr(weight.module, weight.key, empty)
