"""One of several workers, trained by DeepSpeed: data-parallel, ZeRO 0–3, on GPUs or (with gloo) on
CPUs.

- The loss batch is split over the workers, and the loss keeps its meaning (see `losses.py`).
- What learns is float32 beside frozen bf16 buffers. So DeepSpeed runs in float32, and the masters
  need no second copy. Only `trained_dtype: model` on a 16-bit model asks DeepSpeed for bf16 masters
  and optimizer states, which is what the paper's code has.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import distributed_c10d

from fusegpt_ray.training.batch import LossBatch
from fusegpt_ray.training.losses import LOSSES, Loss
from fusegpt_ray.training.microbatch import accumulate, mean_loss
from fusegpt_ray.training.optimizer import (
    cosine_to_zero,
    load_training_state,
    make_optimizer,
    training_state,
)
from fusegpt_ray.training.span import Span
from fusegpt_ray.training.stepper import TrainingConfig
from fusegpt_ray.workers.base import TrainingWorker


@dataclass
class DeepSpeedStepper:
    """A DeepSpeed engine around what learns in a span. The blocks themselves are plain torch's."""

    span: Span
    engine: Any
    device: torch.device
    loss: Loss
    micro_batch: int | None
    meet: partial[None]
    """Waits for the other workers after work that may take one of them longer."""

    @classmethod
    def make(
        cls,
        span: Span,
        groups: Sequence[Mapping[str, Any]],
        config: TrainingConfig,
        steps: int,
        worker: TrainingWorker,
        micro_batch: int | None,
        moved: int = 0,
        loss: Loss | None = None,
    ) -> DeepSpeedStepper:
        """
        Args:
            moved: bytes that a worker may have to read or write by itself between two steps.
            loss: None: the one that `config` names.
        """
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # On CPUs, gradients are reduced by gloo. DeepSpeed's own way would first be compiled, for a
        # minute, if there is a compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        optimizer = make_optimizer(groups, config.betas, config.eps)
        trained = list(span.learned.parameters())
        assert worker.zero_stage is not None
        engine, *_ = deepspeed.initialize(
            model=span.learned,
            optimizer=optimizer,
            lr_scheduler=cosine_to_zero(optimizer, steps, int(config.warmup * steps)),
            config=deepspeed_config(
                config.batch // worker.count,
                worker.zero_stage,
                trained=sum(value.numel() for value in trained),
                bf16=trained[0].dtype == torch.bfloat16,
            ),
        )
        # DeepSpeed makes a process group of its own, with torch's default timeout of half an hour.
        bound = timedelta(seconds=worker.timeout)
        distributed_c10d._set_pg_timeout(bound, engine.data_parallel_group)
        meet = partial(worker.meet, moved)
        return cls(span, engine, worker.device, loss or LOSSES[config.loss], micro_batch, meet)

    def step(self, batch: LossBatch) -> torch.Tensor:
        shared = dist.get_world_size() > 1
        self.span.form(self.engine)
        loss = accumulate(self.span, batch, self.loss, self.micro_batch, shared)
        self.engine.backward(self.span.root())
        self.engine.step()
        return loss

    def validate(self, batches: Iterable[LossBatch]) -> float:
        shared = dist.get_world_size() > 1
        self.span.form(self.engine)
        return self.mean(mean_loss(self.span, batches, self.loss, self.micro_batch, shared))

    def mean(self, losses: torch.Tensor) -> float:
        if self.engine.skipped_steps:  # for a gradient that is not finite, and without a word
            return math.nan
        mean = losses.mean()
        dist.all_reduce(mean)
        return mean.item() / dist.get_world_size()

    @property
    def worker(self) -> int:
        return int(dist.get_rank())

    def gather(self, row: list[int]) -> list[list[int]]:
        self.meet()
        mine = torch.tensor(row, device=self.device)
        rows = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, mine)
        return [each.tolist() for each in rows]

    def state(self) -> dict[str, torch.Tensor]:
        """Of the masters that this worker updates: with ZeRO its part of each parameter group."""
        return training_state(self.engine.lr_scheduler, self._masters)

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Put the masters in place, then make the parameters of them as a step of DeepSpeed
        does.
        """
        load_training_state(state, self.engine.lr_scheduler, self._masters)
        zero, stage = self.engine.optimizer, self.engine.zero_optimization_stage()
        if stage == 3:
            zero.checkpoint_event_prologue()
            for number in range(len(self._masters)):
                zero._reassign_or_swap_out_partitioned_parameters(number)
            zero.checkpoint_event_epilogue()
        elif stage:
            zero.update_lp_params()

    @property
    def _masters(self) -> list[torch.Tensor]:
        if self.engine.zero_optimization_stage() == 3:
            # Stage 3 hands them to the optimizer only while that steps.
            return list(self.engine.optimizer.fp32_partitioned_groups_flat)
        groups = self.engine.basic_optimizer.param_groups
        return [value for group in groups for value in group["params"]]

    def whole(self, modules: Iterable[nn.Module]) -> AbstractContextManager[Any]:
        """With ZeRO 3 each worker holds a part of every parameter; inside the context, all of those
        of these modules. Called by all workers at once.
        """
        if self.engine.zero_optimization_stage() < 3:
            return nullcontext()
        import deepspeed

        parameters = [value for module in modules for value in module.parameters()]
        return deepspeed.zero.GatheredParameters(parameters)

    def close(self) -> None:
        """Let go of what DeepSpeed holds."""
        self.engine.destroy()


def deepspeed_config(micro_batch: int, stage: int, trained: int, bf16: bool) -> dict[str, Any]:
    """DeepSpeed's configuration: one loss batch a step, no clipping (its default is 1), our own
    Adam. One backward pass a step: micro-batches are none of its business.

    Args:
        micro_batch: windows of a loss batch on each worker.
        trained: how many elements learn. It bounds the bucket in which their gradients are reduced,
            whose default of 5e8 elements takes 2 GB on every worker.
    """
    if bf16:
        # DeepSpeed keeps bf16 masters only where ZeRO partitions them; stage 1 is the same
        # arithmetic as stage 0.
        stage = max(stage, 1)
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": min(trained, 500_000_000)}
    if stage in (1, 2):
        # The norm, which nobody asks for, would make every step wait for the device. Stage 3
        # cannot do without, and skips a step whose norm is not finite: see `mean`.
        zero["compute_grad_norm"] = False
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    if bf16:
        config["bf16"] = {
            "enabled": True,
            "check_grad_overflow": False,  # see `compute_grad_norm`
            "bf16_master_weights_and_grads": True,
            "bf16_optimizer_states": True,
        }
    return config
