"""Fine-tuning a group is the same in plain torch and in DeepSpeed, on one worker and on two."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
import torch.distributed as dist
from models import open_stack, token_windows
from torch.multiprocessing.spawn import spawn

from fusegpt_ray.distributed import training
from fusegpt_ray.distributed.replicas import Replica, Replicas
from fusegpt_ray.distributed.states import batches, datasets, group_states_of_workers
from fusegpt_ray.distributed.training import DeepSpeedStepper
from fusegpt_ray.fusion.round import Round, build_student, group_states
from fusegpt_ray.model.architecture import build_meta_blocks
from fusegpt_ray.model.recorder import Context
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.sections import PRESETS, Fusion
from fusegpt_ray.training.loop import Stepper, TorchStepper, batches_of, train

pytestmark = pytest.mark.integration

CPU = torch.device("cpu")
WINDOWS, LENGTH, BATCH, EPOCHS = 32, 12, 8, 5
STEPS = EPOCHS * WINDOWS // BATCH  # 20
STAGES = (0, 1, 2, 3)
LOSSES = ("batch_kl", "normalized_mse")
MICRO = (4, 2)
"""Windows at once; with two workers 4 are a whole share of the loss batch."""
SETTINGS = PRESETS["default"] | {
    "group_size": 3,
    "rank": 4,
    "lora_rank": 4,
    "epochs": EPOCHS,
    "batch": BATCH,
    "learning_rate": 0.01,
    "lora_learning_rate": 0.005,
}

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Learned:
    """What one way of training gives."""

    gradients: Tensors
    """Of the first step."""
    weights: Tensors
    """After all steps."""
    losses: list[float]


@dataclass(frozen=True)
class Task:
    """Everything a worker needs to train a group."""

    job: Round
    contexts: list[Context]
    """For the rows of one micro-batch."""
    entering: torch.Tensor
    leaving: torch.Tensor

    def student(self) -> torch.nn.Module:
        return build_student(
            self.job,
            build_meta_blocks(self.job.dense.config),
            self.contexts,
            self.job.plan(torch.float32),
            CPU,
        )

    def learn(self, stepper: Stepper, share: int) -> list[float]:
        return train(
            stepper, lambda: batches_of(self.entering, self.leaving, share), EPOCHS, lambda *_: None
        )


def task(
    folder: Path,
    loss: str,
    rank: int,
    workers: int,
    out: str = "nowhere",
    micro_batch: int | None = None,
) -> Task:
    """A worker's part of the round that fuses block 2 of the tiny model."""
    stack = open_stack(folder)
    job = Round(stack, stack, 2, Fusion(**SETTINGS | {"loss": loss}), True, 0, out)
    runner = Runner(stack, CPU, torch.float32, BATCH)
    rows = torch.arange(WINDOWS).view(-1, workers, BATCH // workers)[:, rank].ravel()
    entering, leaving = group_states(runner, job, token_windows(WINDOWS, LENGTH))
    return Task(
        job,
        runner.trunk.contexts(micro_batch or BATCH // workers, LENGTH),
        entering[rows],
        leaving[rows],
    )


def learn_in_torch(folder: Path, loss: str, micro_batch: int | None = None) -> Learned:
    this = task(folder, loss, 0, 1, micro_batch=micro_batch)
    student = this.student()
    stepper = TorchStepper.make(student, this.job.settings, STEPS, CPU, micro_batch)
    gradients: Tensors = {}
    stepper.optimizer.register_step_pre_hook(
        lambda *_: _note(gradients, student, lambda value: value.grad)
    )
    losses = this.learn(stepper, BATCH)
    return Learned(gradients, _weights(student), losses)


def learn_in_deepspeed(rank: int, workers: int, folder: Path, out: Path) -> None:
    """One of the data-parallel workers: every loss with every ZeRO stage and micro-batch; the
    first one saves what came out.
    """
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{out}/meet{workers}", rank=rank, world_size=workers
    )
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(workers), LOCAL_RANK=str(rank))
    found: dict[tuple[str, int, int], Learned] = {}
    for loss, stage, micro in itertools.product(LOSSES, STAGES, MICRO):
        this = task(folder, loss, rank, workers, micro_batch=micro)
        student = this.student()
        stepper = DeepSpeedStepper.make(student, this.job.settings, STEPS, stage, CPU, micro)
        gradients: Tensors = {}
        stepper.engine.step = _after(
            lambda g=gradients, s=student: _note(g, s, safe_get_full_grad), stepper.engine.step
        )
        losses = this.learn(stepper, BATCH // workers)
        with deepspeed.zero.GatheredParameters(list(student.parameters()), enabled=stage == 3):
            found[loss, stage, micro] = Learned(gradients, _weights(student), losses)
        stepper.engine.destroy()
    if rank == 0:
        torch.save(found, out / f"learned{workers}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _note(
    gradients: Tensors, student: torch.nn.Module, gradient: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Keep the first step's gradients. (In ZeRO-3 all workers must ask for each.)"""
    if not gradients:
        gradients.update(
            (name, gradient(value).clone())
            for name, value in student.named_parameters()
            if value.requires_grad
        )


def _after(first: Callable[[], None], then: Callable[[], Any]) -> Callable[[], Any]:
    def both() -> Any:
        first()
        return then()

    return both


def _weights(student: torch.nn.Module) -> Tensors:
    return {name: value.detach().clone() for name, value in student.named_parameters()}


@pytest.fixture(scope="module")
def plain(checkpoint) -> dict[str, Learned]:
    """Loss → what plain torch learns."""
    return {loss: learn_in_torch(checkpoint("llama"), loss) for loss in LOSSES}


@pytest.fixture(scope="module")
def distributed(checkpoint, tmp_path_factory) -> dict[int, dict[tuple[str, int, int], Learned]]:
    """Workers → (loss, ZeRO stage, micro-batch) → what DeepSpeed learns."""
    out = tmp_path_factory.mktemp("workers")
    counts = (1, 2)
    groups = [
        spawn(learn_in_deepspeed, (count, checkpoint("llama"), out), nprocs=count, join=False)
        for count in counts
    ]
    for group in groups:
        while not group.join():
            pass
    return {count: torch.load(out / f"learned{count}.pt", weights_only=False) for count in counts}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("micro", MICRO)
@pytest.mark.parametrize("loss", LOSSES)
def test_deepspeed_learns_what_plain_torch_learns(
    plain, distributed, loss: str, micro: int, stage: int, workers: int
) -> None:
    compare(distributed[workers][loss, stage, micro], plain[loss])


@pytest.mark.parametrize("micro", [4, 2, 1])
@pytest.mark.parametrize("loss", LOSSES)
def test_micro_batches_learn_what_the_whole_batch_does(
    checkpoint, plain, loss: str, micro: int
) -> None:
    compare(learn_in_torch(checkpoint("llama"), loss, micro), plain[loss])


def compare(found: Learned, expected: Learned) -> None:
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        # Workers and micro-batches add in another order: float32 rounding, relative to the largest
        # of a tensor's gradients.
        scale = gradient.abs().max().item()
        torch.testing.assert_close(
            found.gradients[name], gradient, rtol=0, atol=1e-5 * scale, msg=_named(name)
        )
    for name, weight in expected.weights.items():
        # Adam divides by the gradient's size, so tiny gradients' rounding grows into their steps.
        torch.testing.assert_close(found.weights[name], weight, rtol=0, atol=1e-5, msg=_named(name))
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)


def _named(name: str) -> Callable[[str], str]:
    return lambda text: f"{name}: {text}"


@pytest.mark.parametrize("loss", LOSSES)
def test_twenty_steps_change_every_weight_far_more_than_the_tolerance(
    checkpoint, plain, loss: str
) -> None:
    before = _weights(task(checkpoint("llama"), loss, 0, 1).student())
    for name, weight in plain[loss].weights.items():
        assert (weight - before[name]).abs().max() > 1e-3, name
    assert plain[loss].losses[-1] < 0.9 * plain[loss].losses[0]


# --- through Ray Train ---

REPLICA = Replica(count=2, cpus=1, gpus=0, threads=1, dtype=torch.float32, rows=BATCH)


def test_deepspeed_leaves_the_arithmetic_as_it_is(checkpoint, tmp_path) -> None:
    """On a GPU, DeepSpeed switches off the autocast it is called under. Its question is
    answered here as there.
    """
    spawn(_one_bf16_step, (checkpoint("qwen3"), tmp_path), nprocs=1)
    assert (tmp_path / "done").exists()


def _one_bf16_step(_: int, folder: Path, out: Path) -> None:
    asked = torch.is_autocast_enabled
    torch.is_autocast_enabled = lambda *device: asked(*device) if device else True
    dist.init_process_group("gloo", init_method=f"file://{out}/meet", rank=0, world_size=1)
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    stack = open_stack(folder)
    job = Round(stack, stack, 2, Fusion(**SETTINGS), True, 0, str(out))
    runner = Runner(stack, CPU, torch.bfloat16, BATCH)
    states = group_states(runner, job, token_windows(BATCH, LENGTH))
    contexts = runner.trunk.contexts(BATCH, LENGTH)
    student = build_student(job, runner.trunk.meta_blocks, contexts, job.plan(torch.bfloat16), CPU)
    stepper = DeepSpeedStepper.make(student, job.settings, STEPS, 1, CPU, BATCH)
    assert torch.isfinite(stepper.step(states))
    (out / "done").touch()


def test_batches_come_in_order(ray_session) -> None:
    """Ray's formatting threads overtake each other, the more so where one batch takes longer,
    unless they are told not to.
    """
    rows = [
        {
            "entering": np.full((4,), n),
            "leaving": np.full((1,), n),
            "slow": ["word"] * (0 if n % 3 else 100_000),
        }
        for n in np.arange(30, dtype=np.float32)
    ]
    data = {"states-0": ray.data.from_items(rows, override_num_blocks=1).materialize()}
    ((shard,),) = [
        list(worker.values())
        for worker in training.unsplit_in_order().configure(data, 1, None, None)
    ]
    for _ in range(3):
        assert [leaving[0].item() for _, leaving in batches(shard, 1)] == list(range(30))


def test_states_of_many_windows_come_in_order(ray_session, checkpoint, tmp_path) -> None:
    """From two replicas, in several objects each."""
    job = task(checkpoint("llama"), "batch_kl", 0, 1).job
    windows = token_windows(5 * BATCH, LENGTH)
    replicas = Replicas(job.dense, REPLICA)
    (states,) = datasets(group_states_of_workers(job, windows.numpy(), 1, replicas, BATCH)).values()
    replicas.close()
    found = list(batches(states.iterator(), len(windows)))
    assert len(found) == 1
    expected = group_states(Runner(job.dense, CPU, torch.float32, BATCH), job, windows)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[0], expected, strict=True))
