"""Fine-tuning a group: optimizer, schedule and the training loop, the same for plain torch and for DeepSpeed.

Notable: a batch of states is a whole loss batch (or a worker's fixed share of it), batches come in the same order every epoch, and the
loop never waits for the device: losses stay on it until an epoch ends.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from fusegpt_ray.sections import Fusion
from fusegpt_ray.training.checkpoints import Learner, Savepoints, Say
from fusegpt_ray.training.microbatch import accumulate

Batch = tuple[torch.Tensor, torch.Tensor]
"""States entering the group and the teacher's states leaving it, [b, T, D] each, b = loss batch / workers."""


def make_optimizer(student: nn.Module, settings: Fusion) -> torch.optim.Adam:
    """Adam with two rates: one for the fusion coefficients C, D, c; another for LoRA and norm weights. No weight decay."""
    named = [(name, value) for name, value in student.named_parameters() if value.requires_grad]
    coefficients = [value for name, value in named if is_coefficient(name)]
    rest = [value for name, value in named if not is_coefficient(name)]
    groups = [
        {"params": coefficients, "lr": settings.learning_rate},
        {"params": rest, "lr": settings.lora_learning_rate},
    ]
    return torch.optim.Adam(
        [group for group in groups if group["params"]], betas=settings.betas, eps=settings.eps
    )


def is_coefficient(name: str) -> bool:
    """Whether a parameter of a student is one of C0, D0, c0, C1, …"""
    last = name.rsplit(".", 1)[-1]
    return last[0] in "CDc" and last[1:].isdigit()


def cosine_to_zero(optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
    """Each rate × ½ (1 + cos(π·step / steps)), restarted for every removed block."""
    return LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * min(step / steps, 1))))


def training_state(schedule: LambdaLR, masters: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Steps so far, and of each tensor that the optimizer changes its value and moments: no copies."""
    found = {"steps": torch.tensor(schedule.last_epoch)}
    for number, master in enumerate(masters):
        found[f"{number}.value"] = master.detach()
        found |= {
            f"{number}.{key}": value for key, value in schedule.optimizer.state[master].items()
        }
    return found


@torch.no_grad()
def load_training_state(
    state: Mapping[str, torch.Tensor], schedule: LambdaLR, masters: Sequence[torch.Tensor]
) -> None:
    """Go on from what `training_state` gave. Rates come of the number of steps, by the very product that a step forms."""
    schedule.last_epoch = int(state["steps"])
    for group, base, factor in zip(
        schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
    ):
        group["lr"] = base * factor(schedule.last_epoch)
    for number, master in enumerate(masters):
        own = {
            key.removeprefix(f"{number}."): value
            for key, value in state.items()
            if key.startswith(f"{number}.")
        }
        assert all(value.shape == master.shape for key, value in own.items() if key != "step"), (
            number,
            master.shape,
        )
        master.copy_(own.pop("value"))
        schedule.optimizer.state[master] = {
            key: value.to("cpu" if key == "step" else master.device) for key, value in own.items()
        }


class Stepper(Learner, Protocol):
    """One optimizer step on one batch."""

    def step(self, batch: Batch) -> torch.Tensor:
        """Forward, backward, update. Returns this worker's loss (a scalar on the device, detached)."""

    def mean(self, losses: torch.Tensor) -> float:
        """The mean of an epoch's losses, over all workers."""


@dataclass
class TorchStepper:
    """One process, plain torch."""

    student: nn.Module
    settings: Fusion
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    device: torch.device
    micro_batch: int | None
    """Windows that pass the group at once; None: the whole loss batch."""

    @classmethod
    def make(
        cls,
        student: nn.Module,
        settings: Fusion,
        steps: int,
        device: torch.device,
        micro_batch: int | None = None,
    ) -> TorchStepper:
        optimizer = make_optimizer(student, settings)
        return cls(
            student, settings, optimizer, cosine_to_zero(optimizer, steps), device, micro_batch
        )

    def step(self, batch: Batch) -> torch.Tensor:
        entering, leaving = (states.to(self.device, non_blocking=True) for states in batch)
        loss = accumulate(
            self.student,
            self._backward,
            entering,
            leaving,
            self.settings.loss,
            self.micro_batch,
            False,
        )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        return loss

    @staticmethod
    def _backward(loss: torch.Tensor, _: bool) -> None:
        loss.backward()

    def mean(self, losses: torch.Tensor) -> float:
        return losses.mean().item()

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


def train(
    stepper: Stepper,
    epoch: Callable[[], Iterable[Batch]],
    epochs: int,
    done: Callable[[int, float], None],
    savepoints: Savepoints | None = None,
    say: Say = lambda _: None,
) -> list[float]:
    """Run `epochs` passes over `epoch()`; `done(epochs so far, mean loss)` after each. Returns the mean loss of each epoch.

    With `savepoints` it goes on from the last one, makes others on its way, and tells `say` of them.

    Raises:
        FloatingPointError: the loss is not finite, so that nothing learned can be trusted.
    """
    means, seconds = (
        savepoints.restore(stepper, epochs, say) if savepoints else (list[float](), 0.0)
    )
    began = kept = time.monotonic()
    for number in range(len(means) + 1, epochs + 1):
        losses = [stepper.step(batch) for batch in epoch()]
        mean = stepper.mean(torch.stack(losses))
        if not math.isfinite(mean):
            raise FloatingPointError(
                f"the fine-tuning loss became {mean} in epoch {number}: lower fusion.learning_rate"
            )
        means.append(mean)
        if savepoints and savepoints.due(stepper, kept):
            savepoints.keep(stepper, means, seconds + time.monotonic() - began)
            kept = time.monotonic()
        done(number, mean)
    return means


def batches_of(entering: torch.Tensor, leaving: torch.Tensor, size: int) -> Iterator[Batch]:
    """Consecutive batches of `size` windows, in order; a remainder smaller than that would change the loss, so there is none."""
    assert len(entering) == len(leaving) and len(entering) % size == 0, (
        len(entering),
        len(leaving),
        size,
    )
    return zip(entering.split(size), leaving.split(size), strict=True)
