"""Training a span on workers: states → steps → new blocks on disk.

Shapes: W windows, T tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from fusegpt_ray.model.device import full_products, tensor_core_products
from fusegpt_ray.model.memory import find_batch_size
from fusegpt_ray.model.rows import Own, as_rows
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.termination import saving_first
from fusegpt_ray.training.batch import LossBatch
from fusegpt_ray.training.checkpoints import Checkpoints
from fusegpt_ray.training.loop import train
from fusegpt_ray.training.losses import Loss
from fusegpt_ray.training.partition import Partition
from fusegpt_ray.training.prefetch import on_device
from fusegpt_ray.training.span import Span
from fusegpt_ray.training.states import States, own_windows
from fusegpt_ray.training.stepper import TorchStepper
from fusegpt_ray.training.task import HELD_OUT, SavedBlocks, TrainingTask
from fusegpt_ray.training.validation import Validation
from fusegpt_ray.workers.base import News, TrainingWorker, Workers

Pause = Callable[[str, int], None]
"""Told of the folder with training checkpoints, and of the part that is done."""


@dataclass(frozen=True)
class Outcome:
    """Of one worker."""

    losses: list[float]
    held_out: list[float]
    saved: SavedBlocks
    bytes_read: int
    """Of blocks, to compute states on the way."""


@dataclass(frozen=True)
class Learned:
    """What one worker has in its memory after a training."""

    losses: list[float]
    held_out: list[float]
    span: Span
    stepper: Any
    moved: int
    """A bound for the bytes that a worker reads or writes by itself between two steps."""


@dataclass(frozen=True)
class Trained:
    """A trained span."""

    saved: SavedBlocks
    losses: list[float]
    """Mean loss of each part: of a group, of each epoch."""
    held_out: list[float]
    """Loss of the held-out windows, if there are any, at the beginning and after each part."""
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


def train_span(
    workers: Workers,
    task: TrainingTask,
    news: Callable[[News], None],
    pause: Pause = lambda folder, part: None,
) -> Trained:
    """Train a span and write its new blocks; goes on from its training checkpoint.

    Args:
        pause: called after `news` of a part of the training; what it raises ends the training.

    Raises:
        FloatingPointError: the loss is not finite.
        MemoryError: not even a single window fits.
        Terminated: SIGTERM came; a training checkpoint is made, if there was time.
    """
    began = time.monotonic()

    def told(item: News) -> None:
        news(item)
        if not isinstance(item, str):
            pause(task.folder, item[0])

    batch, config = workers.setup.importance.batch, task.config

    def states(batch_size: int) -> int:
        return sum(workers.spmd(ensure_states, task, batch_size, news=news))

    read, states_batch = find_batch_size(states, batch, batch, f"computing states for {task.what}")
    states_done = time.monotonic()
    share = config.batch // workers.training_workers
    checkpoints = Checkpoints.find(
        task.folder,
        config.checkpoint_minutes,
        {**task.identity, **workers.training_setup, "states_batch_size": states_batch},
        config.micro_batch or share,
        task.fence,
    )

    def steps(micro_batch: int) -> list[Outcome]:
        kept = checkpoints.with_micro_batch(micro_batch)
        with saving_first():
            return workers.spmd(train_and_save, task, states_batch, kept, news=told)

    results, micro_batch = find_batch_size(steps, checkpoints.micro_batch, share, task.what)
    return Trained(
        SavedBlocks.merged([outcome.saved for outcome in results]),
        results[0].losses,
        results[0].held_out,
        states_batch,
        read + sum(outcome.bytes_read for outcome in results),
        micro_batch,
        states_done - began,
        checkpoints.seconds + time.monotonic() - states_done,
    )


def ensure_states(worker: TrainingWorker, task: TrainingTask, batch_size: int) -> int:
    """Compute the states that this worker's training begins with, unless it has them. Returns the
    bytes of blocks that were read for them.
    """
    before = worker.runner.weights.bytes_read
    worker.runner.reload()
    for part in task.first_states:
        _states(worker, task, batch_size, part)
    return worker.runner.weights.bytes_read - before


def _states(worker: TrainingWorker, task: TrainingTask, batch_size: int, part: int) -> States:
    """Those of the windows that this worker trains on in one part of a pass, or of its held-out
    ones. They are kept for the other passes; of a single pass only until the next part begins.
    """
    config, memory = task.config, worker.memory
    this = ("states", *sorted(task.identity.items()), batch_size)
    key = (*this, part)
    if key not in memory:
        ends = config.epochs == 1 and part != HELD_OUT
        for old in list(memory):
            if old[:-1] != this or (ends and old[-1] != HELD_OUT):
                del memory[old]
        windows, of = (task.windows, (part, config.parts))
        if part == HELD_OUT:
            assert task.held_out is not None
            windows, of = task.held_out, (1, 1)
        own = own_windows(len(windows), config.batch, worker.count, worker.rank, *of)
        weights_WT = task.source.weights(windows)
        own_weights_WT = None if weights_WT is None else weights_WT[own]
        runner, rows = worker.runner.with_batch_size(batch_size), as_rows(windows[own])
        owns: list[Own] = []
        with full_products():
            both = task.source.walk(runner, rows, owns)
        memory[key] = States(*both, own_weights_WT, owns or None)
    return memory[key]


def train_and_save(
    worker: TrainingWorker, task: TrainingTask, states_batch: int, checkpoints: Checkpoints
) -> Outcome:
    """Train, and write this worker's part of the blocks."""
    before = worker.runner.weights.bytes_read
    learned = learn(worker, task, states_batch, checkpoints.micro_batch, checkpoints)
    saved = _save(worker, task, learned)
    worker.memory.clear()
    read = worker.runner.weights.bytes_read - before
    return Outcome(learned.losses, learned.held_out, saved, read)


