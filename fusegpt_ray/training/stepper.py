"""One optimizer step on one batch: what every way to train offers the loop, and plain torch's way.

Shapes: b windows of a loss batch on this worker, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.optim.lr_scheduler import LambdaLR

from fusegpt_ray.recipe.cluster_section import Cluster
from fusegpt_ray.recipe.sections import Fusion
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


@dataclass(frozen=True)
class TrainingConfig:
    """How a span is trained, whatever it is."""

    loss: str
    """One of `losses.LOSSES`, or the name of a loss that what is trained brings."""
    batch: int
    """Windows of a loss batch, over all workers."""
    epochs: int
    """Passes over the windows."""
    parts: int = 1
    """That a pass is divided into. After each, the mean loss is told, a training checkpoint can be
    made, and held-out windows are looked at."""
    warmup: float = 0.0
    """Share of the steps in which the learning rate grows."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    micro_batch: int | None = None
    """Windows that pass a worker's span at once; None: its whole share of the loss batch."""
    recompute: bool = False
    """See `Span`."""
    checkpoint_minutes: float = 5.0
    """At least so many minutes pass between two training checkpoints."""

    @classmethod
    def of(cls, settings: Fusion, cluster: Cluster, loss: str) -> TrainingConfig:
        """As a recipe says of the blocks that its rounds train."""
        return cls(
            loss=loss,
            batch=settings.batch,
            epochs=settings.epochs,
            betas=settings.betas,
            eps=settings.eps,
            micro_batch=cluster.micro_batch,
            recompute=cluster.recompute_activations,
            checkpoint_minutes=cluster.checkpoint_minutes,
        )


class Stepper(Protocol):
    """Trains a span, alone or as one of several workers."""

    device: torch.device

    @property
    def worker(self) -> int:
        """Its number, from 0."""

    def step(self, batch: LossBatch) -> torch.Tensor:
        """Forward, backward, update. Returns this worker's loss: a detached scalar on the
        device.
        """

    def mean(self, losses: torch.Tensor) -> float:
        """The mean of these losses over all workers. Called by all workers at once."""

    def validate(self, batches: Iterable[LossBatch]) -> float:
        """The mean loss of batches that nothing is learned from. Called by all workers at once."""

    def gather(self, row: list[int]) -> list[list[int]]:
        """The rows of all workers, by their number. Called by all workers at once."""

    def state(self) -> dict[str, torch.Tensor]:
        """All that this worker's next steps depend on: the tensors themselves, not copies."""

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from such a state. Called by all workers at once."""


@dataclass
class TorchStepper:
    """One process, plain torch."""

    span: Span
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    device: torch.device
    loss: Loss
    micro_batch: int | None

    @classmethod
    def make(
        cls,
        span: Span,
        groups: Sequence[Mapping[str, Any]],
        config: TrainingConfig,
        steps: int,
        device: torch.device,
        micro_batch: int | None = None,
        loss: Loss | None = None,
    ) -> TorchStepper:
        """
        Args:
            groups: of parameters, {"params", "lr"}.
            steps: of the whole training.
            loss: None: the one that `config` names.
        """
        optimizer = make_optimizer(groups, config.betas, config.eps)
        schedule = cosine_to_zero(optimizer, steps, int(config.warmup * steps))
        loss = loss or LOSSES[config.loss]
        return cls(span, optimizer, schedule, device, loss, micro_batch)

    def step(self, batch: LossBatch) -> torch.Tensor:
        self.span.form(self.span.learned)
        loss = accumulate(self.span, batch, self.loss, self.micro_batch, shared=False)
        self.span.root().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        return loss

    def mean(self, losses: torch.Tensor) -> float:
        return losses.mean().item()

    def validate(self, batches: Iterable[LossBatch]) -> float:
        self.span.form(self.span.learned)
        return mean_loss(self.span, batches, self.loss, self.micro_batch, shared=False).item()

    @property
    def worker(self) -> int:
        return 0

    def gather(self, row: list[int]) -> list[list[int]]:
        return [row]

    def state(self) -> dict[str, torch.Tensor]:
        return training_state(self.schedule, self._masters)

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        load_training_state(state, self.schedule, self._masters)

    @property
    def _masters(self) -> list[torch.Tensor]:
        return [value for group in self.optimizer.param_groups for value in group["params"]]
