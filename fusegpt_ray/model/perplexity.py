"""Perplexity over consecutive windows, block by block, so that a model of any depth is evaluated in
the memory of a few blocks.

The model sees each window alone, at positions 0 … T−1. Its loss is the mean cross-entropy of tokens
1 … T−1, each predicted from those before it in the window. Where windows begin with a
beginning-of-sequence token, that token is no target: all T−1 tokens of text are, and the first of
them is predicted from it. Where they do not, the first token of text is no target. Perplexity is
exp of the mean over all targets; padding is none, and of conversations with images only the tokens
of answers are.

Shapes: W windows, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fusegpt_ray.model.rows import Rows
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.model.stack import Stack


def window_losses(
    runner: Runner, stack: Stack, windows: Rows, targets_WS: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean cross-entropy in nats of each window: [W] float64.

    `targets_WS`: see `Runner.token_losses`.
    """
    for h_WTD in runner.walk(stack, windows):  # noqa: B007 - the last states are wanted
        pass
    return runner.token_losses(h_WTD, windows, targets_WS)


def mean_loss(losses_W: torch.Tensor, targets: Sequence[int]) -> float:
    """In nats, over all targets, of which each window has so many, of these mean losses. For
    windows of equal length, as the field reports it, that is the mean of the windows.

    Raises:
        FloatingPointError: a loss is not finite, or so large that the perplexity is not.
    """
    most = max(targets)  # so that the weights are exactly 1 where all windows have as many
    weights = [number / most for number in targets]
    terms = zip(losses_W.tolist(), weights, strict=True)
    mean = math.fsum(loss * weight for loss, weight in terms if weight) / math.fsum(weights)
    if not mean < 700:  # NaN, Inf, or e^mean beyond a float
        reason = "NaN or Inf in the model's weights, or an overflow in its arithmetic"
        raise FloatingPointError(f"the mean loss is {mean}: {reason}")
    return mean
