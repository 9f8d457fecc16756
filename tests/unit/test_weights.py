"""Blocks that are kept on the device, and blocks that are read again, one ahead of the one in
use.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cramped import limit_memory
from models import DEPTH, open_stack, token_windows
from torch.multiprocessing.spawn import spawn
from watching import Watch, size_of

from fusegpt_ray.importance.sweep import STATES_SHARE, Part, sweep
from fusegpt_ray.model import memory, weights
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.model.stack import Block, Stack
from fusegpt_ray.store.writer import Entry, write_safetensors

CPU = torch.device("cpu")
IDS = token_windows(6, 9)


@pytest.fixture
def stack(checkpoint: Callable[[str], Path]) -> Stack:
    return open_stack(checkpoint("llama"))


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    watch = Watch()
    monkeypatch.setattr(weights, "read_tensors", watch)
    return watch


def runner(stack: Stack, how: str, share: float = 1.0) -> Runner:
    return Runner(stack, CPU, torch.float32, 2, how, share)


def changed(stack: Stack, position: int, folder: Path) -> Stack:
    """With new weights in one block, as after a round."""
    block = stack.blocks[position]
    values = {
        name: torch.full(ref.shape, 0.01, dtype=ref.dtype) for name, ref in block.weights.items()
    }
    entries = [
        Entry(name, value.dtype, tuple(value.shape), lambda value=value: value)
        for name, value in values.items()
    ]
    _, refs = write_safetensors(str(folder / f"new-{position}.safetensors"), entries)
    return stack.swap({block.dense: Block(block.dense, refs)})


def table(runner: Runner, stack: Stack) -> torch.Tensor:
    return torch.cat(
        sweep(runner, stack, [Part(part, tuple(range(len(stack)))) for part in IDS.split(2)])
    )


def test_kept_and_streamed_blocks_give_the_same_bits(stack: Stack, tmp_path: Path) -> None:
    kept, streamed = runner(stack, "resident"), runner(stack, "streamed")
    for after in (stack, stack.drop(2), changed(stack.drop(2), 1, tmp_path)):
        for _ in range(2):
            assert torch.equal(table(kept, after), table(streamed, after))


def test_only_blocks_that_a_round_changed_are_read_again(
    stack: Stack, watch: Watch, tmp_path: Path
) -> None:
    keeping = runner(stack, "resident")
    table(keeping, stack)
    assert len(watch.alive) == DEPTH
    table(keeping, stack)
    table(keeping, stack.drop(3))
    assert len(watch.alive) == DEPTH
    after = changed(stack, 1, tmp_path)
    table(keeping, after)
    assert watch.asked[-len(stack.blocks[1].weights) :] == list(after.blocks[1].weights.values())
    table(keeping, stack)  # the teacher's blocks are still there
    assert len(watch.alive) == DEPTH + 1
    table(
        keeping, changed(after, 1, tmp_path / "later")
    )  # what `after` had in place of block 1 makes room
    assert keeping.weights.kept == DEPTH + 1


def test_what_is_forgotten_is_let_go_and_read_again(stack: Stack, watch: Watch) -> None:
    keeping = runner(stack, "resident")
    table(keeping, stack)
    assert any(ref() is not None for ref in watch.memory)
    keeping.weights.forget()
    assert not any(ref() is not None for ref in watch.memory)
    table(keeping, stack)
    assert len(watch.alive) == 2 * DEPTH


def test_a_walk_that_is_given_up_leaves_no_thread(stack: Stack) -> None:
    before = threading.active_count()
    walk = runner(stack, "streamed").weights.walk(stack.blocks)
    next(walk)
    assert threading.active_count() == before + 1
    walk.close()
    assert threading.active_count() == before


def test_the_next_block_is_read_while_one_is_in_use(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = threading.Semaphore(0)
    real = weights.read_tensors

    def reading(refs: dict[str, object]) -> dict[str, torch.Tensor]:
        found = real(refs)
        read.release()
        return found

    monkeypatch.setattr(weights, "read_tensors", reading)
    walk = runner(stack, "streamed").weights.walk(stack.blocks)
    for number, _ in enumerate(walk):
        assert read.acquire(timeout=30), f"block {number}"
        if number < DEPTH - 1:
            assert read.acquire(timeout=30), f"block {number + 1}, beside block {number}"
            read.release()


def fails_once_aside(failure: Exception) -> Callable[..., dict[str, torch.Tensor]]:
    """Reading as ever, but for the first read in another thread than the main one."""
    real, failed = weights.read_tensors, []

    def read(refs: dict[str, object]) -> dict[str, torch.Tensor]:
        if threading.current_thread() is not threading.main_thread() and not failed:
            failed.append(refs)
            raise failure
        return real(refs)

    return read


def test_where_two_blocks_are_too_many_the_next_is_read_when_its_turn_comes(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = table(runner(stack, "streamed"), stack)
    monkeypatch.setattr(
        weights, "read_tensors", fails_once_aside(RuntimeError("can't allocate memory"))
    )
    assert torch.equal(table(runner(stack, "streamed"), stack), expected)


def test_another_failure_of_the_reader_is_not_swallowed(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "read_tensors", fails_once_aside(OSError("the disk is gone")))
    with pytest.raises(OSError, match="the disk is gone"):
        table(runner(stack, "streamed"), stack)


def test_blocks_are_kept_where_they_take_little_of_the_free_memory(stack: Stack) -> None:
    assert runner(stack, "auto").resident
    dense = sum(size_of(block.weights) for block in stack.blocks)
    assert not runner(stack, "auto", share=dense / memory.free_bytes(CPU)).resident  # all of it
    assert runner(stack, "auto", share=10 * dense / memory.free_bytes(CPU)).resident


def _limited(_: int, folder: str) -> None:
    stack = open_stack(Path(folder))
    before, more = memory.free_bytes(CPU), 50_000_000
    assert before > 10 * more
    share = (
        2
        * sum(size_of(block.weights) for block in stack.blocks)
        / (weights.RESIDENT_SHARE * before)
    )
    assert runner(stack, "auto", share).resident
    limit_memory(more)
    assert memory.free_bytes(CPU) <= more
    assert not runner(stack, "auto", share).resident


def test_a_limit_of_the_process_counts(checkpoint: Callable[[str], Path]) -> None:
    spawn(_limited, (str(checkpoint("llama")),), nprocs=1)


def test_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("900000\n")
    (tmp_path / "memory.stat").write_text("anon 600000\ninactive_file 200000\nactive_file 5\n")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory.free_bytes(CPU) == 300_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_bytes(CPU) > 1_000_000


@pytest.mark.parametrize(("parts", "reads"), [(3.5, 1), (2.2, 2), (1.1, 3), (0.1, 3)])
def test_windows_whose_states_do_not_fit_walk_one_after_the_other(
    parts: float, reads: int, stack: Stack, watch: Watch
) -> None:
    """`parts`: how many of the three batches' states fit. Nothing else changes, to the last bit."""
    expected = table(runner(stack, "resident"), stack)
    watch.alive.clear()
    hidden = stack.config["hidden_size"]
    room = parts * 2 * IDS.shape[1] * hidden * 4 * (1 + DEPTH)
    share = room / STATES_SHARE / memory.free_bytes(CPU)
    found = table(runner(stack, "streamed", share), stack)
    assert torch.equal(found, expected)
    assert len(watch.alive) == reads * DEPTH
