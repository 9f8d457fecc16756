"""A frozen linear layer with a low-rank update beside it (LoRA, Hu et al., arXiv 2106.09685):

    y = x Wᵀ + b + (x Aᵀ) Bᵀ

The sum W + B·A is formed only when the layer is saved. So nothing of W's size is kept beside W
itself, and no gradient by W is computed, which is a third of the work of training all weights.

Shapes: O outputs, I inputs, R rank; A is [R, I], B [O, R].
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fusegpt_ray.fusion.linear import Linear, kaiming


class LowRankLinear(nn.Module):
    """Takes the place of a linear layer in a block. A and B are given to it (see `Learned`)."""

    A: torch.Tensor
    B: torch.Tensor

    def __init__(self, own: Linear) -> None:
        super().__init__()
        self.own = own

    @property
    def weight(self) -> torch.Tensor:
        """Models ask a layer's weight for its dtype and device."""
        weight: torch.Tensor = self.own.weight
        return weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.own.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        update: torch.Tensor = nn.functional.linear(nn.functional.linear(x, self.A), self.B)
        return self.own(x) + update


def start(own: Linear, rank: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A at random and B zero, in float32 on the layer's device: the layer is what it was."""
    outputs, inputs = own.weight.shape[::-1] if isinstance(own, Conv1D) else own.weight.shape
    device = own.weight.device
    return {
        "A": kaiming(rank, inputs, generator).to(device),
        "B": torch.zeros(outputs, rank, device=device),
    }


def folded(own: Linear, weight: torch.Tensor, update: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """W + B·A, laid out as the layer's weight is; in float32, or in the weight's dtype if that is
    wider.
    """
    product_OI = update["B"] @ update["A"]
    return weight + (product_OI.T if isinstance(own, Conv1D) else product_OI)
