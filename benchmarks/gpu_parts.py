"""The parts that `gpu.py` measures, each on its own: seconds, tokens a second, FLOPs, the least
seconds by the device's measured rates, and the most memory.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from plain import adam, blocks_forward, knowledge_loss, plain_group
from random_stack import random_stack
from shapes import Shape

from fusegpt_ray.fusion.group_fusion import GroupFusion
from fusegpt_ray.importance.sweep import Part, sweep
from fusegpt_ray.model.compiled import block_function, compiles
from fusegpt_ray.model.device import set_deterministic, tensor_core_products
from fusegpt_ray.model.memory import empty_cache
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.model.stack import Stack, Terms
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.training.loop import train
from fusegpt_ray.training.prefetch import on_device
from fusegpt_ray.training.states import States
from fusegpt_ray.training.stepper import TorchStepper, TrainingConfig

SCORE_WINDOWS, WINDOWS, LENGTH, EPOCHS = 32, 1024, 2048, 20
"""The paper's budget."""


class Size(NamedTuple):
    """How much of a shape is measured."""

    length: int = LENGTH
    score_windows: int = SCORE_WINDOWS
    state_windows: int = 64
    matmul: int = 8192
    terms: int = 8
    """Donors of a late round whose terms were not folded."""


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
    states: dict[str, States] = field(default_factory=dict)

    @classmethod
    def open(
        cls, shape: Shape, size: Size, folder: str, device: torch.device, peak: float | None
    ) -> Lab:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        set_deterministic(device, True)
        recipe = Recipe.parse(
            {
                "model": {"source": folder},
                "preset": "rounds",
                "calibration": {"data": "none"},
                "output": {"uri": folder, "name": "none"},
            }
        )
        dense = random_stack(shape, size.length, folder, dtype)
        batch, compiled = recipe.importance.batch, compiles("auto", device)
        runner = Runner(dense, device, dtype, batch, recipe.cluster.weights, compiled=compiled)
        rate = peak * 1e12 if peak else matmul_rate(size.matmul, device, dtype)
        return cls(shape, size, folder, runner, dense, recipe, rate, copy_rate(size, device))

    @property
    def dtype(self) -> torch.dtype:
        return self.runner.dtype

    def windows(self, count: int) -> torch.Tensor:
        return torch.randint(self.shape.vocabulary, (count, self.size.length))

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


def score(lab: Lab) -> dict[str, Any]:
    """The reading of the weights alone, then the whole sweep."""
    runner, dense, shape = lab.runner, lab.dense, lab.shape
    windows_WT, batch = lab.windows(lab.size.score_windows), lab.recipe.importance.batch
    sweep(runner, dense, [Part(windows_WT[:batch], (shape.blocks - 1,))])  # warming up
    clock = Clock(runner.device)
    for _ in runner.weights.walk(dense.blocks):
        pass
    reading, _ = clock.stop()
    everyone = tuple(range(shape.blocks))
    parts = [Part(part, everyone) for part in windows_WT.split(batch)]
    clock = Clock(runner.device)
    sweep(runner, dense, parts)
    seconds, gb = clock.stop()
    scaled = reading + max(seconds - reading, 0) * SCORE_WINDOWS / len(windows_WT)
    passed = windows_WT.numel() * shape.blocks * (shape.blocks + 1) / 2
    states = 2 * lab.dtype.itemsize * shape.hidden * passed
    flops = passed * shape.forward_flops(lab.size.length)
    return lab.part(
        seconds, gb, windows_WT.numel() / seconds, flops, states, scaled=scaled, reading=reading
    )


def states(lab: Lab) -> dict[str, Any]:
    """Also keeps some for the parts that train on them."""
    windows_WT = lab.windows(lab.size.state_windows)
    job = lab.job()
    job.source.walk(lab.runner, windows_WT[: lab.runner.batch_size])  # warming up
    clock = Clock(lab.runner.device)
    entering, leaving = (found.cpu() for found in job.source.walk(lab.runner, windows_WT))
    seconds, gb = clock.stop()
    blocks = job.source.start + job.source.stop
    flops = windows_WT.numel() * blocks * lab.shape.forward_flops(lab.size.length)
    moved = 2 * blocks * entering.nbytes
    if lab.runner.device.type == "cuda":
        entering, leaving = entering.pin_memory(), leaving.pin_memory()
    lab.states["found"] = States(entering, leaving)
    tokens = windows_WT.numel() / seconds
    scaled = seconds * WINDOWS / len(windows_WT)
    return lab.part(seconds, gb, tokens, flops, moved, scaled=scaled)


def _states(lab: Lab) -> States:
    if not lab.states:
        states(lab)
    return lab.states["found"]


def finetune(
    lab: Lab,
    compiled: bool | None = None,
    deterministic: bool = True,
    micro_batch: int | None = None,
    recompute: bool = False,
    late: bool = False,
) -> dict[str, Any]:
    """A loss batch to warm up, then one epoch; weights that are kept make room, as in a run."""
    known = _states(lab)
    lab.runner.offload()
    set_deterministic(lab.runner.device, deterministic)
    found = _finetune(lab, known, compiled, micro_batch, recompute, late)
    _tidy(lab)
    return found


