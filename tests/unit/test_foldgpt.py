"""Method `foldgpt`: its gates are what plain torch trains, from the formula written out."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from desk import Desk
from infirmary import TRAINED, Infirmary
from models import load_model
from test_compared_methods import removed
from test_tournament import workers

from fusegpt_ray.footprint import gating_bytes, trial_bytes
from fusegpt_ray.healing import gates
from fusegpt_ray.healing.gates import BUDGET, POLARISE, GatedModel, train_gates
from fusegpt_ray.methods import METHODS
from fusegpt_ray.methods.base import Question
from fusegpt_ray.plan import plan
from fusegpt_ray.recipe import Recipe
from fusegpt_ray.report import Display
from fusegpt_ray.sections import Heal, Importance

STEPS = 8
"""Two passes over the 16 windows, in batches of 4."""


@pytest.fixture(name="infirmary")
def _infirmary(checkpoint: Callable[[str], Path], tmp_path: Path) -> Infirmary:
    return Infirmary("llama", checkpoint("llama"), tmp_path)


def by_plain_torch(place: Infirmary, remove: int) -> list[float]:
    """The blocks of the real model are wrapped; the loss is written out, and torch finds its
    gradient.
    """
    teacher, student = load_model(place.folder), load_model(place.folder)
    student.requires_grad_(False)
    depth = len(place.dense)
    raw = [torch.ones((), requires_grad=True) for _ in range(depth)]

    def gate(block: Any, value: torch.Tensor) -> None:
        forward = block.forward

        def gated(h: torch.Tensor, *given: Any, **named: Any) -> Any:
            out = forward(h, *given, **named)
            out = out[0] if isinstance(out, tuple) else out
            g = (
                value + (value.clamp(0, 1) - value).detach()
            )  # cut off, with a gradient all the same
            return h + g * (out - h)

        block.forward = gated

    for block, value in zip(place.blocks_of(student), raw, strict=True):
        gate(block, value)
    adam = torch.optim.Adam(raw, lr=gates.RATE, betas=(0.9, 0.95), eps=1e-8)
    sizes = [sum(p.numel() for p in block.parameters()) for block in place.blocks_of(teacher)]
    for step in range(STEPS):
        adam.param_groups[0]["lr"] = gates.RATE * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        ids = TRAINED[step * 4 % 16 : step * 4 % 16 + 4]
        with torch.no_grad():
            p = teacher(ids).logits.softmax(-1)
        kl = (p * (p.log() - student(ids).logits.log_softmax(-1))).sum(-1).mean()
        cut = [value + (value.clamp(0, 1) - value).detach() for value in raw]
        polarise = sum(g * (1 - g) for g in cut) / depth
        kept = sum(size / sum(sizes) * g for size, g in zip(sizes, cut, strict=True))
        loss = kl + POLARISE * polarise + BUDGET * (kept - (1 - remove / depth)) ** 2
        adam.zero_grad()
        loss.backward()
        adam.step()
    return [value.item() for value in raw]


def trained(place: Infirmary, remove: int, micro_batch: int) -> list[float]:
    task = (GatedModel(place.dense, remove), TRAINED.numpy())
    with workers(place) as here:
        ((_, found),) = here.map(train_gates, [task], micro_batch)
    return found


@pytest.mark.parametrize("micro_batch", [4, 1])
def test_gates_are_what_plain_torch_trains(
    infirmary: Infirmary, micro_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gates, "STEPS", STEPS)
    expected = by_plain_torch(infirmary, 2)
    # Steps are 0.05 and less; float32 in another order moves them by far less than a thousandth.
    assert trained(infirmary, 2, micro_batch) == pytest.approx(expected, abs=5e-5)
    assert len({round(value, 3) for value in expected}) > 1


def test_an_open_gate_changes_nothing(
    infirmary: Infirmary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 1 the gated model is the dense one, to the bit: the first step's loss is 0."""
    heard: list[Any] = []
    monkeypatch.setattr(gates, "STEPS", 1)
    monkeypatch.setattr(gates, "_unheard", heard.append)
    with workers(infirmary) as here:
        list(here.map(train_gates, [(GatedModel(infirmary.dense, 1), TRAINED[:4].numpy())], 4))
    assert heard[0][:2] == (1, 0.0)


def test_the_lowest_gates_go(infirmary: Infirmary, monkeypatch: pytest.MonkeyPatch) -> None:
    """All for a budget of that many blocks; of those that may go."""
    monkeypatch.setattr(gates, "STEPS", STEPS)
    values = trained(infirmary, 2, 4)
    order = sorted(range(len(values)), key=values.__getitem__)
    assert removed(infirmary, "foldgpt", 2) == order[:2]
    settings = Importance(windows=len(TRAINED), batch=4)
    free = sorted(order[1:4])
    with workers(infirmary) as here:
        asked = Question(here, infirmary.dense, TRAINED.numpy(), settings, 0, 2, candidates=free)
        ranking = METHODS["foldgpt"].choose(asked)
    assert ranking.scores == {number: values[number] for number in free}


def test_the_plan_tells_what_gates_need(desk: Desk) -> None:
    """More than the weights of the whole model, and less than to train these."""
    asked = Recipe.parse(desk.recipe(method="foldgpt"))
    dense = plan(asked, Display()).model.stack
    refs = [*dense.trunk.values(), *(ref for b in dense.blocks for ref in b.weights.values())]
    weights = 4 * sum(math.prod(ref.shape) for ref in refs)
    every = asked.model_copy(update={"heal": Heal(train="all")})
    most = trial_bytes(every, dense, torch.float32, len(dense))
    assert weights < gating_bytes(asked, dense, torch.float32) < most
