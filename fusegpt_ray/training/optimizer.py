"""Adam and its schedule, and their state as tensors for a training checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR


def make_optimizer(
    groups: Sequence[Mapping[str, Any]], betas: tuple[float, float], eps: float
) -> torch.optim.Adam:
    """Adam without weight decay over {"params", "lr"} groups; empty groups are left out.

    On a GPU one kernel does a whole step. On a CPU torch's default is as fast.
    """
    filled = [dict(group) for group in groups if group["params"]]
    fused = all(value.is_cuda for group in filled for value in group["params"])
    return torch.optim.Adam(filled, betas=betas, eps=eps, fused=fused or None)


def cosine_to_zero(optimizer: torch.optim.Optimizer, steps: int, warmup: int = 0) -> LambdaLR:
    """Each learning rate × ½ (1 + cos(π·step / steps)); before that, `warmup` of the steps in which
    it grows evenly from nothing.
    """

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * min((step - warmup) / (steps - warmup), 1)))

    return LambdaLR(optimizer, factor)


def training_state(schedule: LambdaLR, masters: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The number of steps so far, and the value and moments of each tensor that the optimizer
    changes: the tensors themselves, not copies.
    """
    found = {"steps": torch.tensor(schedule.last_epoch)}
    for number, master in enumerate(masters):
        found[f"{number}.value"] = master.detach()
        moments = schedule.optimizer.state[master]
        found |= {f"{number}.{key}": value for key, value in moments.items()}
    return found


@torch.no_grad()
def load_training_state(
    state: Mapping[str, torch.Tensor], schedule: LambdaLR, masters: Sequence[torch.Tensor]
) -> None:
    """Go on from what `training_state` gave.

    Learning rates are found from the number of steps, by the very product that a step forms.
    """
    optimizer = schedule.optimizer
    fused = optimizer.defaults["fused"]  # such an Adam counts its steps on the device
    schedule.last_epoch = int(state["steps"])
    rates = zip(optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True)
    for group, base, factor in rates:
        group["lr"] = base * factor(schedule.last_epoch)
    for number, master in enumerate(masters):
        begin = f"{number}."
        own = {
            key.removeprefix(begin): value for key, value in state.items() if key.startswith(begin)
        }
        shapes = {value.shape for key, value in own.items() if key != "step"}
        assert shapes == {master.shape}, (number, shapes, master.shape)
        master.copy_(own.pop("value"))
        optimizer.state[master] = {
            key: value.to("cpu" if key == "step" and not fused else master.device)
            for key, value in own.items()
        }
