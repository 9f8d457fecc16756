"""A span forms its weights once a loss batch, and hands their gradients back once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call
from workshop import BATCH, FAST, Workshop, _workshop, learned  # noqa: F401 - a fixture

from fusegpt_ray.model.recorder import run_block
from fusegpt_ray.training.batch import LossBatch
from fusegpt_ray.training.losses import LOSSES, normalized_mse
from fusegpt_ray.training.microbatch import accumulate
from fusegpt_ray.training.span import Span

Tensors = dict[str, torch.Tensor]


def shaken(workshop: Workshop) -> tuple[Span, torch.Tensor, torch.Tensor]:
    """A span away from its start, where half of what learns is zero, and a loss batch."""
    job = workshop.job(2, preset="rounds", trained_dtype="float32", **FAST)
    span = workshop.student(job)
    with torch.no_grad():
        for value in span.learned.parameters():
            value.add_(0.05 * torch.randn_like(value))
    entering, leaving = workshop.states(job)
    return span, entering[:BATCH], leaving[:BATCH]


def gradients(span: Span, batch: tuple[torch.Tensor, torch.Tensor], micro: int | None) -> Tensors:
    span.learned.zero_grad()
    span.form(span.learned)
    accumulate(span, LossBatch(*batch), normalized_mse, micro, False)
    span.root().backward()
    named = span.learned.named_parameters()
    return {name: value.grad.clone() for name, value in named}


def through_the_graph(span: Span, batch: tuple[torch.Tensor, torch.Tensor]) -> Tensors:
    """The same by one graph from what learns to the loss, which torch makes by itself."""
    span.learned.zero_grad()
    h_BTD, leaving = batch
    for block, weights, context in zip(span.blocks, span.learned(), span.contexts, strict=True):
        given = nn.ModuleDict({"block": block})
        wrapped = {f"block.{name}": value for name, value in weights.items()}
        h_BTD = functional_call(_Runs(given, context), _inside(wrapped), (h_BTD,))
    LOSSES["normalized_mse"](h_BTD, leaving, False).backward()
    return {name: value.grad.clone() for name, value in span.learned.named_parameters()}


class _Runs(nn.Module):
    """`run_block` as a module, so that `functional_call` can give it other weights."""

    def __init__(self, held: nn.ModuleDict, context: Any) -> None:
        super().__init__()
        self.held, self.context = held, context

    def forward(self, h_BTD: torch.Tensor) -> torch.Tensor:
        return run_block(self.held["block"], h_BTD, self.context)


def _inside(weights: Tensors) -> Tensors:
    return {f"held.{name}": value for name, value in weights.items()}


@pytest.mark.parametrize("workshop", ["llama", "gpt2", "gemma3"], indirect=True)
def test_gradients_are_those_of_one_graph(workshop: Workshop) -> None:
    span, *batch = shaken(workshop)
    found = gradients(span, (batch[0], batch[1]), None)
    expected = through_the_graph(span, (batch[0], batch[1]))
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name  # the same operations, in the same order


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("micro", [None, 2, 1])
@pytest.mark.parametrize("loss", LOSSES)
def test_weights_are_formed_once_a_loss_batch(
    workshop: Workshop, loss: str, micro: int | None, recompute: bool
) -> None:
    span, entering, leaving = shaken(workshop)
    span.recompute = recompute
    formed: list[int] = []
    span.learned.register_forward_pre_hook(lambda *_: formed.append(1))
    span.form(span.learned)
    accumulate(span, LossBatch(entering, leaving), LOSSES[loss], micro, False)
    span.root().backward()
    assert len(formed) == 1


@pytest.mark.parametrize("micro", [2, 1])
def test_micro_batches_add_up_in_float32(
    workshop: Workshop, micro: int, checkpoint: Any, tmp_path: Any
) -> None:
    """In bfloat16 arithmetic too: the sum is rounded once, not each time that one is added."""
    workshop = Workshop("llama", checkpoint("llama"), tmp_path, torch.bfloat16)
    span, entering, leaving = shaken(workshop)
    span.form(span.learned)
    parts = []
    for part, teacher in zip(entering.split(micro), leaving.split(micro), strict=True):
        loss = LOSSES["normalized_mse"](span(part), teacher, False) * micro / BATCH
        parts.append(torch.autograd.grad(loss, span.weights))
    expected = [sum(part.float() for part in each) for each in zip(*parts, strict=True)]
    seen: list[bool] = []
    for value, wanted in zip(span.formed, expected, strict=True):
        value.register_hook(lambda found, w=wanted: seen.append(torch.equal(found, w.bfloat16())))
    accumulate(span, LossBatch(entering, leaving), normalized_mse, micro, False)
    span.root().backward()
    assert len(seen) == len(expected)
    assert all(seen)


def test_between_two_batches_it_computes_with_what_has_been_learned(workshop: Workshop) -> None:
    span, entering, leaving = shaken(workshop)
    before = span(entering)
    gradients(span, (entering, leaving), None)
    assert torch.equal(span(entering), before)
    with torch.no_grad():
        for value in span.learned.parameters():
            value.mul_(1.5)
    assert not torch.equal(span(entering), before)
    assert not span(entering).requires_grad


def test_weights_leave_the_memory_after_each_batch(workshop: Workshop) -> None:
    span, entering, leaving = shaken(workshop)
    gradients(span, (entering, leaving), 2)
    assert not any(leaf.numel() for leaf in span.weights)
    assert not span.formed


def test_a_block_keeps_what_does_not_learn(workshop: Workshop) -> None:
    """Each of its parameters is either formed or frozen."""
    span, *_ = shaken(workshop)
    span.form(span.learned)
    leaves = {id(leaf) for leaf in span.weights}
    for block in span.blocks:
        for name, value in block.named_parameters():
            assert value.requires_grad == (id(value) in leaves), name
    assert len(learned(span)) > len(leaves)