def learn(
    worker: TrainingWorker,
    task: TrainingTask,
    states_batch: int,
    micro_batch: int,
    checkpoints: Checkpoints | None = None,
) -> Learned:
    """Train without saving what was learned.

    Args:
        states_batch, micro_batch: windows that pass a block at once to compute states, and the
            worker's span.
        checkpoints: None: a training that is begun again if it is stopped.
    """
    config, size = task.config, task.config.batch // worker.count
    worker.runner.reload()
    begins = [_states(worker, task, states_batch, part) for part in task.first_states]
    first = next(begins[0].batches(size)).rows(slice(micro_batch))
    student = worker.runner.for_trunk_of(task.source.stack)
    span, moved = _span(worker, task, student, first)
    worker.meet(moved + _bytes_read(task))
    loss = task.trainable.loss(student.trunk, worker.runner.trunk)
    stepper = _stepper(worker, task, span, micro_batch, moved, loss)

    def part(number: int) -> Iterable[LossBatch]:
        states = _states(worker, task, states_batch, 1 + (number - 1) % config.parts)
        # The others may still compute theirs, or the first one write a checkpoint's record.
        worker.meet(moved + _bytes_read(task))
        return on_device(states.batches(size), worker.device)

    def done(number: int, loss: float) -> None:
        if worker.rank == 0:
            worker.report((number, loss, validation.losses[-1] if validation else None))

    validation = None
    if task.held_out is not None:
        validation = Validation(
            lambda: on_device(begins[0].batches(size), worker.device), lambda: worker.meet(moved)
        )
    with tensor_core_products(worker.device, worker.dtype):
        losses = train(
            stepper,
            part,
            config.epochs * config.parts,
            done,
            checkpoints,
            worker.report,
            validation,
            task.rate_key,
            worker.notices,
        )
    return Learned(losses, validation.losses if validation else [], span, stepper, moved)


def _span(
    worker: TrainingWorker, task: TrainingTask, student: Runner, first: LossBatch
) -> tuple[Span, int]:
    """The span, rehearsed with the first micro-batch; and a bound for the bytes that a worker
    reads or writes by itself between two steps.

    Args:
        student: the worker's runner, or one with the trunk of the model that is trained.
    """
    runner, trainable = worker.runner, task.trainable
    runner.reload()
    contexts = student.trunk.contexts(*first.entering_bTD.shape[:2])
    runner.offload(trunk=not trainable.uses_head)
    partitioned = worker.count > 1 and worker.zero_stage == 3
    span = trainable.build(
        student.trunk.meta_blocks,
        contexts,
        worker.device,
        worker.dtype,
        task.config.recompute,
        student.run_block,
        Partition(worker.rank, worker.count) if partitioned else None,
    )
    # What one worker reads or writes by itself is no more than all of this in float32, and for a
    # training checkpoint two moments more.
    held = (*span.learned.parameters(), *span.learned.buffers())
    moved = 12 * sum(value.numel() for value in held)
    if partitioned:  # from now on a pass gathers the frozen weights of all workers
        worker.meet(moved + _bytes_read(task))
    with tensor_core_products(worker.device, worker.dtype):
        if told := span.rehearse(first.entering_bTD.to(worker.device), first.owns):
            worker.report(f"  {told}")
    return span, moved


def _save(worker: TrainingWorker, task: TrainingTask, learned: Learned) -> SavedBlocks:
    """Each worker writes a block at the same time, and no more blocks than that are whole."""
    span, stepper = learned.span, learned.stepper
    if isinstance(stepper, TorchStepper):
        return task.trainable.save(span, 0, 1)
    saved, count = list[SavedBlocks](), len(span.blocks)
    for first in range(0, count, worker.count):
        with stepper.whole(span.learned.blocks[first : first + worker.count]):
            if (own := first + worker.rank) < count:
                saved.append(task.trainable.save(span, own, count))
            # Nobody leaves while others need its part of the parameters.
            worker.meet(learned.moved)
    stepper.close()
    return SavedBlocks.merged(saved)


def _stepper(
    worker: TrainingWorker,
    task: TrainingTask,
    span: Span,
    micro_batch: int,
    moved: int,
    loss: Loss,
) -> Any:
    """Plain torch's, or DeepSpeed's where the worker belongs to a process group."""
    groups, config = task.trainable.parameter_groups(span), task.config
    steps = config.epochs * len(task.windows) // config.batch
    if worker.zero_stage is None:
        return TorchStepper.make(span, groups, config, steps, worker.device, micro_batch, loss)
    from fusegpt_ray.training.deepspeed_stepper import DeepSpeedStepper

    return DeepSpeedStepper.make(span, groups, config, steps, worker, micro_batch, moved, loss)


def _bytes_read(task: TrainingTask) -> int:
    """Of the weights that a worker may have to read from a slow store on its way to the states."""
    return sum(ref.end - ref.begin for ref in task.source.read.refs)
