"""Whole-model healing: its loss, its steps and its choice, beside plain torch on the real model."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from infirmary import (
    BATCH,
    DROPPED,
    HELD,
    HELD_OUT,
    LENGTH,
    PARTS,
    STEPS,
    TRAINED,
    WINDOWS,
    Infirmary,
    Stopped,
    kl,
    rate,
)
from models import SUPPORTED
from safetensors.torch import load_file
from torch import nn

from fusegpt_ray.errors import Terminated
from fusegpt_ray.model.recorder import Context, run_block
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.recipe.cluster_section import Cluster
from fusegpt_ray.termination import sigterm_stops
from fusegpt_ray.training import pauses
from fusegpt_ray.training.batch import LossBatch
from fusegpt_ray.training.distillation import LogitsKL
from fusegpt_ray.training.finetune import Trained
from fusegpt_ray.training.masters import Masters
from fusegpt_ray.training.microbatch import accumulate
from fusegpt_ray.training.span import Learned, Span
from fusegpt_ray.training.stepper import TorchStepper

CPU = torch.device("cpu")
# Float32 through a few blocks, where only the order of additions differs.
CLOSE = {"rtol": 1e-3, "atol": 1e-6}


@pytest.fixture(name="infirmary")
def _infirmary(
    request: pytest.FixtureRequest, checkpoint: Callable[[str], Path], tmp_path: Path
) -> Infirmary:
    name = getattr(request, "param", "llama")
    return Infirmary(name, checkpoint(name), tmp_path)


def built(place: Infirmary, **settings: Any) -> tuple[Span, Runner, Any]:
    """The span of the whole model, a runner, and a loss batch's states."""
    runner = Runner(place.dense, CPU, torch.float32, batch_size=4)
    job = place.job(**settings)
    contexts = runner.trunk.contexts(2, LENGTH)
    span = job.build(runner.trunk.meta_blocks, contexts, CPU, torch.float32, False, run_block)
    source = job.task(TRAINED.numpy(), HELD.numpy(), Cluster(engine="local"), {}, "").source
    return span, runner, source.walk(runner, TRAINED[:BATCH])


@pytest.mark.parametrize("chunk", [512, 4, 2 * LENGTH])
@pytest.mark.parametrize("infirmary", SUPPORTED, indirect=True)
def test_loss_and_gradients_are_those_of_the_real_models(infirmary: Infirmary, chunk: int) -> None:
    """Every parameter of every block, through the real norm, head and soft caps."""
    span, runner, batch = built(infirmary, train="all")
    span.form(span.learned)
    loss = accumulate(span, LossBatch(*batch), LogitsKL(runner.trunk.head, chunk=chunk), 2, False)
    span.root().backward()

    student, teacher = infirmary.plain()
    blocks = infirmary.blocks_of(student).requires_grad_()
    expected = kl(student, teacher, TRAINED[:BATCH])
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    for learned, block in zip(span.learned.blocks, blocks, strict=True):
        found = {name: value.grad for name, value in learned.named_parameters()}
        wanted = {name: value.grad for name, value in block.named_parameters()}
        assert found.keys() == wanted.keys()
        scale = max(value.abs().max().item() for value in wanted.values())
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5 * scale)


def test_a_term_of_the_last_hidden_states_is_added(infirmary: Infirmary) -> None:
    span, runner, (entering, leaving) = built(infirmary)
    with torch.no_grad():
        out = torch.cat([span(part) for part in entering.split(2)])
    plain = LogitsKL(runner.trunk.head)(out, leaving, False)
    unit = [h / h.pow(2).mean(-1, keepdim=True).sqrt() for h in (out, leaving)]
    expected = plain + 0.5 * (unit[0] - unit[1]).pow(2).mean()
    found = LogitsKL(runner.trunk.head, hidden=0.5)(out, leaving, False)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("micro", [None, 1])
def test_training_all_is_adam_on_the_real_model(infirmary: Infirmary, micro: int | None) -> None:
    """Batch by batch, with warm-up and cosine, Adam without weight decay."""
    highest = 0.001
    trained = infirmary.heal(train="all", learning_rate=highest, cluster={"micro_batch": micro})
    student, teacher = infirmary.plain()
    blocks = infirmary.blocks_of(student).requires_grad_()
    held = [kl(student, teacher, HELD).item()]
    adam = torch.optim.Adam(blocks.parameters(), betas=(0.9, 0.95))
    losses = []
    for step, ids_BT in enumerate(TRAINED.split(BATCH)):
        adam.param_groups[0]["lr"] = rate(step, highest)
        adam.zero_grad()
        loss = kl(student, teacher, ids_BT)
        loss.backward()
        adam.step()
        losses.append(loss.item())
        held.append(kl(student, teacher, HELD).item())
    assert PARTS == STEPS, "each part is one step"
    assert trained.losses == pytest.approx(losses, rel=1e-3)
    assert trained.held_out == pytest.approx(held, rel=1e-3)
    assert min(held) == held[-1] < 0.98 * held[0], "or it is not the last state that is kept"
    for dense, block in zip(infirmary.stack.kept, blocks, strict=True):
        (file,) = {ref.file for ref in trained.saved.blocks[dense].weights.values()}
        for name, value in load_file(file).items():
            # Adam's first steps are of the rate's size whatever the gradient's, also of one that is
            # little more than rounding.
            difference = (value - block.get_parameter(name)).abs()
            assert difference.mean() < 2e-2 * highest, name


