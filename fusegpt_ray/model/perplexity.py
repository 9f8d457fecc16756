"""Perplexity over consecutive windows, block by block, so that a model of any depth is evaluated in
the memory of a few blocks.

The model sees each window alone, at positions 0 … T−1. Its loss is the mean cross-entropy of tokens
1 … T−1, each predicted from those before it in the window. Where windows begin with a
beginning-of-sequence token, that token is no target: all T−1 tokens of text are, and the first of
them is predicted from it. Where they do not, the first token of text is no target. Perplexity is
exp of the mean of the windows' losses.

Shapes: W windows, T tokens.
"""

from __future__ import annotations

import math

import torch

from fusegpt_ray.model.runner import Runner
from fusegpt_ray.model.stack import Stack


def window_losses(runner: Runner, stack: Stack, windows_WT: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of each window: [W] float64."""
    for h_WTD in runner.walk(stack, windows_WT):  # noqa: B007 - the last states are wanted
        pass
    return runner.token_losses(h_WTD, windows_WT)


def perplexity(losses_W: torch.Tensor) -> float:
    """exp of the mean of the windows' mean losses, as the field reports it for windows of equal
    length.

    Raises:
        FloatingPointError: a loss is not finite, or so large that the perplexity is not.
    """
    mean = math.fsum(losses_W.tolist()) / len(losses_W)
    if not mean < 700:  # NaN, Inf, or e^mean beyond a float
        reason = "NaN or Inf in the model's weights, or an overflow in its arithmetic"
        raise FloatingPointError(f"the mean loss is {mean}: {reason}")
    return math.exp(mean)
