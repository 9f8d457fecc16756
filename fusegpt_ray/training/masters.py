"""The parameters of a layer themselves, learned as masters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


class Masters(nn.Module):
    """A layer's parameters in the masters' dtype, formed into that of the arithmetic."""

    def __init__(self, values: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
        """
        Args:
            values: by the parameter's name in the layer; in the dtype of the masters.
            dtype: of the arithmetic.
        """
        super().__init__()
        self.dtype = dtype
        for key, value in values.items():
            self.register_parameter(key, nn.Parameter(value))

    def forward(self) -> dict[str, torch.Tensor]:
        own = self.named_parameters(recurse=False)
        return {key: value.to(self.dtype) for key, value in own}
