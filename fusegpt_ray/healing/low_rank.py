"""A frozen linear layer with a low-rank update beside it (LoRA, Hu et al., arXiv 2106.09685):

    y = x Wᵀ + b + (x Aᵀ) Bᵀ

The sum W + B·A is formed only when the layer is saved. So nothing of W's size is kept beside W
itself, and no gradient by W is computed, which is a third of the work of training all weights.

The layers of a mixture's experts are applied by the class to tokens in an order of its own, with
no place for an update beside them. So theirs are formed, W_e + B_e·A_e, whenever the experts are
called: for a block at a time where activations are computed again.

Shapes: O outputs, I inputs, R rank, E experts; A is [R, I], B [O, R], for each expert by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from fusegpt_ray.fusion.linear import Experts, Linear, is_transposed, kaiming, sizes

Tensors = Mapping[str, torch.Tensor]


class LowRankLinear(nn.Module):
    """Takes the place of a linear layer in a block. A and B are given to it (see `Learned`)."""

    A: torch.Tensor
    B: torch.Tensor
    keys = ("weight",)
    """Of the weights that have an update."""

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

    def folded(self, weights: Tensors, update: Tensors) -> dict[str, torch.Tensor]:
        """The weight with its update (A and B), by its key."""
        return {"weight": _folded(weights["weight"], update, "", is_transposed(self.own))}


class LowRankExperts(nn.Module):
    """Takes the place of a mixture's experts in a block. For each of their weights W, W_A and W_B
    are given to it.
    """

    def __init__(self, own: nn.Module, layers: Mapping[str, Experts]) -> None:
        """
        Args:
            layers: of `own`, by the name of the weight.
        """
        super().__init__()
        self.own = own
        self._transposed = {key: layer.transposed for key, layer in layers.items()}
        self.keys = tuple(layers)
        """Of the weights that have an update."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        weights = {key: getattr(self.own, key) for key in self.keys}
        update = {
            f"{key}_{name}": getattr(self, f"{key}_{name}") for key in weights for name in "AB"
        }
        out: torch.Tensor = functional_call(self.own, self.folded(weights, update), args, kwargs)
        return out

    def folded(self, weights: Tensors, update: Tensors) -> dict[str, torch.Tensor]:
        """Weights with their updates (W_A and W_B for each W), by key."""
        return {
            key: _folded(value, update, f"{key}_", self._transposed[key])
            for key, value in weights.items()
        }


def start(own: Linear | Experts, rank: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A at random and B zero, in float32 on the layer's device: the layer is what it was."""
    *experts, outputs, inputs = sizes(own)
    device = own.weight.device
    return {
        "A": kaiming(rank, inputs, generator, *experts).to(device),
        "B": torch.zeros(*experts, outputs, rank, device=device),
    }


def _folded(weight: torch.Tensor, update: Tensors, mark: str, transposed: bool) -> torch.Tensor:
    """W + B·A, laid out as the layer's weight is, in the wider of both dtypes; `mark`: what stands
    before A and B.
    """
    product_OI = update[f"{mark}B"] @ update[f"{mark}A"]
    return weight.to(product_OI.device) + (product_OI.mT if transposed else product_OI)
