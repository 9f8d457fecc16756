"""A loss batch in several passes through the group: the same loss and gradient, with the
activations of a micro-batch only.

Shapes: b windows of a loss batch on this worker, T tokens, D hidden size.

A loss that is a mean over rows is the mean of its micro-batches' losses. One whose batch is a
dimension (`batch_kl`) is computed on the whole batch's outputs, found without a graph; its gradient
with respect to them then enters a second pass, micro-batch by micro-batch. That costs one more
forward: four units of work for three.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fusegpt_ray.training.losses import LOSSES, MEANS_OVER_ROWS

Forward = Callable[[torch.Tensor], torch.Tensor]
Backward = Callable[[torch.Tensor, bool], None]
"""Adds a scalar's gradients to those of the step; the flag says whether it is the step's last."""


def accumulate(
    forward: Forward,
    backward: Backward,
    entering_bTD: torch.Tensor,
    leaving_bTD: torch.Tensor,
    loss: str,
    micro_batch: int | None,
    shared: bool,
) -> torch.Tensor:
    """Gradients of one loss batch, `micro_batch` windows (a divisor of b; None: all) at a time.
    Returns the loss, detached.

    `loss` and `shared`: see `losses.py`.
    """
    size = micro_batch or len(entering_bTD)
    assert len(entering_bTD) % size == 0, (len(entering_bTD), size)
    parts = entering_bTD.split(size)
    last = len(parts) - 1
    if last == 0 or loss in MEANS_OVER_ROWS:
        total = torch.zeros((), device=entering_bTD.device)
        for number, (part, teacher) in enumerate(zip(parts, leaving_bTD.split(size), strict=True)):
            value = LOSSES[loss](forward(part), teacher, shared) / len(parts)
            backward(value, number == last)
            total += value.detach()
        return total
    with torch.no_grad():
        out_bTD = torch.cat([forward(part) for part in parts])
    value = LOSSES[loss](out_bTD.requires_grad_(), leaving_bTD, shared)
    (grad_bTD,) = torch.autograd.grad(value, out_bTD)
    for number, (part, grad) in enumerate(zip(parts, grad_bTD.split(size), strict=True)):
        backward(
            (forward(part) * grad).sum(), number == last
        )  # a scalar whose gradient by the outputs is `grad`
    return value.detach()
