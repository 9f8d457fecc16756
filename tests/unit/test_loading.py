"""Processes of a node take turns in loading where its memory is too small for all at once, and what
each moves there from its GPU is no more than its share.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import open_stack, token_windows

from fusegpt_ray.distributed import loading
from fusegpt_ray.distributed.loading import turn
from fusegpt_ray.model import weights
from fusegpt_ray.model.memory import pinned_bytes
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.model.weights import OFFLOAD_SHARE, stored_bytes

FREE = 100


@pytest.fixture(autouse=True)
def _node(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A node with so much memory, whose temporary folder nobody else uses."""
    monkeypatch.setattr(loading, "free_bytes", lambda device: FREE)
    monkeypatch.setattr(loading, "PAUSE", 0.001)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def most_at_once(needed: int, processes: int, expected: int) -> int:
    """How many were in their turn at the same time; each stays there until so many are. (A lock is
    that of an open file, so threads keep each other out as processes do.)
    """
    inside, most, counting, together = 0, 0, threading.Lock(), threading.Barrier(expected)

    def load() -> None:
        nonlocal inside, most
        with turn(needed, processes):
            with counting:
                inside += 1
                most = max(most, inside)
            together.wait(30)
            with counting:
                inside -= 1

    threads = [threading.Thread(target=load) for _ in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert inside == 0
    return most


@pytest.mark.parametrize(("needed", "at_once"), [(0, 4), (12, 4), (25, 2), (40, 1), (1000, 1)])
def test_no_more_load_at_once_than_half_of_the_free_memory_allows(
    needed: int, at_once: int
) -> None:
    assert most_at_once(needed, 4, at_once) == at_once


def test_a_folder_that_is_not_ours_costs_the_turns_and_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / f"fusegpt-ray-{loading.os.geteuid()}").symlink_to(tmp_path / "elsewhere")
    with turn(1000, 2), turn(1000, 2):
        pass
    assert "load without turns" in caplog.text


def test_blocks_that_make_room_on_a_gpu_take_this_process_s_share_of_the_host(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU no memory can be pinned: a block that is moved would raise."""
    stack = open_stack(checkpoint("llama"))
    runner = Runner(stack, torch.device("cpu"), torch.float32, 2, "resident")
    list(runner.walk(stack, token_windows(2, 8)))
    one = max(stored_bytes([block]) for block in stack.blocks)
    monkeypatch.setattr(weights, "free_bytes", lambda device: int(2 * one / OFFLOAD_SHARE))
    assert runner.weights.kept == len(stack)
    runner.weights.offload(host_share=1 / 4)
    assert runner.weights.kept == 0


def test_pinned_memory_is_counted_as_torch_takes_it(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block that fits by its own size, and does not as it would be pinned, is not moved."""
    sizes = [0, 1, 2, 3, 4, 5, 1000, 1 << 30, (1 << 30) + 1]
    assert [*map(pinned_bytes, sizes)] == [0, 1, 2, 4, 4, 8, 1024, 1 << 30, 1 << 31]
    stack = open_stack(checkpoint("llama"))
    runner = Runner(stack, torch.device("cpu"), torch.float32, 2, "resident")
    list(runner.walk(stack, token_windows(2, 8)))
    tensors = [[ref.end - ref.begin for ref in block.weights.values()] for block in stack.blocks]
    largest, pinned = max(map(sum, tensors)), min(sum(map(pinned_bytes, one)) for one in tensors)
    assert 1.05 * largest < pinned, "the model's tensors have sizes that are no power of two"
    monkeypatch.setattr(weights, "free_bytes", lambda device: int(1.02 * largest / OFFLOAD_SHARE))
    runner.weights.offload()
    assert runner.weights.kept == 0
