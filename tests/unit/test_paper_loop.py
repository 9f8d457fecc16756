"""Training against the paper's loop, written out here in plain torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from models import MODELS
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D
from workshop import (  # noqa: F401 - fixtures
    BATCH,
    CPU,
    FAST,
    IDS,
    WINDOWS,
    Weights,
    Workshop,
    _workshop,
    collapsed,
    learned,
    plain_weights,
)

from fusegpt_ray.fusion.group_fusion import GroupFusion
from fusegpt_ray.training.batch import LossBatch
from fusegpt_ray.training.span import Span


class PaperLoop:
    """Group fine-tuning written out: W' = W + B·A + Σ (C_k·D_k) ⊙ W_k in the real layers, KL over
    the batch, Adam, cosine.

    The frozen weights are the dense model's and, for each neighbour, those of its `donors`. Starts
    from the values of `student`, whose forward pass and update it never calls.
    """

    def __init__(
        self,
        workshop: Workshop,
        job: GroupFusion,
        student: Span,
        donors: Sequence[Sequence[Weights]],
    ) -> None:
        blocks = workshop.model.get_submodule(MODELS[workshop.name].blocks)
        self.layers = [blocks[block.dense] for block in job.neighbours]
        self.calls = self._calls(workshop, [block.dense for block in job.neighbours])
        self.donors = donors
        self.p = {name: value.requires_grad_() for name, value in learned(student).items()}
        self.m = {name: torch.zeros_like(value) for name, value in self.p.items()}
        self.v = {name: torch.zeros_like(value) for name, value in self.p.items()}

    @staticmethod
    def _calls(
        workshop: Workshop, denses: list[int]
    ) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """What the dense real model calls these blocks with, for a batch of windows, besides
        the states.
        """
        calls = []
        for dense in denses:
            block = workshop.model.get_submodule(MODELS[workshop.name].blocks)[dense]
            hook = block.register_forward_pre_hook(
                lambda _, args, kwargs: calls.append((args[1:], kwargs)), with_kwargs=True
            )
            workshop.model(input_ids=IDS[:BATCH], use_cache=False)
            hook.remove()
        return calls

    def weights(self, i: int) -> Weights:
        """The effective weights of neighbour i."""
        layer, p = self.layers[i], self.p
        weights = {
            key: p.get(f"blocks.{i}.{key}", value) for key, value in layer.named_parameters()
        }  # norms learn as they are
        for name, module in layer.named_modules():
            if not isinstance(module, nn.Linear | Conv1D):
                continue
            own = f"blocks.{i}.{name}"
            stored = (
                torch.t if isinstance(module, Conv1D) else torch.Tensor.contiguous
            )  # Conv1D's weight is [inputs, outputs]
            weight, bias = module.weight + stored(p[f"{own}.B"] @ p[f"{own}.A"]), module.bias
            for k, donor in enumerate(self.donors[i]):
                weight = (
                    weight + stored(p[f"{own}.C{k}"] @ p[f"{own}.D{k}"]) * donor[f"{name}.weight"]
                )
                if bias is not None:
                    bias = bias + p[f"{own}.c{k}"] * donor[f"{name}.bias"]
            weights |= {f"{name}.weight": weight} | ({} if bias is None else {f"{name}.bias": bias})
        return weights

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        for i, (layer, (args, kwargs)) in enumerate(zip(self.layers, self.calls, strict=True)):
            kwargs = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            h = functional_call(layer, self.weights(i), (h, *args), kwargs)
            h = h[0] if isinstance(h, tuple) else h
        return h

    def step(self, entering: torch.Tensor, leaving: torch.Tensor, number: int, steps: int) -> float:
        """Step `number`, from 0, of `steps`."""
        log_q, p = F.log_softmax(self.forward(entering), dim=0), F.softmax(leaving, dim=0)
        loss = F.kl_div(log_q, p, reduction="batchmean")
        gradients = torch.autograd.grad(loss, list(self.p.values()))
        factor = 0.5 * (1 + math.cos(math.pi * number / steps))
        with torch.no_grad():
            for (name, value), g in zip(self.p.items(), gradients, strict=True):
                rate = factor * (1e-3 if name.rsplit(".", 1)[1][0] in "CDc" else 9.65e-6)
                self.m[name] = 0.9 * self.m[name] + 0.1 * g
                self.v[name] = 0.95 * self.v[name] + 0.05 * g * g
                m, v = (
                    self.m[name] / (1 - 0.9 ** (number + 1)),
                    self.v[name] / (1 - 0.95 ** (number + 1)),
                )
                value -= rate * m / (v.sqrt() + 1e-8)
        return loss.item()


def cycle(
    entering: torch.Tensor, leaving: torch.Tensor, steps: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Fixed batches, not shuffled, as often as needed."""
    for step in range(steps):
        rows = slice(step * BATCH % WINDOWS, step * BATCH % WINDOWS + BATCH)
        yield entering[rows], leaving[rows]