def test_low_rank_updates_start_as_the_model_and_fold_into_it(infirmary: Infirmary) -> None:
    span, runner, (entering, _) = built(infirmary)
    start = list(runner.walk(infirmary.stack, TRAINED[:BATCH]))[-1]
    with torch.no_grad():
        out = torch.cat([span(part) for part in entering.split(2)])
    torch.testing.assert_close(out, start, rtol=1e-5, atol=1e-6)
    trained = infirmary.heal(learning_rate=0.02)
    assert trained.held_out[-1] == min(trained.held_out) < trained.held_out[0]
    student, teacher = infirmary.plain()
    for dense, block in zip(infirmary.stack.kept, infirmary.blocks_of(student), strict=True):
        for name, ref in trained.saved.blocks[dense].weights.items():
            block.get_parameter(name).data.copy_(load_file(ref.file)[name])
    # What is saved is a plain model whose held-out loss is the one that was told.
    assert kl(student, teacher, HELD).item() == pytest.approx(trained.held_out[-1], rel=1e-4)


def test_what_was_best_on_held_out_windows_is_kept(infirmary: Infirmary) -> None:
    """Here the beginning: the rate is far too high."""
    trained = infirmary.heal(train="all", learning_rate=3.0)
    assert min(trained.held_out) == trained.held_out[0]
    teacher = infirmary.blocks_of(infirmary.plain()[1])
    for dense, block in trained.saved.blocks.items():
        for name, ref in block.weights.items():
            assert torch.equal(load_file(ref.file)[name], teacher[dense].get_parameter(name))


def result(trained: Trained) -> dict[str, Any]:
    files = {uri.rsplit("/", 1)[-1]: record.sha256 for uri, record in trained.saved.files.items()}
    return {"losses": trained.losses, "held_out": trained.held_out, "files": files}


@pytest.mark.parametrize(("rate", "best"), [(0.001, PARTS), (0.01, 1), (3.0, 0)])
def test_stopped_after_any_part_it_ends_with_the_same_bytes(
    infirmary: Infirmary, rate: float, best: int
) -> None:
    settings = {"train": "all", "learning_rate": rate}
    undisturbed = infirmary.heal(**settings)
    assert undisturbed.held_out.index(min(undisturbed.held_out)) == best
    for after in range(1, PARTS):
        infirmary.forget()
        with pytest.raises(Stopped):
            infirmary.heal(stop=after, **settings)
        assert result(infirmary.heal(**settings)) == result(undisturbed)
        assert infirmary.said == [f"  going on after part {after} of {PARTS}"]
        assert infirmary.heard == [*range(after + 1, PARTS + 1)]


@pytest.mark.parametrize("rate", [0.001, 3.0])  # the best is what the last look saw, or the first
def test_told_to_end_within_a_part_it_goes_on_to_the_same_bytes(
    infirmary: Infirmary, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pauses, "ASK_SECONDS", 0.0)
    settings = {"train": "all", "learning_rate": rate, "looks": 2}
    undisturbed = infirmary.heal(**settings)
    infirmary.forget()
    step, made = TorchStepper.step, []

    def third_is_told(stepper: TorchStepper, batch: LossBatch) -> torch.Tensor:
        made.append(batch)
        if len(made) == 3:
            signal.raise_signal(signal.SIGTERM)
        return step(stepper, batch)

    with sigterm_stops(), monkeypatch.context() as patch:
        patch.setattr(TorchStepper, "step", third_is_told)
        with pytest.raises(Terminated):
            infirmary.heal(**settings)
    assert result(infirmary.heal(**settings)) == result(undisturbed)
    assert infirmary.said == ["  going on after part 1 of 2 and 1 step"]


def test_states_are_kept_for_one_part_at_a_time(infirmary: Infirmary) -> None:
    infirmary.heal()
    share = WINDOWS // PARTS
    assert infirmary.states == [{0: HELD_OUT, part: share} for part in range(1, PARTS + 1)]


def test_a_rate_that_diverges_names_its_key(infirmary: Infirmary) -> None:
    with pytest.raises(FloatingPointError, match=r"in part \d of 4: lower heal\.learning_rate"):
        infirmary.heal(train="all", learning_rate=1e30)


def test_the_dropped_block_is_the_only_one_missing(infirmary: Infirmary) -> None:
    trained = infirmary.heal()
    assert [*trained.saved.blocks] == [n for n in infirmary.dense.kept if n != DROPPED]
    assert all(math.isfinite(loss) for loss in trained.losses)


class Scaled(nn.Module):
    """A block with a parameter that belongs to no layer in it."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, h_BTD: torch.Tensor) -> torch.Tensor:
        return self.gain * h_BTD


def test_a_parameter_of_the_block_itself_learns() -> None:
    learned = Learned([{"": Masters({"gain": torch.tensor([1.0, 2.0, 3.0])}, torch.float32)}])
    span = Span([Scaled()], learned, [Context((), {})])
    span.form(learned)
    h_BTD = torch.full((1, 2, 3), 5.0)
    out = span(h_BTD)
    assert torch.equal(out, torch.tensor([1.0, 2.0, 3.0]) * h_BTD)
    out.sum().backward()
    span.collect()
    span.root().backward()
    (gain,) = learned.parameters()
    assert torch.equal(gain.grad, torch.full((3,), 10.0))
