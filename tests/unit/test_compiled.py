"""Blocks under torch.compile: once for all blocks and rounds, and never the end of a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from models import open_stack, token_windows
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from workshop import BATCH, FAST, IDS, LENGTH, Workshop, _workshop  # noqa: F401 - a fixture

from fusegpt_ray.importance.sweep import Part, sweep
from fusegpt_ray.model.compiled import CompiledBlock, block_function, compiles
from fusegpt_ray.model.memory import is_out_of_memory
from fusegpt_ray.model.recorder import run_block
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.training.batch import LossBatch
from fusegpt_ray.training.losses import normalized_mse
from fusegpt_ray.training.microbatch import accumulate

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def counting() -> tuple[CompiledBlock, Any]:
    """Dynamo and autograd's part of the compiler are real; only the generation of code, which takes
    a minute, is left out.
    """
    counter = CompileCounterWithBackend("aot_eager")
    return CompiledBlock(counter), counter


# A block of gemma3 looks at all tokens or at the last few: two kinds.
@pytest.mark.parametrize(
    ("workshop", "kinds"), [("llama", 1), ("gemma3", 2)], indirect=["workshop"]
)
def test_compiling_does_not_grow_with_depth_or_rounds(workshop: Workshop, kinds: int) -> None:
    runner, (run, counter) = workshop.runner, counting()
    expected = list(runner.walk(workshop.dense, IDS))[-1]
    runner.compiled, runner.run_block = True, run
    sweep(runner, workshop.dense, [Part(IDS[:8], (0, 2, 3))])
    assert counter.frame_count == kinds
    torch.testing.assert_close(list(runner.walk(workshop.dense, IDS))[-1], expected)

    stack = workshop.dense
    for donor in (2, 1):
        job = workshop.job(donor, stack, **FAST)
        span = workshop.student(job)
        span._run = run
        workshop.train(job, span, 1)
        stack = stack.drop(donor).swap(job.save(span).blocks)
        list(runner.walk(stack, IDS))
        # Each kind without gradients, with them, and as the first of a group: with those of its
        # weights only. Fused layers are plain ones to a block.
        assert 2 * kinds <= counter.frame_count <= 3 * kinds


@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_blocks_learn_the_same(workshop: Workshop, recompute: bool) -> None:
    job = workshop.job(2, preset="rounds", **FAST)
    entering, leaving = (states[:BATCH] for states in workshop.states(job))

    def gradients(run: Callable[..., torch.Tensor]) -> dict[str, torch.Tensor]:
        span = workshop.student(job)
        span._run, span.recompute = run, recompute
        span.form(span.learned)
        accumulate(span, LossBatch(entering, leaving), normalized_mse, 2, False)
        span.root().backward()
        return {name: value.grad for name, value in span.learned.named_parameters()}

    found, expected = gradients(counting()[0]), gradients(run_block)
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()  # sums in another order: float32 roundings of it
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-5 * scale)


def test_fewer_windows_than_usual_are_not_worth_compiling(
    checkpoint: Callable[[str], Path],
) -> None:
    stack = open_stack(checkpoint("llama"))
    runner, (run, counter) = Runner(stack, CPU, torch.float32, batch_size=4), counting()
    runner.compiled, runner.run_block = True, run
    list(runner.walk(stack, token_windows(3, 7)))
    assert counter.frame_count == 0
    list(runner.walk(stack, token_windows(6, 7)))
    assert counter.frame_count == 1


def test_what_cannot_be_compiled_is_run_as_it_is_and_said_once(
    workshop: Workshop, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[int] = []

    def fails(*_: Any) -> Any:
        asked.append(1)
        raise RuntimeError("no compiler here")

    expected = list(workshop.runner.walk(workshop.dense, IDS))[-1]
    workshop.runner.compiled, workshop.runner.run_block = True, CompiledBlock(fails)
    with caplog.at_level(logging.WARNING, "fusegpt_ray"):
        found = list(workshop.runner.walk(workshop.dense, IDS))[-1]
    assert torch.equal(found, expected)
    assert len(asked) == 1
    said = [record.message for record in caplog.records if "not compiled" in record.message]
    assert len(said) == 1
    assert "no compiler here" in said[0]


def test_what_cannot_be_compiled_backwards_is_found_before_the_first_step(
    workshop: Workshop,
) -> None:
    """The way back is compiled when it is first gone, outside of the block's call."""

    def fails(*_: Any) -> Any:
        raise RuntimeError("no way back")

    def plain(graph: Any, _: Any) -> Any:
        return make_boxed_func(graph.forward)

    job = workshop.job(2, preset="rounds", **FAST)
    entering, _ = workshop.states(job)
    span, expected = workshop.student(job), workshop.student(job)
    span._run = CompiledBlock(aot_autograd(fw_compiler=plain, bw_compiler=fails))
    told = span.rehearse(entering[:BATCH])
    assert "not compiled" in told and "no way back" in told
    assert workshop.train(job, span) == workshop.train(job, expected)
    assert not expected.rehearse(entering[:BATCH])  # nothing is compiled on a CPU


