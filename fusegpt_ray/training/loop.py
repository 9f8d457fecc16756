"""The training loop, the same for plain torch and for DeepSpeed.

Batches come in the same order every epoch. The loop never waits for the device: losses stay on it
until an epoch ends.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable

import torch

from fusegpt_ray.training.checkpoints import Checkpoints, Log
from fusegpt_ray.training.stepper import Batch, Stepper


def train(
    stepper: Stepper,
    epoch: Callable[[], Iterable[Batch]],
    epochs: int,
    done: Callable[[int, float], None],
    checkpoints: Checkpoints | None = None,
    log: Log = lambda _: None,
) -> list[float]:
    """Run `epochs` passes over `epoch()`; returns the mean loss of each.

    Args:
        done: called after each epoch with its number (from 1) and mean loss.
        checkpoints: go on from the last one, and make others on the way.

    Raises:
        FloatingPointError: the loss is not finite, so that nothing learned can be trusted.
    """
    means, seconds = list[float](), 0.0
    if checkpoints:
        means, seconds = checkpoints.restore(stepper, epochs, log)
    began = kept = time.monotonic()
    for number in range(len(means) + 1, epochs + 1):
        losses = [stepper.step(batch) for batch in epoch()]
        mean = stepper.mean(torch.stack(losses))
        if not math.isfinite(mean):
            fix = "lower fusion.learning_rate"
            raise FloatingPointError(f"the fine-tuning loss became {mean} in epoch {number}: {fix}")
        means.append(mean)
        if checkpoints and checkpoints.due(stepper, kept):
            checkpoints.save(stepper, means, seconds + time.monotonic() - began)
            kept = time.monotonic()
        done(number, mean)
    return means
