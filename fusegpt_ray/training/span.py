"""A span of blocks as one learnable module."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fusegpt_ray.model.recorder import Context, run_block


class Span(nn.Module):
    """Consecutive blocks: states entering the first → states leaving the last, [B, T, D] both."""

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        contexts: Sequence[Context],
        dtype: torch.dtype,
        recompute: bool = False,
    ) -> None:
        """
        Args:
            contexts: what each block is called with besides the states.
            dtype: of the arithmetic.
            recompute: whether a block's activations are computed again for the backward pass.
        """
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.contexts = contexts
        self.dtype = dtype
        self.recompute = recompute

    def forward(self, h_BTD: torch.Tensor) -> torch.Tensor:
        # Autocast, because norms learn in float32 beside 16-bit weights. It stands here, inside,
        # because DeepSpeed switches off any that surrounds its engine.
        enabled = self.dtype != torch.float32
        with torch.autocast(h_BTD.device.type, dtype=self.dtype, enabled=enabled):
            for block, context in zip(self.blocks, self.contexts, strict=True):
                if self.recompute and torch.is_grad_enabled():
                    # Blocks are in eval mode, so no random state has to be preserved.
                    h_BTD = checkpoint(
                        run_block,
                        block,
                        h_BTD,
                        context,
                        use_reentrant=False,
                        preserve_rng_state=False,
                    )
                else:
                    h_BTD = run_block(block, h_BTD, context)
        return h_BTD
