"""What only a GPU can show. Other tests that compute through `LocalWorkers` use it, too, where
there is one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import open_stack
from workshop import BATCH, FAST, IDS, LENGTH, settings

from fusegpt_ray.fusion.group_fusion import GroupFusion
from fusegpt_ray.importance.sweep import Part, sweep
from fusegpt_ray.model.compiled import CompiledBlock, block_function
from fusegpt_ray.model.device import deterministic_kernels, tensor_core_products
from fusegpt_ray.model.recorder import run_block
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.store.checkpoint import read_tensors
from fusegpt_ray.training.batch import LossBatch
from fusegpt_ray.training.loop import train
from fusegpt_ray.training.losses import normalized_mse
from fusegpt_ray.training.microbatch import accumulate
from fusegpt_ray.training.prefetch import on_device
from fusegpt_ray.training.states import States
from fusegpt_ray.training.stepper import TorchStepper, TrainingConfig

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
GPU_BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


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
    numbered = [torch.full((64, 1024), float(n)).pin_memory() for n in range(20)]
    arrived = on_device([LossBatch(states, states) for states in numbered], GPU)
    for number, batch in enumerate(arrived):
        assert batch.entering_bTD.is_cuda
        assert all(bool((states == number).all()) for states in batch.tensors)
    assert number == 19


def test_blocks_that_made_room_compute_the_same_bits(checkpoint: Any) -> None:
    """Kept on the device, brought there from the host for their turn, and kept there again; twice,
    because copies on the host are used again.
    """
    stack, runner = open_stack(checkpoint("llama")), make_runner(checkpoint("llama"), False)

    def states() -> list[torch.Tensor]:
        return [h_WTD.cpu().clone() for h_WTD in runner.walk(stack, IDS)]

    def weights() -> list[torch.Tensor]:
        return [w for module in runner.weights._kept.values() for w in module.parameters()]

    expected = states()
    assert runner.weights.kept == len(stack) and all(weight.is_cuda for weight in weights())
    for _ in range(2):
        runner.offload(trunk=False)
        for found, right in zip(states(), expected, strict=True):
            assert torch.equal(found, right)
        assert all(weight.is_pinned() for weight in weights()), "they went back after their turn"
        runner.offload()
        assert not any(weight.is_cuda for weight in runner.trunk.model.parameters())
        runner.reload()
        assert all(weight.is_cuda for weight in weights())
        for found, right in zip(states(), expected, strict=True):
            assert torch.equal(found, right)
    assert runner.weights.kept == len(stack)


def test_a_block_is_read_ahead_into_memory_that_nobody_uses(checkpoint: Any) -> None:
    """What is read is looked at late, while the next blocks are read and their memory is taken."""
    stack = open_stack(checkpoint("llama"))
    runner = Runner(stack, GPU, torch.float32, BATCH, "streamed")
    seen: list[dict[str, torch.Tensor]] = []
    for _ in range(3):
        for _, module in runner.weights.walk(stack.blocks):
            torch.cuda._sleep(20_000_000)  # cycles: some ten milliseconds
            seen.append({name: value.clone() for name, value in module.named_parameters()})
            del module
    assert len(seen) == 3 * len(stack)
    for block, found in zip(stack.blocks * 3, seen, strict=True):
        expected = {name: value.float() for name, value in read_tensors(block.weights).items()}
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name].cpu(), expected[name]) for name in expected)


@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_blocks_have_the_gradients_of_plain_ones(
    recompute: bool, checkpoint: Any, tmp_path: Path
) -> None:
    """In float32. Activations are computed again in autograd's own thread of the device, where
    settings of the compiler could be others, and after more kinds of calls than torch compiles by
    default.
    """
    stack = open_stack(checkpoint("llama"))
    runner = Runner(stack, GPU, torch.float32, BATCH, "resident")
    job = GroupFusion(stack, stack, 2, settings("rounds", **FAST), True, 0, str(tmp_path))
    entering, leaving = (h.to(GPU)[:BATCH] for h in job.source.walk(runner, IDS))
    contexts, compiled = runner.trunk.contexts(BATCH, LENGTH), CompiledBlock()
    block = runner.weights.of(stack.blocks[0])
    with torch.no_grad():
        for count in range(1, 10):
            states = torch.randn(count, LENGTH, entering.shape[-1], device=GPU)
            compiled(block, states, runner.context(0, states))

    def gradients(run: Any) -> dict[str, torch.Tensor]:
        span = job.build(runner.meta_blocks, contexts, GPU, runner.dtype, recompute, run)
        assert not span.rehearse(entering)
        span.form(span.learned)
        accumulate(span, LossBatch(entering, leaving), normalized_mse, BATCH, False)
        span.root().backward()
        return {name: value.grad for name, value in span.learned.named_parameters()}

    found, expected = gradients(compiled), gradients(run_block)
    assert not compiled.gave_up
    for name, gradient in expected.items():
        # Sums in another order: float32 roundings of the largest.
        scale = gradient.abs().max().item()
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-4 * scale)


@pytest.mark.timeout(600)
def test_the_benchmark_runs_to_its_end(tmp_path: Path) -> None:
    """In a process of its own, as it is run; with compiled blocks."""
    out = tmp_path / "out.json"
    options = ["--shape", "toy", "--minutes", "5", "--json", str(out)]
    done = subprocess.run(
        [sys.executable, str(GPU_BENCHMARK), *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    row = json.loads(out.read_text())["shapes"]["toy"]
    assert row["blocks"] == "blocks are compiled"
    assert row["hours"] > 0, done.stdout
    assert "no time left" not in done.stdout
