"""Evaluation on workers: perplexity, and the proofs that a checkpoint is read as what it is.

Shapes: W windows, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from fusegpt_ray.model.memory import find_batch_size
from fusegpt_ray.model.perplexity import mean_loss, window_losses
from fusegpt_ray.model.rows import as_rows, as_tensor, one_sample
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.publishing.plain import Plain, compare_plain
from fusegpt_ray.publishing.proof import WINDOWS, Proof
from fusegpt_ray.publishing.proof import prove as prove_here
from fusegpt_ray.samples import Batch, Samples, cut, predicted, tokens_of, with_an_image
from fusegpt_ray.workers.base import TASKS_EACH, Workers

R = TypeVar("R")


@dataclass(frozen=True, eq=False)
class Losses:
    """Of a model, window by window. The same to the last bit on any number of replicas."""

    mean_W: np.ndarray
    """float64 [W]: the mean cross-entropy of each window's targets, in nats; NaN where it has none.
    """
    targets_W: np.ndarray
    """int64 [W]: how many these are."""

    @property
    def mean(self) -> float:
        """Over all targets, in nats; its exp is the perplexity (see `model/perplexity.py`).

        Raises:
            FloatingPointError: it is not finite.
        """
        return mean_loss(torch.from_numpy(self.mean_W), self.targets_W.tolist())


def perplexity(workers: Workers, stack: Stack, windows: Batch) -> float:
    """Of the stack as a model, over these windows.

    Raises:
        FloatingPointError: it is not finite.
    """
    return math.exp(losses(workers, stack, windows).mean)


def losses(workers: Workers, stack: Stack, windows: Batch) -> Losses:
    """Of the stack as a model, on each of these windows."""
    counted_WS = predicted(windows)
    every = tokens_of(windows).shape[1] - 1
    targets_W = np.full(len(windows), every) if counted_WS is None else counted_WS.sum(axis=1)
    pieces = workers.replicas * (1 if _read_each_time(workers, stack) else TASKS_EACH)

    def attempt(batch_size: int) -> np.ndarray:
        parts = _split(windows, batch_size, pieces)
        tasks = [(stack, part) for part in parts]
        found = dict(workers.map(_losses, tasks, batch_size))
        return np.concatenate([found[number] for number in range(len(parts))])

    return Losses(_fitting(workers, attempt, "evaluation"), targets_W)


def _read_each_time(workers: Workers, stack: Stack) -> bool:
    """Whether a replica reads the stack's blocks for each of its tasks: it keeps those of no model
    that has a trunk of its own (see `Runner.for_trunk_of`).
    """
    return workers.streams or stack.trunk != workers.setup.dense.trunk


def compare_source(workers: Workers, windows: Batch) -> Plain:
    """The streamed walk of the dense model beside plain `from_pretrained` of its source."""
    setup = workers.setup
    task = (setup.source.folder, setup.dense, with_an_image(windows, 1))
    return _on_one(workers, _compare, task, "comparing with from_pretrained")


def blocks_added_behind(workers: Workers, texts: Iterable[Batch]) -> int:
    """How many blocks, from the first on, end with the last one behind which the dense model adds
    what it sees to the states (see `recorder.Context.added`); 0: it adds nothing, or no text has an
    image.
    """
    for windows in texts:
        first = with_an_image(windows, 1)
        if isinstance(first, Samples) and first.images_WT.any():
            return _on_one(workers, _added_behind, (first,), "looking at an image")
    return 0


def _added_behind(runner: Runner, windows: Samples) -> int:
    _, contexts = runner.trunk.enter(*one_sample(windows, 0))
    return max(
        (n + 1 for n, context in enumerate(contexts) if context.added is not None), default=0
    )


def prove(workers: Workers, published: Stack, folder: str, stack: Stack, windows: Batch) -> Proof:
    """That the published model in `folder` computes what the stack does (see `proof.prove`)."""
    task = (published, folder, stack, with_an_image(windows, WINDOWS))
    return _on_one(workers, _prove, task, "the proof")


def _on_one(workers: Workers, function: Callable[..., R], task: tuple[Any, ...], what: str) -> R:
    def attempt(batch_size: int) -> R:
        ((_, found),) = workers.map(function, [task], batch_size)
        return found

    return _fitting(workers, attempt, what)


def _fitting(workers: Workers, attempt: Callable[[int], R], what: str) -> R:
    batch = workers.setup.importance.batch
    return find_batch_size(attempt, batch, batch, what)[0]


def _losses(runner: Runner, stack: Stack, windows: Batch) -> np.ndarray:
    there, targets_WS = runner.for_trunk_of(stack), as_tensor(predicted(windows))
    return window_losses(there, stack, as_rows(windows), targets_WS).numpy()


def _compare(runner: Runner, folder: str, dense: Stack, windows: Batch) -> Plain:
    return compare_plain(folder, dense, runner, as_rows(windows))


def _prove(runner: Runner, published: Stack, folder: str, stack: Stack, windows: Batch) -> Proof:
    here, there = runner.for_trunk_of(stack), runner.for_trunk_of(published)
    return prove_here(published, folder, stack, here, there, as_rows(windows))


def _split(windows: Batch, batch_size: int, pieces: int) -> list[Batch]:
    """About so many pieces of consecutive windows, in whole batches, as even as those allow."""
    batches = -(-len(windows) // batch_size)
    cuts = [batch_size * (batches * i // pieces) for i in range(1, pieces)]
    return [part for part in cut(windows, cuts) if len(part)]
