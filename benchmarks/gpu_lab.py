"""What `gpu.py` measures with: a shape on a device, the device's rates, and a clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from random_stack import random_stack
from shapes import Shape

from fusegpt_ray.fusion.group_fusion import GroupFusion
from fusegpt_ray.model.compiled import CompiledBlock
from fusegpt_ray.model.device import deterministic_kernels
from fusegpt_ray.model.memory import empty_cache
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.model.stack import Stack, Terms
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.training.states import States

SCORE_WINDOWS, WINDOWS, LENGTH, EPOCHS = 32, 1024, 2048, 20
"""The paper's budget."""
FRUGAL = "fine-tune, one window at a time, recomputing"
"""The part that trains a group of any shape here."""
READ_BLOCKS = 8
"""As many as tell the rate of reading, where blocks are not kept."""


class Size(NamedTuple):
    """How much of a shape is measured."""

    length: int = LENGTH
    score_windows: int = SCORE_WINDOWS
    state_windows: int = 64
    matmul: int = 8192
    terms: int = 8
    """Donors of a late round whose terms were not folded."""
    parts: tuple[str, ...] | None = None
    """What a GPU has memory for; None: all parts."""


@dataclass
class Lab:
    """A shape on a device, with the device's rates."""

    shape: Shape
    size: Size
    folder: str
    runner: Runner
    dense: Stack
    recipe: Recipe
    peak: float
    """FLOP/s of a large matrix product."""
    copy_rate: float
    """Bytes/s, read and written, of a copy on the device."""
    read_rate: float
    """Bytes/s of blocks from the page cache to the device, with nothing else to do."""
    states: dict[str, States] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        shape: Shape,
        size: Size,
        folder: str,
        device: torch.device,
        peak: float | None,
        compiled: bool,
    ) -> Lab:
        """The rates first: they begin with what strict kernels ask of cuBLAS's first handle."""
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        with deterministic_kernels(device, True):
            rate = peak * 1e12 if peak else matmul_rate(size.matmul, device, dtype)
            copying = copy_rate(size, device)
        empty_cache()
        recipe = Recipe.parse(
            {
                "model": {"source": folder},
                "preset": "rounds",
                "calibration": {"data": "none"},
                "output": {"uri": folder, "name": "none"},
            }
        )
        dense = random_stack(shape, size.length, folder, dtype)
        batch, weights = recipe.importance.batch, recipe.cluster.weights
        runner = Runner(dense, device, dtype, batch, weights, compiled=compiled)
        reading = read_rate(runner, dense)
        return cls(shape, size, folder, runner, dense, recipe, rate, copying, reading)

    @property
    def dtype(self) -> torch.dtype:
        return self.runner.dtype

    @property
    def blocks(self) -> str:
        """Whether they are compiled, or why not."""
        run = self.runner.run_block
        if isinstance(run, CompiledBlock):
            return run.gave_up or "blocks are compiled"
        return "blocks are not compiled"

    @property
    def reading(self) -> float:
        """Seconds to read all blocks once."""
        weights = [ref for block in self.dense.blocks for ref in block.weights.values()]
        return sum(ref.end - ref.begin for ref in weights) / self.read_rate

    def windows(self, count: int) -> torch.Tensor:
        return torch.randint(self.shape.vocabulary, (count, self.size.length))

    def tidy(self) -> None:
        """As before the first part: nothing of the last one is held, and weights that are kept are
        on the device. A part that failed may have left them on the host.
        """
        empty_cache()
        self.runner.reload()

    def job(self, fold: str = "each_round", terms: int = 1) -> GroupFusion:
        """A round in the middle of the model, after one that removed block 1; with the terms of so
        many rounds.
        """
        settings = self.recipe.fusion.model_copy(update={"fold": fold})
        stack, middle = self.dense.drop(1), self.shape.blocks // 2
        if terms > 1:
            donor = stack.blocks[stack.position(middle)]
            fused = {
                block.dense: replace(
                    block, terms=Terms(block.weights, (donor,) * (terms - 1), learned={})
                )
                for block in stack.blocks
                if block.dense != middle
            }
            stack = stack.swap(fused)
        return GroupFusion(stack, self.dense, middle, settings, True, 0, self.folder)

    def part(
        self, seconds: float, gb: float, tokens: float, flops: float, moved: float, **more: Any
    ) -> dict[str, Any]:
        """`tokens`: a second; `flops` and `moved` bytes: the least that there is to do."""
        least = max(flops / self.peak, moved / self.copy_rate)
        return {
            "seconds": seconds,
            "gb": gb,
            "tokens": tokens,
            "flops": flops,
            "least": least,
            **more,
        }


class Clock:
    """Seconds of work and the most memory allocated on the device meanwhile."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        self.begin = time.perf_counter()

    def stop(self) -> tuple[float, float]:
        """Seconds and GB (0 on a CPU, where nobody counts)."""
        gb = 0.0
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            gb = torch.cuda.max_memory_allocated(self.device) / 1e9
        return time.perf_counter() - self.begin, gb


def matmul_rate(size: int, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product: the median of ten, after a first one."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / _median(lambda: torch.matmul(left, right), device)


def copy_rate(size: Size, device: torch.device) -> float:
    """Bytes/s, read and written, of a copy on the device."""
    source = torch.empty(size.matmul**2, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _median(lambda: target.copy_(source), device)


def read_rate(runner: Runner, dense: Stack) -> float:
    """Bytes/s of blocks' weights, after a first block: of all that will be kept, which so are there
    for every part, else of a few.
    """
    weights, blocks = runner.weights, dense.blocks
    weights.of(blocks[0])
    before, clock = weights.bytes_read, Clock(runner.device)
    for _ in weights.walk(blocks if runner.resident else blocks[:READ_BLOCKS]):
        pass
    seconds, _ = clock.stop()
    return (weights.bytes_read - before) / seconds


def _median(work: Callable[[], object], device: torch.device) -> float:
    seconds = []
    for _ in range(11):
        clock = Clock(device)
        work()
        seconds.append(clock.stop()[0])
    return statistics.median(seconds[1:])
