"""What the processes of the cluster are told: replicas and training workers alike build a runner,
and training workers form a group.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Literal

import torch

from fusegpt_ray.distributed.loading import turn
from fusegpt_ray.distributed.meeting import TIMEOUT
from fusegpt_ray.model.cache import BlockCache
from fusegpt_ray.model.compiled import compiles
from fusegpt_ray.model.device import set_deterministic
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.model.source import Source
from fusegpt_ray.model.stack import Stack


@dataclass(frozen=True)
class RunnerConfig:
    """The same for all replicas, or for all training workers."""

    dtype: torch.dtype
    """Of the arithmetic."""
    batch_size: int
    weights: Literal["auto", "resident", "streamed"] = "auto"
    memory_share: float = 1.0
    """Share of the device's free memory; see `Runner`."""
    processes: int = 1
    """How many of them a node has, at most: they share its cores."""
    cores: int | None = None
    """Of a node, where the user limits them (OMP_NUM_THREADS); None: those it has."""
    cache_gb: float | None = None
    compile: Literal["auto"] | bool = "auto"
    """The recipe's `cluster.compile`."""
    deterministic: bool = True
    """The recipe's `cluster.deterministic`."""
    hub: Source | None = None
    """A hub model, which a node that joins later does not have yet."""

    def runner(self, dense: Stack, device: torch.device) -> Runner:
        """On this node; sets the number of torch's threads, too."""
        cores = self.cores or len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // self.processes))
        set_deterministic(device, self.deterministic)
        if self.hub is not None:
            self.hub.fetch()
        with turn(_loading_bytes(dense, self.dtype), self.processes):
            return Runner(
                dense,
                device,
                self.dtype,
                self.batch_size,
                self.weights,
                self.memory_share,
                BlockCache.open(self.cache_gb),
                compiles(self.compile, device),
                host_share=1 / self.processes,
            )


def _loading_bytes(dense: Stack, dtype: torch.dtype) -> int:
    """Of the host's memory: the trunk as it is stored, and as it is computed with. Blocks are read
    later, one after another.
    """
    refs = dense.trunk.values()
    return sum(ref.end - ref.begin + dtype.itemsize * prod(ref.shape) for ref in refs)


@dataclass(frozen=True)
class JobConfig:
    """The training workers of a run."""

    count: int
    cpus: float
    gpus: float
    """That each takes of the cluster: a GPU, or the part of one that a replica leaves; 0 on CPUs.
    """
    zero_stage: int
    runner: RunnerConfig
    folder: str
    """Where Ray Train keeps files of its own, in reach of all nodes."""
    timeout: float = TIMEOUT
    """Seconds that a worker may be silent before the others give it up."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Of the nodes on which they run."""
