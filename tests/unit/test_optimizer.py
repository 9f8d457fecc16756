"""The optimizer's two rates and their schedule, and the loop over the batches of every epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from fused_layers import IN, fuse
from torch import nn

from fusegpt_ray.fusion.group_fusion import GroupFusion
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.recipe.sections import Fusion
from fusegpt_ray.recipe.specs import PRESETS
from fusegpt_ray.training import optimizer as optimizers
from fusegpt_ray.training.loop import train
from fusegpt_ray.training.optimizer import cosine_to_zero
from fusegpt_ray.training.states import States
from fusegpt_ray.training.stepper import LossBatch


class Group:
    """What a span looks like to the optimizer."""

    def __init__(self, donors: int) -> None:
        layer = fuse("linear", donors, torch.float32, torch.float32)[0]
        self.learned = nn.ModuleDict({"norm": nn.LayerNorm(IN), "layer": layer})


def settings(**values: object) -> Fusion:
    return Fusion(**(PRESETS["paper"]["fusion"] | values))


def make_optimizer(group: Group, settings: Fusion) -> torch.optim.Adam:
    stack = Stack({}, "", {}, ())
    groups = GroupFusion(stack, stack, 0, settings, True, 0, "").parameter_groups(group)  # type: ignore[arg-type]
    return optimizers.make_optimizer(groups, settings.betas, settings.eps)


def test_coefficients_have_one_rate_and_the_rest_another() -> None:
    group = Group(donors=2)
    optimizer = make_optimizer(group, settings())
    names = {id(value): name for name, value in group.learned.named_parameters()}
    rates = {
        names[id(value)]: entry["lr"]
        for entry in optimizer.param_groups
        for value in entry["params"]
    }
    fast = ["C0", "D0", "c0", "C1", "D1", "c1"]
    slow = ["norm.weight", "norm.bias", "layer.A", "layer.B"]
    assert rates == {f"layer.{name}": 1e-3 for name in fast} | dict.fromkeys(slow, 9.65e-6)
    assert type(optimizer) is torch.optim.Adam
    for entry in optimizer.param_groups:
        assert (entry["betas"], entry["eps"], entry["weight_decay"], entry["amsgrad"]) == (
            (0.9, 0.95),
            1e-8,
            0,
            False,
        )


def test_without_a_donor_there_is_only_the_second_rate() -> None:
    optimizer = make_optimizer(Group(donors=0), settings(lora_learning_rate=0.25))
    assert [entry["lr"] for entry in optimizer.param_groups] == [0.25]


def test_both_rates_follow_the_cosine_to_zero() -> None:
    optimizer = make_optimizer(Group(donors=1), settings(learning_rate=1.0, lora_learning_rate=0.5))
    schedule = cosine_to_zero(optimizer, 4)
    seen = []
    for _ in range(6):
        seen.append([entry["lr"] for entry in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    shares = [
        1,
        (1 + math.sqrt(0.5)) / 2,
        0.5,
        (1 - math.sqrt(0.5)) / 2,
        0,
        0,
    ]  # ½ (1 + cos(π·step / 4)), then 0
    for rates, share in zip(seen, shares, strict=True):
        assert rates == pytest.approx([share, 0.5 * share], abs=1e-12)


def test_batches_are_consecutive_and_whole() -> None:
    entering, leaving = torch.arange(6.0), torch.arange(6.0) * 10
    batches = States(entering, leaving).batches(2)
    pairs = [(batch.entering_bTD.tolist(), batch.leaving_bTD.tolist()) for batch in batches]
    assert pairs == [([0, 1], [0, 10]), ([2, 3], [20, 30]), ([4, 5], [40, 50])]
    with pytest.raises(AssertionError):
        States(entering, leaving).batches(4)


class Recorder:
    """A stepper that only writes down what it is given; its loss is the first number of the
    batch."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def step(self, batch: LossBatch) -> torch.Tensor:
        self.seen.append(batch[0][0].item())
        return batch[0][0]

    def mean(self, losses: torch.Tensor) -> float:
        return losses.mean().item()


def an_epoch(values: list[float]) -> Callable[[int], Iterator[LossBatch]]:
    return lambda _: iter([(torch.tensor([value]), torch.tensor([value])) for value in values])


def test_every_epoch_sees_the_same_batches_in_the_same_order() -> None:
    recorder, reported = Recorder(), []
    means = train(
        recorder, an_epoch([1.0, 2.0, 6.0]), 3, lambda number, mean: reported.append((number, mean))
    )
    assert recorder.seen == [1, 2, 6] * 3
    assert means == [3.0] * 3
    assert reported == [(1, 3.0), (2, 3.0), (3, 3.0)]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_training(value: float) -> None:
    reported: list[int] = []
    with pytest.raises(FloatingPointError, match=r"fusion\.learning_rate"):
        train(Recorder(), an_epoch([1.0, value]), 3, lambda number, _: reported.append(number))
    assert reported == []
