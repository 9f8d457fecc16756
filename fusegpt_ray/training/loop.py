"""The training loop, the same for plain torch and for DeepSpeed.

A training has parts: the epochs of a group, which pass the same batches in the same order, or the
stretches of a single pass. The loop does not wait for the device: losses stay on it until a part
ends. Only the question whether to pause waits for it, every few seconds (`pauses.py`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from itertools import islice

import torch

from fusegpt_ray.training.batch import LossBatch
from fusegpt_ray.training.checkpoints import Checkpoints, Log, Progress
from fusegpt_ray.training.pauses import Pauses
from fusegpt_ray.training.stepper import Stepper
from fusegpt_ray.training.validation import Validation
from fusegpt_ray.workers.base import Notices


def train(
    stepper: Stepper,
    part: Callable[[int], Iterable[LossBatch]],
    parts: int,
    done: Callable[[int, float], None],
    checkpoints: Checkpoints | None = None,
    log: Log = lambda _: None,
    validation: Validation | None = None,
    rate_key: str = "fusion.learning_rate",
    notices: Notices | None = None,
) -> list[float]:
    """Train on the batches of all parts, by number from 1; returns the mean loss of each part.

    Args:
        done: called after each part with its number and mean loss.
        checkpoints: go on from the last one, and make others on the way.
        validation: what is learned is in the end what was best on held-out windows.
        rate_key: the recipe's key of the learning rate, for messages.
        notices: upon which a checkpoint is made within a part.

    Raises:
        FloatingPointError: the loss is not finite, so that nothing learned can be trusted.
        Terminated: a notice said that the run is to end, and a checkpoint is made.
    """
    so_far = checkpoints.restore(stepper, parts, log, validation) if checkpoints else Progress()
    if validation and not validation.losses:
        validation.look(stepper)
    before, began = so_far.seconds, time.monotonic()
    pauses = Pauses(stepper, checkpoints, notices or Notices()) if checkpoints else None

    def mean_of(number: int) -> float:
        mean = stepper.mean(torch.stack(so_far.losses))
        return _trusted(mean, f"part {number} of {parts}", rate_key)

    def save() -> None:
        assert checkpoints
        so_far.seconds = before + time.monotonic() - began
        so_far.held_out = validation.losses if validation else []
        checkpoints.save(stepper, so_far, validation)

    for number in range(len(so_far.means) + 1, parts + 1):
        for batch in islice(part(number), len(so_far.losses), None):
            so_far.losses.append(stepper.step(batch))
            if pauses and pauses.after_step():
                mean_of(number)  # nothing is kept that cannot be trusted
                save()
                pauses.made()
        so_far.means.append(mean_of(number))
        so_far.losses = []
        if validation:
            validation.look(stepper, f" in part {number} of {parts}")
        due = pauses and pauses.after_part()
        if due:
            save()
        done(number, so_far.means[-1])
        if pauses and due:
            pauses.made()
    if validation:
        validation.end(stepper)
    return so_far.means


def _trusted(loss: float, where: str, rate_key: str) -> float:
    if not math.isfinite(loss):
        problem = f"the training loss became {loss} in {where}"
        raise FloatingPointError(f"{problem}: lower {rate_key}")
    return loss