def _finetune(
    lab: Lab,
    known: States,
    compiled: bool | None,
    micro_batch: int | None,
    recompute: bool,
    late: bool,
) -> dict[str, Any]:
    runner, device = lab.runner, lab.runner.device
    job = lab.job("at_end", lab.size.terms) if late else lab.job()
    batch, (windows, length) = job.settings.batch, known.entering_WTD.shape[:2]
    contexts = runner.trunk.contexts(micro_batch or batch, length)
    clock = Clock(device)
    run = runner.run_block if compiled is None else block_function(compiled)
    span = job.build(runner.trunk.meta_blocks, contexts, device, lab.dtype, recompute, run)
    building, _ = clock.stop()
    config = TrainingConfig(job.settings.loss, batch, 1)
    groups = job.parameter_groups(span)
    stepper = TorchStepper.make(span, groups, config, 1000, device, micro_batch)

    def epoch(taken: States) -> list[float]:
        return train(stepper, lambda _: on_device(taken.batches(batch), device), 1, lambda *_: None)

    first = slice(batch)
    with tensor_core_products(device, lab.dtype):
        epoch(States(known.entering_WTD[first], known.leaving_WTD[first]))
        clock = Clock(device)
        losses = epoch(known)
        seconds, gb = clock.stop()
    return _trained(lab, seconds, gb, windows * length, build=building, loss=losses[0])


def plain(lab: Lab, collect: bool) -> dict[str, Any]:
    """The paper's loop: everything in the arithmetic's dtype, KL over the batch, Adam."""
    found = _plain(lab, _states(lab), collect)
    _tidy(lab)
    return found


def _plain(lab: Lab, known: States, collect: bool) -> dict[str, Any]:
    runner, device = lab.runner, lab.runner.device
    job, base = lab.job(), runner.trunk.model.model
    start = job.build(runner.trunk.meta_blocks, runner.trunk.contexts(1, 2), device, lab.dtype)
    blocks = [runner.weights.of(block) for block in (*job.neighbours, job.donor_block)]
    starts, rank = start.learned.blocks, job.settings.rank
    student = plain_group(blocks[:-1], blocks[-1], starts, rank).to(device, lab.dtype)
    del start, blocks
    runner.offload()
    empty_cache()
    optimizer, schedule = adam(student, 1000)
    size = job.settings.batch

    def batches(count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        pairs = zip(known.entering_WTD.split(size), known.leaving_WTD.split(size), strict=True)
        for _, (entering, leaving) in zip(range(count), pairs, strict=False):
            yield entering.to(device), leaving.to(device)

    def epoch(count: int) -> None:
        for entering, leaving in batches(count):
            optimizer.zero_grad()
            knowledge_loss(blocks_forward(base, student, entering), leaving).backward()
            optimizer.step()
            schedule.step()
            if collect:
                empty_cache()

    base.rotary_emb.to(device)
    epoch(1)
    clock = Clock(device)
    epoch(len(known.entering_WTD) // size)
    seconds, gb = clock.stop()
    windows, length = known.entering_WTD.shape[:2]
    return _trained(lab, seconds, gb, windows * length)


def _tidy(lab: Lab) -> None:
    set_deterministic(lab.runner.device, True)
    gc.collect()
    empty_cache()
    lab.runner.reload()


def _trained(lab: Lab, seconds: float, gb: float, tokens: int, **more: Any) -> dict[str, Any]:
    shape, group = lab.shape, len(lab.job().neighbours)
    flops = 3 * group * tokens * shape.forward_flops(lab.size.length)
    steps = tokens / lab.size.length / lab.recipe.fusion.batch
    # Each step reads and writes W, its effective form and its gradient, and what learns.
    weights = 6 * lab.dtype.itemsize * shape.products + 8 * 4 * shape.pairs(128)
    states = 6 * tokens * shape.hidden * lab.dtype.itemsize
    moved = group * (steps * weights + states)
    return lab.part(seconds, gb, tokens / seconds, flops, moved, **more)


PARTS: dict[str, Callable[[Lab], dict[str, Any]]] = {
    "score": score,
    "states": states,
    "fine-tune": finetune,
    "fine-tune, the paper's loop in plain torch": partial(plain, collect=False),
    "fine-tune, not compiled": partial(finetune, compiled=False),
    "fine-tune, not deterministic": partial(finetune, deterministic=False),
    "fine-tune, one window at a time, recomputing": partial(
        finetune, micro_batch=1, recompute=True
    ),
    "fine-tune, a late round of fold: at_end": partial(finetune, late=True),
    "fine-tune, the paper's loop, collecting garbage": partial(plain, collect=True),
}


def matmul_rate(size: int, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product: the median of ten, after a first one."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / _median(lambda: torch.matmul(left, right), device)


def copy_rate(size: Size, device: torch.device) -> float:
    """Bytes/s, read and written, of a copy on the device."""
    source = torch.empty(size.matmul**2, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _median(lambda: target.copy_(source), device)


def _median(work: Callable[[], object], device: torch.device) -> float:
    seconds = []
    for _ in range(11):
        clock = Clock(device)
        work()
        seconds.append(clock.stop()[0])
    return statistics.median(seconds[1:])
