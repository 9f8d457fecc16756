"""A loss batch in several passes through the span: the same loss and gradient, with the
activations of a micro-batch only.

Shapes: b windows of a loss batch on this worker, T tokens, D hidden size.

A loss that is a mean over rows is the mean of its micro-batches' losses. One whose batch is a
dimension (`batch_kl`) is computed on the whole batch's outputs, found without a graph; its gradient
with respect to them then enters a second pass, micro-batch by micro-batch. That costs one more
forward: four units of work for three.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fusegpt_ray.training.batch import LossBatch
from fusegpt_ray.training.losses import Loss, is_mean_over_rows
from fusegpt_ray.training.span import Span


def accumulate(
    span: Span,
    batch: LossBatch,
    loss: Loss,
    micro_batch: int | None,
    shared: bool,
) -> torch.Tensor:
    """Collect the gradients of one loss batch by the span's weights, `micro_batch` windows (a
    divisor of b; None: all) at a time. Returns the loss, detached.

    `loss` and `shared`: see `losses.py`.
    """
    windows = len(batch.entering_bTD)
    size = micro_batch or windows
    assert windows % size == 0, (windows, size)
    parts = list(batch.split(size))
    if len(parts) == 1 or is_mean_over_rows(loss):
        total = torch.zeros((), device=batch.entering_bTD.device)
        for part in parts:
            out_bTD = span(part.entering_bTD, part.owns)
            value = loss(out_bTD, part.leaving_bTD, shared, part.weights_bT) / len(parts)
            value.backward()
            span.collect()
            total += value.detach()
        return total
    with torch.no_grad():
        out_bTD = torch.cat([span(part.entering_bTD, part.owns) for part in parts])
    value = loss(out_bTD.requires_grad_(), batch.leaving_bTD, shared, batch.weights_bT)
    (grad_bTD,) = torch.autograd.grad(value, out_bTD)
    for part, grad in zip(parts, grad_bTD.split(size), strict=True):
        span(part.entering_bTD, part.owns).backward(grad)
        span.collect()
    return value.detach()


@torch.no_grad()
def mean_loss(
    span: Span,
    batches: Iterable[LossBatch],
    loss: Loss,
    micro_batch: int | None,
    shared: bool,
) -> torch.Tensor:
    """The mean loss of some batches by the weights that the span has formed. They are let go of."""
    found = []
    for batch in batches:
        parts = batch.split(micro_batch or len(batch.entering_bTD))
        out_bTD = torch.cat([span(part.entering_bTD, part.owns) for part in parts])
        found.append(loss(out_bTD, batch.leaving_bTD, shared, batch.weights_bT))
    span.release()
    return torch.stack(found).mean()
