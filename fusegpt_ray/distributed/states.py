"""The states entering a group and the teacher's states leaving it, computed once by replicas and kept in Ray's object store.

Shapes: W windows, T tokens, D hidden size.

Notable: each training worker gets a dataset of its own with its rows of every loss batch, in order (row r of a batch always goes
to the same worker); Ray Data's own splitting promises no order. bf16 travels as int16, which Arrow and Ray Data can hold.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import ray.data
import torch
from ray.data.extensions import ArrowTensorArray

from fusegpt_ray.distributed.replicas import Replicas
from fusegpt_ray.fusion.round import Round, group_states
from fusegpt_ray.model.chunks import chunk_size
from fusegpt_ray.model.runner import Runner, state_bytes
from fusegpt_ray.training.loop import Batch

PIECES = 16
"""Objects in which a walk's states come: what a training worker holds of them at once is one or two."""


def group_states_of_workers(
    job: Round, windows_WT: np.ndarray, workers: int, replicas: Replicas, rows: int
) -> list[list[ray.ObjectRef]]:
    """For each training worker, tables of the states of the windows that it sees, in the order in which it sees them."""
    share = job.settings.batch // workers
    # [loss batches, workers, share] → each worker's windows together, in the order of the loss batches.
    numbers = (
        np.arange(len(windows_WT)).reshape(-1, workers, share).swapaxes(0, 1).reshape(workers, -1)
    )
    size = chunk_size(
        numbers.shape[1],
        rows,
        state_bytes(job.dense, windows_WT.shape[1]),
        math.ceil(replicas.pieces / workers),
    )
    chunks = [
        (worker, own[first : first + size])
        for worker, own in enumerate(numbers)
        for first in range(0, len(own), size)
    ]
    tables = dict(
        replicas.map_refs(
            _walk, [(job, windows_WT[chunk]) for _, chunk in chunks], rows, 1 + PIECES
        )
    )
    found: dict[int, list[ray.ObjectRef]] = defaultdict(list)
    for number, (worker, chunk) in enumerate(chunks):
        found[worker] += tables[number][1 : 1 + min(PIECES, len(chunk))]
    return [found[worker] for worker in range(workers)]


def datasets(tables: list[list[ray.ObjectRef]]) -> dict[str, ray.data.Dataset]:
    """`states-<rank>` → the states for that training worker."""
    with ray.data.DataContext.current(_context()):
        return {f"states-{rank}": ray.data.from_arrow_refs(own) for rank, own in enumerate(tables)}


def _walk(runner: Runner, job: Round, windows_WT: np.ndarray) -> list[pa.Table | None]:
    """Walk windows to the group's ends: nothing, and then their states in `PIECES` tables (the last ones empty if there are fewer)."""
    chunks = [
        group_states(runner, job, part)
        for part in runner.chunks(job.dense, torch.tensor(windows_WT))
    ]
    halves = [
        np.array_split(np.concatenate(list(map(_to_numpy, half))), PIECES)
        for half in zip(*chunks, strict=True)
    ]
    return [None, *(_table(*pair) for pair in zip(*halves, strict=True))]


def _table(entering: np.ndarray, leaving: np.ndarray) -> pa.Table | None:
    if not len(entering):
        return None
    return pa.table(
        {
            name: ArrowTensorArray.from_numpy(half)
            for name, half in (("entering", entering), ("leaving", leaving))
        }
    )


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
    tensor = torch.from_numpy(
        np.array(array)
    )  # a copy: what comes from the object store is read-only
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.int16 else tensor
