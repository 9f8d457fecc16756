"""What only a GPU can show. Other tests that compute through `LocalWorkers` use it, too, where
there is one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import open_stack
from workshop import BATCH, FAST, IDS, LENGTH, settings

from fusegpt_ray.fusion.group_fusion import GroupFusion
from fusegpt_ray.importance.sweep import Part, sweep
from fusegpt_ray.model.compiled import block_function
from fusegpt_ray.model.device import deterministic_kernels, tensor_core_products
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.training.loop import train
from fusegpt_ray.training.prefetch import on_device
from fusegpt_ray.training.states import States
from fusegpt_ray.training.stepper import TorchStepper, TrainingConfig

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def _deterministic() -> Any:
    with deterministic_kernels(GPU, True):
        yield


def make_runner(folder: Path, compiled: bool) -> Runner:
    stack = open_stack(folder)
    return Runner(stack, GPU, torch.bfloat16, BATCH, "resident", compiled=compiled)


def trained(folder: Path, out: Path, compiled: bool) -> dict[str, torch.Tensor]:
    """What a group learns in three epochs, its states in pinned memory."""
    runner, dense = make_runner(folder, compiled), open_stack(folder)
    chosen = settings("rounds", epochs=3, **FAST)
    job = GroupFusion(dense, dense, 2, chosen, True, 0, str(out))
    entering, leaving = (h.cpu().pin_memory() for h in job.source.walk(runner, IDS))
    states, contexts = States(entering, leaving), runner.trunk.contexts(BATCH, LENGTH)
    run = block_function(compiled)
    span = job.build(runner.trunk.meta_blocks, contexts, GPU, runner.dtype, run=run)
    config = TrainingConfig(chosen.loss, chosen.batch, chosen.epochs)
    stepper = TorchStepper.make(span, job.parameter_groups(span), config, 12, GPU)
    assert stepper.optimizer.defaults["fused"]
    with tensor_core_products(GPU, runner.dtype):
        train(stepper, lambda _: on_device(states.batches(BATCH), GPU), 3, lambda *_: None)
    return {name: value.detach().cpu() for name, value in span.learned.named_parameters()}


@pytest.mark.parametrize("compiled", [False, True])
def test_the_same_training_gives_the_same_bits(
    compiled: bool, checkpoint: Any, tmp_path: Path
) -> None:
    one, other = (trained(checkpoint("llama"), tmp_path, compiled) for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_compiled_blocks_score_alike(checkpoint: Any) -> None:
    folder = checkpoint("llama")
    part = Part(IDS[: 2 * BATCH], (0, 2, 3))
    plain, compiled = (
        sweep(make_runner(folder, compiled), open_stack(folder), [part])[0]
        for compiled in (False, True)
    )
    # bfloat16 rounds to 2^-9, and compiled blocks round less often.
    torch.testing.assert_close(compiled, plain, rtol=0.1, atol=1e-3)


def test_batches_arrive_whole_and_in_order() -> None:
    batches = [(torch.full((64, 1024), float(n)).pin_memory(),) * 2 for n in range(20)]
    for number, (entering, leaving) in enumerate(on_device(batches, GPU)):
        assert entering.is_cuda
        assert bool((entering == number).all()) and bool((leaving == number).all())
    assert number == 19
