"""Training a span on workers: states → steps → new blocks on disk.

Shapes: W windows, T tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import nn

from fusegpt_ray.model.compiled import RunBlock
from fusegpt_ray.model.device import tensor_core_products
from fusegpt_ray.model.memory import find_batch_size
from fusegpt_ray.model.recorder import Context
from fusegpt_ray.model.stack import Block
from fusegpt_ray.store.records import FileRecord
from fusegpt_ray.training.checkpoints import Checkpoints
from fusegpt_ray.training.loop import train
from fusegpt_ray.training.prefetch import on_device
from fusegpt_ray.training.span import Span
from fusegpt_ray.training.states import States, StatesSource, own_windows
from fusegpt_ray.training.stepper import Batch, TorchStepper, TrainingConfig
from fusegpt_ray.workers.base import News, TrainingWorker, Workers


@dataclass(frozen=True)
class SavedBlocks:
    """Trained blocks on disk."""

    blocks: dict[int, Block]
    """By dense number."""
    files: dict[str, FileRecord]
    """What was written, by URI."""

    @classmethod
    def merged(cls, parts: Sequence[SavedBlocks]) -> Self:
        """What several workers saved, in the blocks' order."""
        blocks = {number: block for part in parts for number, block in part.blocks.items()}
        files = {uri: file for part in parts for uri, file in part.files.items()}
        return cls(dict(sorted(blocks.items())), dict(sorted(files.items())))


class Trainable(Protocol):
    """What is trained: it builds the span on a worker, says what learns in it, and saves it."""

    def build(
        self,
        meta_blocks: Sequence[nn.Module],
        contexts: Sequence[Context],
        device: torch.device,
        dtype: torch.dtype,
        recompute: bool,
        run: RunBlock,
    ) -> Span:
        """`meta_blocks` and `contexts`: of the dense model, by block number (see `Trunk`)."""

    def parameter_groups(self, span: Span) -> list[dict[str, Any]]:
        """What learns: {"params", "lr"} for each learning rate."""

    def save(self, span: Span, part: int, parts: int) -> SavedBlocks:
        """Write one part of the span's blocks; all parts together are the span."""


@dataclass(frozen=True)
class TrainingTask:
    """All that a worker needs to know to train a span."""

    trainable: Trainable
    source: StatesSource
    windows_WT: np.ndarray
    config: TrainingConfig
    identity: Mapping[str, Any]
    """Names what is trained: a training checkpoint of another identity is not used."""
    folder: str
    """Where its training checkpoints lie."""
    fence: Callable[[], None]
    """Called before every write: it raises where another run writes here."""


@dataclass(frozen=True)
class Trained:
    """A trained span."""

    saved: SavedBlocks
    losses: list[float]
    """Mean loss of each epoch."""
    states_batch_size: int
    """Windows that passed a block at once when states were computed: `importance.batch`, or fewer
    where memory ran out."""
    states_bytes_read: int
    """Of blocks, by all workers together, to compute the states."""
    micro_batch: int
    """Windows that passed a worker's span at once: as asked, or fewer where memory ran out."""
    states_seconds: float
    train_seconds: float
    """Including the time before a checkpoint from which training went on."""


def train_span(workers: Workers, task: TrainingTask, news: Callable[[News], None]) -> Trained:
    """Train a span and write its new blocks; goes on from its training checkpoint.

    Raises:
        FloatingPointError: the loss is not finite.
        MemoryError: not even a single window fits.
    """
    began = time.monotonic()
    batch, config = workers.setup.importance.batch, task.config

    def states(batch_size: int) -> int:
        return sum(workers.spmd(ensure_states, task, batch_size, news=news))

    read, states_batch = find_batch_size(states, batch, batch, "computing the group's states")
    states_done = time.monotonic()
    share = config.batch // workers.training_workers
    checkpoints = Checkpoints.find(
        task.folder,
        config.checkpoint_minutes,
        {**task.identity, **workers.training_setup, "states_batch_size": states_batch},
        config.micro_batch or share,
        task.fence,
    )

    def steps(micro_batch: int) -> list[tuple[list[float], SavedBlocks]]:
        kept = checkpoints.with_micro_batch(micro_batch)
        return workers.spmd(train_and_save, task, states_batch, kept, news=news)

    results, micro_batch = find_batch_size(
        steps, checkpoints.micro_batch, share, "fine-tuning the group"
    )
    return Trained(
        SavedBlocks.merged([saved for _, saved in results]),
        results[0][0],
        states_batch,
        read,
        micro_batch,
        states_done - began,
        checkpoints.seconds + time.monotonic() - states_done,
    )


