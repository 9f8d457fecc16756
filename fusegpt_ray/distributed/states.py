"""The states entering a group and the teacher's states leaving it, computed once by replicas and kept in Ray's object store.

Shapes: W windows, T tokens, D hidden size.

Notable: each training worker gets a dataset of its own with its rows of every loss batch, in order (row r of a batch always goes
to the same worker); Ray Data's own splitting promises no order. bf16 travels as int16, which Arrow and Ray Data can hold.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import ray.data
import torch

from fusegpt_ray.distributed.scoring import Replica
from fusegpt_ray.fusion.finetune import Batch
from fusegpt_ray.fusion.round import Round, group_states
from fusegpt_ray.runner import chunk_size, state_bytes


def _walk(batch: dict[str, np.ndarray], job: Round, replica: Replica) -> Iterator[dict[str, np.ndarray]]:
    """A replica's task: walk a chunk of windows to the group's ends, and yield their states a few windows at a time."""
    runner = replica.runner(job.dense)
    (windows_WT,) = batch["windows"]
    entering, leaving = group_states(runner, job, torch.tensor(windows_WT))
    for first in range(0, len(entering), runner.rows):
        part = slice(first, first + runner.rows)
        yield {"entering": _to_numpy(entering[part]), "leaving": _to_numpy(leaving[part])}


def state_datasets(job: Round, windows_WT: np.ndarray, workers: int, replica: Replica) -> dict[str, ray.data.Dataset]:
    """`states-<rank>` → the states of the windows that this training worker sees, materialised, in the order it sees them."""
    share = job.settings.batch // workers
    # [loss batches, workers, share] → each worker's windows together, in the order of the loss batches.
    numbers = np.arange(len(windows_WT)).reshape(-1, workers, share).swapaxes(0, 1).ravel()
    size = chunk_size(len(numbers), replica.rows, state_bytes(job.dense, windows_WT.shape[1]), replica.count)
    chunks = [windows_WT[numbers[first : first + size]] for first in range(0, len(numbers), size)]
    with ray.data.DataContext.current(_context()):
        # A block a chunk, and so a task a chunk: Ray Data never splits a block over tasks.
        rows = ray.data.from_items([{"windows": chunk} for chunk in chunks], override_num_blocks=len(chunks))
        states = rows.map_batches(
            _walk,
            fn_kwargs={"job": job, "replica": replica},
            batch_size=1,
            compute=ray.data.TaskPoolStrategy(size=replica.count),
            **replica.resources,
        ).materialize()
        parts = states.split_at_indices([len(numbers) * rank // workers for rank in range(1, workers)]) if workers > 1 else [states]
    return {f"states-{rank}": part for rank, part in enumerate(parts)}


def batches(shard: ray.data.DataIterator, size: int) -> Iterator[Batch]:
    """The batches of one worker, in order."""
    for batch in shard.iter_batches(batch_size=size, batch_format="numpy", prefetch_batches=2):
        yield _to_torch(batch["entering"]), _to_torch(batch["leaving"])


def _context() -> ray.data.DataContext:
    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    return context


def _to_numpy(h: torch.Tensor) -> np.ndarray:
    h = h.cpu()
    return (h.view(torch.int16) if h.dtype == torch.bfloat16 else h).numpy()


def _to_torch(array: np.ndarray) -> torch.Tensor:
    tensor = torch.from_numpy(np.array(array))  # a copy: what comes from the object store is read-only
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.int16 else tensor
