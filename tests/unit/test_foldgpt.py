"""Method `foldgpt`: its gates are what plain torch trains, from the formula written out."""

from __future__ import annotations

import itertools
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

from fusegpt_ray.cost.footprint import gating_bytes, trial_bytes
from fusegpt_ray.healing import gates, trial
from fusegpt_ray.healing.gates import POLARISE, GatedModel, train_gates, within
from fusegpt_ray.methods import METHODS
from fusegpt_ray.methods.base import Question
from fusegpt_ray.planning.plan import plan
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.recipe.sections import Heal, Importance
from fusegpt_ray.terminal.display import Display

STEPS = 8
"""Two passes over the 16 windows, in batches of 4."""


@pytest.fixture(name="infirmary")
def _infirmary(checkpoint: Callable[[str], Path], tmp_path: Path) -> Infirmary:
    return Infirmary("llama", checkpoint("llama"), tmp_path)


def nearest(raw: list[float], shares: list[float], keep: float) -> torch.Tensor:
    """The gates of the budget that are nearest to these, by trying for every gate whether it is 0,
    1 or neither; of those that are neither, Lagrange's condition says how much each moves.
    """
    r, s = torch.tensor(raw, dtype=torch.float64), torch.tensor(shares, dtype=torch.float64)
    best = None
    for ends in itertools.product((0.0, 1.0, None), repeat=len(raw)):
        free = torch.tensor([end is None for end in ends])
        g = torch.tensor([end or 0.0 for end in ends], dtype=torch.float64)
        if free.any():
            over = (s * torch.where(free, r, g)).sum() - keep
            g = torch.where(free, r - s * over / (s * free).square().sum(), g)
        kept = abs((s * g).sum().item() - keep) < 1e-9 and g.min() >= 0 and g.max() <= 1
        distance = (g - r).square().sum().item()
        if kept and (best is None or distance < best[0]):
            best = distance, g
    assert best is not None
    return best[1]


def by_plain_torch(place: Infirmary, remove: int) -> list[float]:
    """The blocks of the real model are wrapped; the loss is written out, and torch finds its
    gradient at the gates that keep the budget.
    """
    teacher, student = load_model(place.folder), load_model(place.folder)
    student.requires_grad_(False)
    depth = len(place.dense)
    gates_N = torch.ones(depth, requires_grad=True)

    def gate(block: Any, number: int) -> None:
        forward = block.forward

        def gated(h: torch.Tensor, *given: Any, **named: Any) -> Any:
            out = forward(h, *given, **named)
            out = out[0] if isinstance(out, tuple) else out
            return h + gates_N[number] * (out - h)

        block.forward = gated

    for number, block in enumerate(place.blocks_of(student)):
        gate(block, number)
    raw = torch.ones(depth, requires_grad=True)
    adam = torch.optim.Adam([raw], lr=gates.RATE, betas=(0.9, 0.95), eps=1e-8)
    sizes = [sum(p.numel() for p in block.parameters()) for block in place.blocks_of(teacher)]
    shares, keep = [size / sum(sizes) for size in sizes], 1 - remove / depth
    s = torch.tensor(shares)
    for step in range(STEPS):
        adam.param_groups[0]["lr"] = gates.RATE * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        ids = TRAINED[step * 4 % 16 : step * 4 % 16 + 4]
        gates_N.data, gates_N.grad = nearest(raw.tolist(), shares, keep).float(), None
        with torch.no_grad():
            p = teacher(ids).logits.softmax(-1)
        kl = (p * (p.log() - student(ids).logits.log_softmax(-1))).sum(-1).mean()
        (kl + POLARISE * (gates_N * (1 - gates_N)).mean()).backward()
        v = gates_N.grad
        assert v is not None
        free = [n for n in range(depth) if 0 < gates_N[n] < 1]
        over = free if len(free) > 1 else list(range(depth))
        raw.grad = v - s * (s[over] @ v[over]) / (s[over] @ s[over])
        adam.step()
    return nearest(raw.tolist(), shares, keep).tolist()


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
    found = [min(max(value, 0), 1) for value in trained(infirmary, 2, micro_batch)]
    # Steps are 0.05 and less; float32 in another order moves them by far less than a thousandth.
    assert found == pytest.approx(expected, abs=5e-5)
    assert len({round(value, 3) for value in expected}) > 2


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.8])
def test_gates_are_the_nearest_that_keep_the_budget(keep: float) -> None:
    """Whatever they were, and where blocks are of several sizes."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        raw, sizes = 2 * torch.randn(5, generator=generator), torch.rand(5, generator=generator)
        shares = (sizes + 0.1) / (sizes + 0.1).sum()
        found = within(raw, shares, keep).clamp(0, 1)
        expected = nearest(raw.tolist(), shares.tolist(), keep)
        # The shares add up to 1 in float32 only.
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        assert (found * shares).sum().item() == pytest.approx(keep, abs=1e-6)


@pytest.mark.parametrize("remove", [1, 2])
def test_the_budget_is_kept(
    infirmary: Infirmary, remove: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks are of one size here, so the gates add up to as many as stay."""
    monkeypatch.setattr(gates, "STEPS", 4)
    found = [min(max(value, 0), 1) for value in trained(infirmary, remove, 4)]
    assert sum(found) == pytest.approx(len(infirmary.dense) - remove, abs=1e-6)


def test_an_open_gate_changes_nothing(
    infirmary: Infirmary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing is to go, the gated model is the dense one, to the bit: a step's loss is 0."""
    heard: list[Any] = []
    monkeypatch.setattr(gates, "STEPS", 1)
    monkeypatch.setattr(trial, "_unheard", heard.append)
    with workers(infirmary) as here:
        list(here.map(train_gates, [(GatedModel(infirmary.dense, 0), TRAINED[:4].numpy())], 4))
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
