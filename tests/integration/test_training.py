"""Training a group is the same in plain torch and in DeepSpeed, on one worker and on two."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from groups import Group, after, fusion, process_group
from torch.multiprocessing.spawn import spawn

from fusegpt_ray.training.loop import train
from fusegpt_ray.training.span import Span
from fusegpt_ray.training.stepper import TorchStepper

pytestmark = pytest.mark.integration

WINDOWS, BATCH, EPOCHS = 32, 8, 5  # 20 steps
LOSSES = ("batch_kl", "normalized_mse")
MODES = [
    ("batch_kl", 0, 4),
    ("normalized_mse", 1, 2),
    ("batch_kl", 2, 2),
    ("normalized_mse", 3, 4),
    ("batch_kl", 3, 2),
]
"""Loss, ZeRO stage and windows at once (with two workers, 4 are a whole share of the loss batch):
every stage, and every pair of a loss and a micro-batch."""

Tensors = dict[str, torch.Tensor]
Mode = tuple[str, int, int]


@dataclass(frozen=True)
class Learned:
    """What one way of training gives."""

    gradients: Tensors
    """Of the first step."""
    weights: Tensors
    """After all steps."""
    losses: list[float]


def learn(group: Group) -> Learned:
    """Train the group, in plain torch or as one of DeepSpeed's workers."""
    span, gradients = group.span(), Tensors()
    stepper, states = group.stepper(span), group.states()
    if isinstance(stepper, TorchStepper):
        stepper.optimizer.register_step_pre_hook(
            lambda *_: note(gradients, span, lambda value: value.grad)
        )
    else:
        from deepspeed.utils import safe_get_full_grad

        stepper.engine.step = after(
            lambda: note(gradients, span, safe_get_full_grad), stepper.engine.step
        )
    losses = train(stepper, lambda _: states.batches(group.share), EPOCHS, lambda *_: None)
    if isinstance(stepper, TorchStepper):
        return Learned(gradients, weights_of(span), losses)
    with stepper.whole(span.learned.blocks):
        found = Learned(gradients, weights_of(span), losses)
    stepper.close()
    return found


def note(gradients: Tensors, span: Span, gradient: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Keep the first step's gradients. (In ZeRO-3 all workers must ask for each.)"""
    if not gradients:
        gradients.update(
            (name, gradient(value).clone()) for name, value in span.learned.named_parameters()
        )


def weights_of(span: Span) -> Tensors:
    named = span.learned.named_parameters()
    return {name: value.detach().clone() for name, value in named}


def group_of(folder: Path, loss: str, micro_batch: int | None = None, **worker: int) -> Group:
    tuned = fusion(folder, batch=BATCH, epochs=EPOCHS, loss=loss)
    return Group(tuned, WINDOWS, micro_batch=micro_batch, **worker)  # type: ignore[arg-type]


def learn_in_deepspeed(rank: int, workers: int, folder: Path, out: Path) -> None:
    """One of the data-parallel workers, in every mode; the first one saves what came out."""
    with process_group(rank, workers, out):
        found = {}
        for loss, stage, micro in MODES:
            group = group_of(folder, loss, micro, rank=rank, workers=workers, zero_stage=stage)
            found[loss, stage, micro] = learn(group)
        if rank == 0:
            torch.save(found, out / f"learned{workers}.pt")


@pytest.fixture(scope="module")
def plain(checkpoint: Callable[[str], Path]) -> dict[str, Learned]:
    """Loss → what plain torch learns."""
    return {loss: learn(group_of(checkpoint("llama"), loss)) for loss in LOSSES}


@pytest.fixture(scope="module")
def distributed(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[int, dict[Mode, Learned]]:
    """Workers → mode → what DeepSpeed learns."""
    out = tmp_path_factory.mktemp("workers")
    arguments = (checkpoint("llama"), out)
    groups = [
        spawn(learn_in_deepspeed, (count, *arguments), nprocs=count, join=False) for count in (1, 2)
    ]
    for group in groups:
        while not group.join():
            pass
    return {count: torch.load(out / f"learned{count}.pt", weights_only=False) for count in (1, 2)}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_deepspeed_learns_what_plain_torch_learns(
    plain: dict[str, Learned],
    distributed: dict[int, dict[Mode, Learned]],
    mode: Mode,
    workers: int,
) -> None:
    compare(distributed[workers][mode], plain[mode[0]])


@pytest.mark.parametrize(("loss", "micro"), zip(itertools.cycle(LOSSES), [4, 2, 1], strict=False))
def test_micro_batches_learn_what_the_whole_batch_does(
    checkpoint: Callable[[str], Path], plain: dict[str, Learned], loss: str, micro: int
) -> None:
    compare(learn(group_of(checkpoint("llama"), loss, micro)), plain[loss])


def compare(found: Learned, expected: Learned) -> None:
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        # Workers and micro-batches add in another order: float32 rounding, relative to the largest
        # of a tensor's gradients.
        scale = gradient.abs().max().item()
        torch.testing.assert_close(
            found.gradients[name], gradient, rtol=0, atol=1e-5 * scale, msg=named(name)
        )
    for name, weight in expected.weights.items():
        # Adam divides by the gradient's size, so that a tiny gradient's rounding grows into its
        # steps: by 2e-5 at most in what was seen, where weights move by more than 1e-3.
        torch.testing.assert_close(found.weights[name], weight, rtol=0, atol=5e-5, msg=named(name))
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)


def named(name: str) -> Callable[[str], str]:
    return lambda text: f"{name}: {text}"


@pytest.mark.parametrize("loss", LOSSES)
def test_twenty_steps_change_every_weight_far_more_than_the_tolerance(
    checkpoint: Callable[[str], Path], plain: dict[str, Learned], loss: str
) -> None:
    before = weights_of(group_of(checkpoint("llama"), loss).span())
    for name, weight in plain[loss].weights.items():
        assert (weight - before[name]).abs().max() > 1e-3, name
    assert plain[loss].losses[-1] < 0.9 * plain[loss].losses[0]