def ensure_states(worker: TrainingWorker, task: TrainingTask, batch_size: int) -> int:
    """Compute the states of this worker's windows, unless it has them. Returns the bytes of blocks
    that were read for them.
    """
    before = worker.runner.weights.bytes_read
    _states(worker, task, batch_size)
    return worker.runner.weights.bytes_read - before


def _states(worker: TrainingWorker, task: TrainingTask, batch_size: int) -> States:
    key = ("states", *sorted(task.identity.items()), batch_size)
    if key not in worker.memory:
        worker.memory.clear()  # of the last task
        worker.runner.reload()
        windows = len(task.windows_WT)
        numbers = own_windows(windows, task.config.batch, worker.count, worker.rank)
        own_WT = torch.from_numpy(task.windows_WT[numbers])
        runner = worker.runner.with_batch_size(batch_size)
        worker.memory[key] = States(*task.source.walk(runner, own_WT))
    return worker.memory[key]


def train_and_save(
    worker: TrainingWorker, task: TrainingTask, states_batch: int, checkpoints: Checkpoints
) -> tuple[list[float], SavedBlocks]:
    """Train, and write this worker's part of the blocks: the epochs' losses and what it wrote."""
    config, runner = task.config, worker.runner
    states = _states(worker, task, states_batch)
    runner.reload()
    contexts = runner.trunk.contexts(checkpoints.micro_batch, task.windows_WT.shape[1])
    runner.offload()
    meta_blocks = runner.trunk.meta_blocks
    span = task.trainable.build(
        meta_blocks, contexts, worker.device, worker.dtype, config.recompute, runner.run_block
    )
    with tensor_core_products(worker.device, worker.dtype):
        first = states.entering_WTD[: checkpoints.micro_batch].to(worker.device)
        if told := span.rehearse(first):
            worker.report(f"  {told}")
    # What one worker reads or writes by itself is no more than all of this in float32, and for a
    # training checkpoint two moments more.
    held = (*span.learned.parameters(), *span.learned.buffers())
    moved = 12 * sum(value.numel() for value in held)
    worker.meet(moved + _bytes_read(task))
    stepper = _stepper(worker, task, span, checkpoints.micro_batch, moved)

    def epoch() -> Iterator[Batch]:
        worker.meet(moved)  # the first worker may still be writing the last checkpoint's record
        return on_device(states.batches(config.batch // worker.count), worker.device)

    def done(number: int, loss: float) -> None:
        if worker.rank == 0:
            worker.report((number, loss))

    with tensor_core_products(worker.device, worker.dtype):
        losses = train(stepper, epoch, config.epochs, done, checkpoints, worker.report)
    if isinstance(stepper, TorchStepper):
        saved = task.trainable.save(span, 0, 1)
    else:
        with stepper.whole():
            saved = task.trainable.save(span, worker.rank, worker.count)
            worker.meet(moved)  # nobody leaves while others need its part of the parameters
        stepper.close()
    worker.memory.clear()
    return losses, saved


def _stepper(
    worker: TrainingWorker, task: TrainingTask, span: Span, micro_batch: int, moved: int
) -> Any:
    """Plain torch's, or DeepSpeed's where the worker belongs to a process group."""
    groups, config = task.trainable.parameter_groups(span), task.config
    steps = config.epochs * len(task.windows_WT) // config.batch
    if worker.zero_stage is None:
        return TorchStepper.make(span, groups, config, steps, worker.device, micro_batch)
    from fusegpt_ray.training.deepspeed_stepper import DeepSpeedStepper

    return DeepSpeedStepper.make(span, groups, config, steps, worker, micro_batch, moved)


def _bytes_read(task: TrainingTask) -> int:
    """Of the weights that a worker may have to read from a slow store on its way to the states."""
    stack = task.source.teacher
    refs = [*stack.trunk.values()]
    refs += [ref for block in stack.blocks for ref in block.weights.values()]
    return sum(ref.end - ref.begin for ref in refs)
