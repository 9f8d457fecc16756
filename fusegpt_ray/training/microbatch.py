"""A loss batch in several passes through the span: the same loss and gradient, with the
activations of a micro-batch only.

Shapes: b windows of a loss batch on this worker, T tokens, D hidden size.

A loss that is a mean over rows is the mean of its micro-batches' losses. One whose batch is a
dimension (`batch_kl`) is computed on the whole batch's outputs, found without a graph; its gradient
with respect to them then enters a second pass, micro-batch by micro-batch. That costs one more
forward: four units of work for three.
"""

from __future__ import annotations

import torch

from fusegpt_ray.training.losses import LOSSES, MEANS_OVER_ROWS
from fusegpt_ray.training.span import Span


def accumulate(
    span: Span,
    entering_bTD: torch.Tensor,
    leaving_bTD: torch.Tensor,
    loss: str,
    micro_batch: int | None,
    shared: bool,
) -> torch.Tensor:
    """Collect the gradients of one loss batch by the span's weights, `micro_batch` windows (a
    divisor of b; None: all) at a time. Returns the loss, detached.

    `loss` and `shared`: see `losses.py`.
    """
    size = micro_batch or len(entering_bTD)
    assert len(entering_bTD) % size == 0, (len(entering_bTD), size)
    parts = entering_bTD.split(size)
    if len(parts) == 1 or loss in MEANS_OVER_ROWS:
        total = torch.zeros((), device=entering_bTD.device)
        for part, teacher in zip(parts, leaving_bTD.split(size), strict=True):
            value = LOSSES[loss](span(part), teacher, shared) / len(parts)
            value.backward()
            span.collect()
            total += value.detach()
        return total
    with torch.no_grad():
        out_bTD = torch.cat([span(part) for part in parts])
    value = LOSSES[loss](out_bTD.requires_grad_(), leaving_bTD, shared)
    (grad_bTD,) = torch.autograd.grad(value, out_bTD)
    for part, grad in zip(parts, grad_bTD.split(size), strict=True):
        span(part).backward(grad)
        span.collect()
    return value.detach()