def test_memory_that_runs_out_is_no_reason_not_to_compile(workshop: Workshop) -> None:
    def cramped(*_: Any) -> Any:
        raise RuntimeError("CUDA out of memory")

    run = CompiledBlock(cramped)
    block = workshop.runner.weights.of(workshop.dense.blocks[0])
    context = workshop.runner.trunk.contexts(BATCH, LENGTH)[0]
    with pytest.raises(torch._dynamo.exc.TorchDynamoException) as caught:
        run(block, workshop.runner.enter(IDS[:BATCH])[0], context)
    assert is_out_of_memory(caught.value)
    assert not run.gave_up


def test_a_mistake_of_the_model_is_not_hidden(workshop: Workshop) -> None:
    run, _ = counting()
    block = workshop.runner.weights.of(workshop.dense.blocks[0])
    context = workshop.runner.trunk.contexts(4, 7)[0]
    with pytest.raises(RuntimeError, match=r"shape|size"):
        run(block, torch.zeros(4, 7, 3), context)


def test_real_code_computes_the_same(workshop: Workshop) -> None:
    """With the code generator, which takes a while."""
    stack, part = workshop.dense, Part(IDS[:8], (0, 2, 3))
    (expected,) = sweep(workshop.runner, stack, [part])
    workshop.runner.compiled, workshop.runner.run_block = True, block_function(True)
    (found,) = sweep(workshop.runner, stack, [part])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def loaded(file: Path) -> Any:
    spec = spec_from_file_location("module", file, loader=ExtensionFileLoader("module", str(file)))
    assert spec is not None
    return module_from_spec(spec)


@pytest.mark.parametrize("way", ["there", "back"])
def test_a_module_that_a_killed_compiler_left_empty_is_made_anew(
    workshop: Workshop, tmp_path: Path, caplog: pytest.LogCaptureFixture, way: str
) -> None:
    """As the code generator, these compilers load a module that is there and else make it."""
    file = tmp_path / "code.so"
    file.touch()

    def loads(graph: Any, _: Any) -> Any:
        if file.exists():
            loaded(file)
        return make_boxed_func(graph.forward)

    def plain(graph: Any, _: Any) -> Any:
        return make_boxed_func(graph.forward)

    both = {"fw_compiler": plain, "bw_compiler": plain}
    both["fw_compiler" if way == "there" else "bw_compiler"] = loads
    job = workshop.job(2, preset="rounds", **FAST)
    entering, _ = workshop.states(job)
    span = workshop.student(job)
    span._run = run = CompiledBlock(aot_autograd(**both))
    with caplog.at_level(logging.WARNING, "fusegpt_ray"):
        assert not span.rehearse(entering[:BATCH])
    assert not file.exists() and not run.gave_up
    (said,) = [text for text in caplog.messages if "made anew" in text]
    assert str(file) in said


def test_a_module_that_cannot_be_loaded_for_another_reason_stays(
    workshop: Workshop, tmp_path: Path
) -> None:
    """It may be anybody's, a library's say."""
    file = tmp_path / "library.so"
    file.write_bytes(b"no library")

    def fails(*_: Any) -> Any:
        loaded(file)

    workshop.runner.compiled, workshop.runner.run_block = True, (run := CompiledBlock(fails))
    list(workshop.runner.walk(workshop.dense, IDS))
    assert file.read_bytes() == b"no library" and "library.so" in run.gave_up


@pytest.mark.parametrize(
    ("wanted", "on_gpu", "on_cpu"),
    [("auto", True, False), (True, True, True), (False, False, False)],
)
def test_where_blocks_are_compiled(wanted: Any, on_gpu: bool, on_cpu: bool) -> None:
    assert compiles(wanted, torch.device("cuda")) is on_gpu
    assert compiles(wanted, CPU) is on_cpu
