"""A group of the tiny model, trained by plain torch or by one of several DeepSpeed workers.

Only light imports of the tests' own: a spawned process imports all of this module.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from models import open_stack, token_windows

from fusegpt_ray.fusion.group_fusion import GroupFusion
from fusegpt_ray.model.rows import as_rows
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.recipe.cluster_section import Cluster
from fusegpt_ray.recipe.sections import Fusion
from fusegpt_ray.recipe.specs import PRESETS
from fusegpt_ray.training.deepspeed_stepper import DeepSpeedStepper
from fusegpt_ray.training.span import Span
from fusegpt_ray.training.states import States, own_windows
from fusegpt_ray.training.stepper import TorchStepper
from fusegpt_ray.training.task import TrainingTask
from fusegpt_ray.workers.base import TrainingWorker

CPU = torch.device("cpu")
LENGTH = 12
SMALL = PRESETS["rounds"]["fusion"] | {
    "group_size": 3,
    "rank": 4,
    "lora_rank": 4,
    "learning_rate": 0.01,
    "lora_learning_rate": 0.005,
    "fold": "at_end",  # so that what was learned is saved, too
}
"""Settings of a group that trains fast; `batch` and `epochs` come on top."""


def fusion(folder: Path, out: str = "nowhere", **settings: Any) -> GroupFusion:
    """The fusion of block 2 of the model in `folder` into its neighbours."""
    dense = open_stack(folder)
    return GroupFusion(dense, dense, 2, Fusion(**SMALL | settings), True, 0, out)


@contextmanager
def process_group(rank: int, workers: int, out: Path) -> Iterator[None]:
    """One process of a gloo group of `workers`, as Ray Train makes one on CPUs."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # whatever there is: DeepSpeed looks when it is imported
    torch.set_num_threads(1)
    meet = f"file://{out}/meet{workers}"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=workers)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(workers), LOCAL_RANK=str(rank))
    yield
    dist.barrier()
    dist.destroy_process_group()


@dataclass
class Group:
    """All that one worker needs to train a group on `windows` windows."""

    fusion: GroupFusion
    windows: int
    rank: int = 0
    workers: int = 1
    zero_stage: int | None = None
    micro_batch: int | None = None
    dtype: torch.dtype = torch.float32
    recompute: bool = False
    checkpoints: str = "nowhere"
    minutes: float = 1e6
    said: list[Any] = field(default_factory=list)
    """What the worker reported."""

    @cached_property
    def task(self) -> TrainingTask:
        windows_WT = token_windows(self.windows, LENGTH).numpy()
        cluster = Cluster(
            workers=self.workers,
            micro_batch=self.micro_batch,
            recompute_activations=self.recompute,
            checkpoint_minutes=self.minutes,
        )
        return self.fusion.task(windows_WT, cluster, "dense", self.checkpoints)

    @cached_property
    def runner(self) -> Runner:
        return Runner(self.fusion.dense, CPU, self.dtype, self.fusion.settings.batch)

    @cached_property
    def worker(self) -> TrainingWorker:
        return TrainingWorker(
            self.rank,
            self.workers,
            CPU,
            self.zero_stage,
            self.runner,
            self.said.append,
            timeout=300,
        )

    @property
    def share(self) -> int:
        """This worker's windows of a loss batch."""
        return self.fusion.settings.batch // self.workers

    @property
    def steps(self) -> int:
        return self.task.config.epochs * self.windows // self.task.config.batch

    def states(self) -> States:
        own = own_windows(self.windows, self.task.config.batch, self.workers, self.rank)
        rows = as_rows(self.task.windows[own])
        return States(*self.task.source.walk(self.runner, rows))

    def span(self) -> Span:
        trunk = self.runner.trunk
        contexts = trunk.contexts(self.micro_batch or self.share, LENGTH)
        return self.fusion.build(trunk.meta_blocks, contexts, CPU, self.dtype, self.recompute)

    def stepper(self, span: Span) -> TorchStepper | DeepSpeedStepper:
        groups, config = self.fusion.parameter_groups(span), self.task.config
        micro_batch = self.micro_batch or self.share
        if self.zero_stage is None:
            return TorchStepper.make(span, groups, config, self.steps, CPU, micro_batch)
        return DeepSpeedStepper.make(span, groups, config, self.steps, self.worker, micro_batch)


def after(first: Callable[[], None], then: Callable[[], Any]) -> Callable[[], Any]:
    """A function that calls both."""

    def both() -> Any:
        first()
        return then()

    return both
