"""Scoring and evaluation as Ray tasks, each on a model replica of its own (which is read block by block).

Shapes: W windows, N blocks, T tokens.

Windows are split over replicas in whole batches, so that every window meets the same arithmetic on any number of replicas; the sums
come back per window. What is walked is decided here (`importance/search.py`), wave by wave, and does not depend on the number of
replicas either. Tasks are pure functions of their arguments: a lost one is simply run again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch

from fusegpt_ray.anatomy import Context
from fusegpt_ray.importance.ranking import Ranking
from fusegpt_ray.importance.search import Job, block_forwards, search
from fusegpt_ray.importance.sweep import Part, sweep
from fusegpt_ray.perplexity import perplexity, window_losses
from fusegpt_ray.proof import WINDOWS, Proof
from fusegpt_ray.proof import prove as prove_here
from fusegpt_ray.recipe import Importance
from fusegpt_ray.runner import Runner
from fusegpt_ray.stack import Stack


@dataclass(frozen=True)
class Replica:
    """What one replica takes of the cluster, and how it computes."""

    count: int
    cpus: float
    gpus: float
    threads: int
    """Threads of torch on a CPU."""
    dtype: torch.dtype
    """Of the arithmetic."""
    rows: int

    @property
    def resources(self) -> dict[str, Any]:
        return {"num_cpus": self.cpus, "num_gpus": self.gpus}

    def runner(self, stack: Stack) -> Runner:
        """Built inside the task, on the GPU it was given, else on the CPU (Ray does not hide GPUs from a task that asked for none)."""
        torch.set_num_threads(self.threads)
        if self.gpus and not torch.cuda.is_available():
            raise RuntimeError("Ray gave this task a GPU, and torch cannot use it: check the driver and torch's CUDA build")
        return Runner(stack, torch.device("cuda" if self.gpus else "cpu"), self.dtype, self.rows)

    def task(self, function: Callable[..., Any]) -> Any:
        """The function as a Ray task of a replica. On a GPU its process ends with it: else it would keep the GPU's memory."""
        remote = ray.remote(max_calls=1)(function) if self.gpus else ray.remote(function)
        return remote.options(**self.resources)


def score(stack: Stack, windows_WT: np.ndarray, settings: Importance, replica: Replica, last: Ranking | None) -> Ranking:
    """See `Engine.score`."""
    batches = np.split(windows_WT, range(settings.batch, len(windows_WT), settings.batch))

    def measure(jobs: list[Job]) -> list[np.ndarray]:
        shares = _balance([block_forwards(len(stack), positions) for _, positions in jobs], replica.count)
        parts = [[(batches[jobs[n][0]], jobs[n][1]) for n in share] for share in shares]
        tasks = [replica.task(_sweep).remote(stack, share, replica) for share in parts]
        sums = dict(zip((n for share in shares for n in share), (s for part in ray.get(tasks) for s in part), strict=True))
        return [sums[n] for n in range(len(jobs))]

    return search(measure, stack.kept, list(map(len, batches)), windows_WT.shape[1], settings, last)


def evaluate(stack: Stack, windows_WT: np.ndarray, replica: Replica) -> float:
    """Perplexity."""
    shares = _shares(windows_WT, replica.rows, replica.count)
    tasks = [replica.task(_losses).remote(stack, share, replica) for share in shares]
    return perplexity(torch.from_numpy(np.concatenate(ray.get(tasks))))


def prove(published: Stack, folder: str, stack: Stack, windows_WT: np.ndarray, replica: Replica) -> Proof:
    """See `proof.prove`; on one replica, which has never seen the published model before."""
    return ray.get(replica.task(_prove).remote(published, folder, stack, windows_WT[:WINDOWS], replica))


def contexts(stack: Stack, rows: int, length: int, replica: Replica) -> list[Context]:
    """See `Trunk.contexts`; on the CPU. A task of its own, so that only a replica ever holds the trunk."""
    return ray.get(replica.task(_contexts).remote(stack, rows, length, replica))


def _contexts(stack: Stack, rows: int, length: int, replica: Replica) -> list[Context]:
    return [context.to("cpu") for context in replica.runner(stack).trunk.contexts(rows, length)]


def _sweep(stack: Stack, parts: list[tuple[np.ndarray, tuple[int, ...]]], replica: Replica) -> list[np.ndarray]:
    walked = sweep(replica.runner(stack), stack, [Part(torch.tensor(windows_WT), positions) for windows_WT, positions in parts])
    return [sums_WC.numpy() for sums_WC in walked]


def _prove(published: Stack, folder: str, stack: Stack, windows_WT: np.ndarray, replica: Replica) -> Proof:
    here, there = replica.runner(stack), replica.runner(published)
    return prove_here(published, folder, stack, here, there, torch.tensor(windows_WT))


def _losses(stack: Stack, windows_WT: np.ndarray, replica: Replica) -> np.ndarray:
    return window_losses(replica.runner(stack), stack, torch.tensor(windows_WT)).numpy()


def _shares(windows_WT: np.ndarray, batch: int, replicas: int) -> list[np.ndarray]:
    """Consecutive windows for each replica, in whole batches, as even as those allow."""
    batches = -(-len(windows_WT) // batch)
    cuts = [batch * (batches * i // replicas) for i in range(1, replicas)]
    return [share for share in np.split(windows_WT, cuts) if len(share)]


def _balance(costs: list[int], replicas: int) -> list[list[int]]:
    """The numbers of jobs for each replica that gets some, of about the same cost: the dearest first, each to who has least."""
    shares: list[list[int]] = [[] for _ in range(replicas)]
    loads = [0] * replicas
    for job in sorted(range(len(costs)), key=lambda job: -costs[job]):
        least = loads.index(min(loads))
        shares[least].append(job)
        loads[least] += costs[job]
    return [share for share in shares if share]