def compare_learned(student: Span, paper: PaperLoop, without_gradient: Sequence[str] = ()) -> None:
    """The same values to 0.2 % of what one step may change: Adam turns small gradients' last
    bits into parts of a step.
    """
    for name, value in learned(student).items():
        expected = paper.p[name].detach()
        rate = 1e-3 if name.rsplit(".", 1)[1][0] in "CDc" else 9.65e-6
        if name.endswith(
            "attn.c_attn.c0"
        ):  # GPT-2: queries, keys, values; attention cannot see a shift of all keys
            value, expected = (
                torch.cat([vector[:32], vector[64:]]) for vector in (value, expected)
            )
        if name not in without_gradient:
            torch.testing.assert_close(
                value,
                expected,
                rtol=0,
                atol=2e-3 * rate,
                msg=lambda text, name=name: f"{name}: {text}",
            )


# The last bias of the group shifts the whole batch alike, which the loss cannot see: rounding alone
# decides where Adam takes it.
SHIFT = ["blocks.2.mlp.c_proj.c0"]


@pytest.mark.parametrize("workshop", ["llama", "gpt2", "gemma3"], indirect=True)
def test_one_step_is_the_papers(workshop: Workshop) -> None:
    job = workshop.job(2)
    student = workshop.student(job)
    paper = PaperLoop(workshop, job, student, [[plain_weights(workshop, 2)]] * 3)
    before = learned(student)
    entering, leaving = (states[:BATCH] for states in workshop.states(job))

    expected = paper.step(entering, leaving, 0, 20)
    loss = workshop.stepper(job, student, 20).step(LossBatch(entering, leaving))

    assert loss.item() == pytest.approx(expected, rel=1e-4)
    compare_learned(student, paper, SHIFT)
    moved = {
        name.rsplit(".", 1)[1]: (value - before[name]).abs().max()
        for name, value in learned(student).items()
    }
    assert moved["C0"] == pytest.approx(1e-3, rel=1e-3)  # Adam's first step is the rate itself
    assert moved["B"] == pytest.approx(9.65e-6, rel=1e-3)
    assert moved["A"] == moved["D0"] == 0  # B and C were zero


@pytest.mark.parametrize("workshop", ["llama", "gpt2"], indirect=True)
def test_twenty_steps_are_the_papers(workshop: Workshop) -> None:
    job = workshop.job(2)
    student = workshop.student(job)
    paper = PaperLoop(workshop, job, student, [[plain_weights(workshop, 2)]] * 3)
    entering, leaving = workshop.states(job)

    losses = [
        paper.step(x, y, number, 20) for number, (x, y) in enumerate(cycle(entering, leaving, 20))
    ]
    means = workshop.train(job, student)

    assert means == pytest.approx([sum(losses[i : i + 4]) / 4 for i in range(0, 20, 4)], rel=1e-4)
    assert means[-1] < means[0]
    compare_learned(student, paper, SHIFT)


def test_a_second_round_goes_on_as_the_papers(workshop: Workshop) -> None:
    """Eq. 10: a neighbour fused before gets one more term and keeps training the old ones; the
    donor is new.
    """
    stack, _ = workshop.fuse(workshop.job(2, **FAST))
    job = workshop.job(3, stack)
    student = workshop.student(job)
    assert [block.dense for block in job.neighbours] == [0, 1, 4]
    old, new = plain_weights(workshop, 2), collapsed(workshop, stack, 3)
    paper = PaperLoop(workshop, job, student, [[old, new], [old, new], [new]])
    entering, leaving = workshop.states(job)
    losses = [
        paper.step(x, y, number, 8) for number, (x, y) in enumerate(cycle(entering, leaving, 8))
    ]
    means = workshop.train(job, student, 2)
    assert means == pytest.approx([sum(losses[:4]) / 4, sum(losses[4:]) / 4], rel=1e-4)
    compare_learned(student, paper)
