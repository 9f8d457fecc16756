"""What one step of training is given.

Shapes: b windows of a loss batch on this worker, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from fusegpt_ray.model.rows import Owns
from fusegpt_ray.samples import Batch as Windows
from fusegpt_ray.samples import counting, predicted, tokens_of


class LossBatch(NamedTuple):
    """A worker's part of a loss batch."""

    entering_bTD: torch.Tensor
    """States entering the span, on the worker's device."""
    leaving_bTD: torch.Tensor
    """What is trained to: the teacher's states leaving it, or the tokens that follow [b, T]."""
    weights_bT: torch.Tensor | None = None
    """Of each token in the loss (see `token_weights`); None: 1."""
    owns: Owns | None = None
    """What the blocks are called with for each window, where that is not the same for all."""

    def split(self, size: int) -> Iterator[LossBatch]:
        """Consecutive parts of so many windows."""
        for first in range(0, len(self.entering_bTD), size):
            yield self.rows(slice(first, first + size))

    def rows(self, which: slice) -> LossBatch:
        """Some of the windows."""
        weights_bT = None if self.weights_bT is None else self.weights_bT[which]
        owns = None if self.owns is None else self.owns[which]
        return LossBatch(self.entering_bTD[which], self.leaving_bTD[which], weights_bT, owns)

    @property
    def tensors(self) -> Sequence[torch.Tensor]:
        """Those that a step needs on its device as wholes."""
        states = [self.entering_bTD, self.leaving_bTD]
        return states if self.weights_bT is None else [*states, self.weights_bT]

    def on(self, device: torch.device) -> LossBatch:
        """A copy there, without waiting for it."""
        states = [tensor.to(device, non_blocking=True) for tensor in self.tensors]
        weights_bT = states[2] if len(states) > 2 else None
        return LossBatch(states[0], states[1], weights_bT, self.owns)


def token_weights(windows: Windows) -> torch.Tensor | None:
    """The weight of each token in a mean over all places [W, T] that is to be one over those that
    are no padding: float32; None: 1.

    It is the same number for all of them, that of all places divided by that of tokens, so that a
    token counts alike in whichever batch it stands, and padding more changes nothing.
    """
    counted_WT = counting(windows)
    if counted_WT is None:
        return None
    return _weights(counted_WT)


def target_weights(windows: Windows) -> torch.Tensor:
    """The weight of the token after each one in a mean over all places [W, T] that is to be
    one over those that count, as in a perplexity: float32.
    """
    counted_WT = np.zeros(tokens_of(windows).shape, dtype=bool)
    targets_WS = predicted(windows)
    counted_WT[:, :-1] = True if targets_WS is None else targets_WS
    return _weights(counted_WT)


def _weights(counted_WT: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(counted_WT).float() * (counted_WT.size / counted_WT.sum())
