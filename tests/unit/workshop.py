"""A tiny model with what every round of fusing it needs, and what the formula makes of its
weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MODELS, hidden_states, load_model, open_stack, token_windows, without_blocks
from safetensors.torch import load_file

from fusegpt_ray.fusion.group_fusion import GroupFusion
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.recipe.sections import Fusion
from fusegpt_ray.recipe.specs import PRESETS
from fusegpt_ray.training.loop import train
from fusegpt_ray.training.span import Span
from fusegpt_ray.training.states import States
from fusegpt_ray.training.stepper import TorchStepper, TrainingConfig

CPU = torch.device("cpu")
WINDOWS, LENGTH, BATCH = 16, 7, 4
IDS = token_windows(WINDOWS, LENGTH)
# Float32 through a few blocks, states of order 1 to 10, where only the order of additions differs.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def settings(preset: str = "paper", **values: Any) -> Fusion:
    small = {
        "group_size": 3,
        "rank": 4,
        "lora_rank": 3,
        "batch": BATCH,
        "epochs": 5,
    }
    return Fusion(**(PRESETS[preset]["fusion"] | small | values))


Weights = dict[str, torch.Tensor]

FAST = {"learning_rate": 0.05, "lora_learning_rate": 0.01}
"""Rates at which a few steps change a tiny model visibly."""


@dataclass
class Workshop:
    """A tiny model with what every round of it needs."""

    name: str
    folder: Path
    out: Path
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        self.dense = open_stack(self.folder)
        self.runner = Runner(self.dense, CPU, self.dtype, batch_size=8)
        self.model = load_model(self.folder)

    def job(
        self,
        donor: int,
        stack: Stack | None = None,
        fuse: bool = True,
        seed: int = 0,
        **values: Any,
    ) -> GroupFusion:
        return GroupFusion(
            stack or self.dense, self.dense, donor, settings(**values), fuse, seed, str(self.out)
        )

    def student(self, job: GroupFusion) -> Span:
        trunk = self.runner.trunk
        contexts = trunk.contexts(BATCH, LENGTH)
        return job.build(trunk.meta_blocks, contexts, CPU, self.dtype)

    def states(self, job: GroupFusion) -> tuple[torch.Tensor, torch.Tensor]:
        return job.source.walk(self.runner, IDS)

    def train(self, job: GroupFusion, student: Span, epochs: int | None = None) -> list[float]:
        """The whole training of a round, as an engine runs it; returns the mean loss of each
        epoch.
        """
        entering, leaving = self.states(job)
        epochs = epochs or job.settings.epochs
        stepper = self.stepper(job, student, epochs * (WINDOWS // BATCH))
        states = States(entering, leaving)
        return train(stepper, lambda _: states.batches(BATCH), epochs, lambda *_: None)

    def stepper(self, job: GroupFusion, student: Span, steps: int) -> TorchStepper:
        """Trains a student as an engine does."""
        s = job.settings
        config = TrainingConfig(s.loss, s.batch, s.epochs, s.betas, s.eps)
        return TorchStepper.make(student, job.parameter_groups(student), config, steps, CPU)

    def fuse(self, job: GroupFusion, epochs: int = 1) -> tuple[Stack, Span]:
        """A whole round: the stack after it, and the student as it was saved."""
        student = self.student(job)
        self.train(job, student, epochs)
        return job.stack.drop(job.donor).swap(job.save(student).blocks), student

    def real(self, stack: Stack) -> Any:
        """The real model without the removed blocks, its weights those that the rounds wrote to
        disk.
        """
        short = without_blocks(self.model, self.name, stack.kept)
        for module, block in zip(
            short.get_submodule(MODELS[self.name].blocks), stack.blocks, strict=True
        ):
            files = {ref.file for ref in block.weights.values()} - {
                ref.file for ref in self.dense.trunk.values()
            }
            for file in files:
                found = module.load_state_dict(load_file(file), strict=False)
                assert not found.unexpected_keys
        return short

    def real_states(self, stack: Stack) -> list[torch.Tensor]:
        return hidden_states(self.real(stack), self.name, IDS)


@pytest.fixture(name="workshop")
def _workshop(request: pytest.FixtureRequest, checkpoint: Any, tmp_path: Path) -> Workshop:
    name = getattr(request, "param", "llama")
    return Workshop(name, checkpoint(name), tmp_path)


def over_batches(student: Span, states: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([student(part) for part in states.split(BATCH)])


def learned(student: Span) -> Weights:
    named = student.learned.named_parameters()
    return {name: value.detach().clone() for name, value in named}


def plain_weights(workshop: Workshop, dense: int) -> Weights:
    return dict(workshop.model.get_submodule(MODELS[workshop.name].blocks)[dense].state_dict())


def collapsed(workshop: Workshop, stack: Stack, dense: int) -> Weights:
    """The plain weights of a block fused once, in round one, with block 2; from what that round
    wrote as learned.
    """
    (name,) = {ref.file for ref in stack.blocks[stack.position(dense)].terms.learned.values()}
    p, own, donor = load_file(name), plain_weights(workshop, dense), plain_weights(workshop, 2)
    out = dict(own)
    for key in own:
        layer, kind = key.rsplit(".", 1)
        if f"{layer}.A" not in p:
            out[key] = p.get(key, own[key])  # a norm learns; a convolution stays as it is
        elif kind == "weight":
            transposed = workshop.name == "gpt2"  # Conv1D's weight is [inputs, outputs]
            update = p[f"{layer}.B"] @ p[f"{layer}.A"]
            out[key] = own[key] + (update.T if transposed else update)
            if key in donor:  # only layers that both blocks of a hybrid model have are fused
                coefficients = p[f"{layer}.C0"] @ p[f"{layer}.D0"]
                out[key] += (coefficients.T if transposed else coefficients) * donor[key]
        else:
            out[key] = own[key] + p[f"{layer}.c0"] * donor[key]
    return out
