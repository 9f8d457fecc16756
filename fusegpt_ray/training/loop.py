"""The training loop, the same for plain torch and for DeepSpeed.

A training has parts: the epochs of a group, which pass the same batches in the same order, or the
stretches of a single pass. The loop never waits for the device: losses stay on it until a part
ends.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable

import torch

from fusegpt_ray.training.batch import Batch
from fusegpt_ray.training.checkpoints import Checkpoints, Log
from fusegpt_ray.training.stepper import Stepper
from fusegpt_ray.training.validation import Validation


def train(
    stepper: Stepper,
    part: Callable[[int], Iterable[Batch]],
    parts: int,
    done: Callable[[int, float], None],
    checkpoints: Checkpoints | None = None,
    log: Log = lambda _: None,
    validation: Validation | None = None,
    rate_key: str = "fusion.learning_rate",
) -> list[float]:
    """Train on the batches of all parts, by number from 1; returns the mean loss of each part.

    Args:
        done: called after each part with its number and mean loss.
        checkpoints: go on from the last one, and make others on the way.
        validation: what is learned is in the end what was best on held-out windows.
        rate_key: the recipe's key of the learning rate, for messages.

    Raises:
        FloatingPointError: the loss is not finite, so that nothing learned can be trusted.
    """
    means, seconds = list[float](), 0.0
    if checkpoints:
        means, seconds = checkpoints.restore(stepper, parts, log, validation)
    if validation and not validation.losses:
        validation.look(stepper)
    began = kept = time.monotonic()
    for number in range(len(means) + 1, parts + 1):
        losses = [stepper.step(batch) for batch in part(number)]
        mean = stepper.mean(torch.stack(losses))
        if not math.isfinite(mean):
            problem = f"the training loss became {mean} in part {number} of {parts}"
            raise FloatingPointError(f"{problem}: lower {rate_key}")
        means.append(mean)
        if validation:
            validation.look(stepper, f" in part {number} of {parts}")
        if checkpoints and checkpoints.due(stepper, kept):
            checkpoints.save(stepper, means, seconds + time.monotonic() - began, validation)
            kept = time.monotonic()
        done(number, mean)
    if validation:
        validation.end(stepper)
    return means
