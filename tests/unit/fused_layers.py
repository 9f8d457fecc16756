"""A small layer of each kind that can be fused, and its fused form."""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fusegpt_ray.fusion.linear import FusedLinear

OUT, IN, RANK, LORA = 6, 5, 3, 2
KINDS = {
    "linear": lambda: nn.Linear(IN, OUT),
    "linear without bias": lambda: nn.Linear(IN, OUT, bias=False),
    "Conv1D": lambda: Conv1D(OUT, IN),
}


def make_layer(kind: str, dtype: torch.dtype) -> nn.Module:
    layer = KINDS[kind]().to(dtype).requires_grad_(False)
    for parameter in layer.parameters():
        parameter.normal_()
    return layer


def fuse(
    kind: str,
    count: int,
    dtype: torch.dtype = torch.float64,
    learned: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[FusedLinear, nn.Module, list[nn.Module]]:
    own = make_layer(kind, dtype)
    others = [make_layer(kind, dtype) for _ in range(count)]
    donors = [(other.weight, other.bias) for other in others]
    generator = torch.Generator().manual_seed(seed)
    return FusedLinear(own, donors, RANK, LORA, learned, generator), own, others
