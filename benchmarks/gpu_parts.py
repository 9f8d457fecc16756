"""The parts that `gpu.py` measures, each on its own: seconds, tokens a second, FLOPs, the least
seconds by the device's measured rates, and the most memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from gpu_lab import FRUGAL, SCORE_WINDOWS, WINDOWS, Clock, Lab
from plain import adam, blocks_forward, knowledge_loss, plain_group

from fusegpt_ray.importance.sweep import Part, sweep
from fusegpt_ray.model.compiled import block_function
from fusegpt_ray.model.device import deterministic_kernels, tensor_core_products
from fusegpt_ray.model.memory import empty_cache
from fusegpt_ray.training.loop import train
from fusegpt_ray.training.prefetch import on_device
from fusegpt_ray.training.states import States
from fusegpt_ray.training.stepper import TorchStepper, TrainingConfig


def score(lab: Lab) -> dict[str, Any]:
    """The whole sweep, every block a candidate."""
    runner, dense, shape = lab.runner, lab.dense, lab.shape
    windows_WT, batch = lab.windows(lab.size.score_windows), lab.recipe.importance.batch
    two = replace(dense, blocks=dense.blocks[:2])
    sweep(runner, two, [Part(windows_WT[:batch], (0,))])  # warming up
    reading = 0.0 if runner.resident else lab.reading
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
    """They lie where those of all windows would: in the host's memory, where they are too many for
    the device. Also keeps them for the parts that train on them.
    """
    windows_WT = lab.windows(lab.size.state_windows)
    job, runner = lab.job(), lab.runner.with_batch_size(lab.runner.batch_size)
    for _ in runner.walk(lab.dense, windows_WT[: runner.batch_size], 2):  # warming up
        pass
    runner.memory_share *= len(windows_WT) / WINDOWS
    runner.host_share *= len(windows_WT) / WINDOWS
    clock = Clock(runner.device)
    entering, leaving = job.source.walk(runner, windows_WT)
    seconds, gb = clock.stop()
    blocks = job.source.start + job.source.stop
    flops = windows_WT.numel() * blocks * lab.shape.forward_flops(lab.size.length)
    moved = 2 * blocks * entering.nbytes
    place = "device" if entering.is_cuda else "pinned" if entering.is_pinned() else "not pinned"
    if runner.device.type == "cuda":  # as they lie where they are many
        entering, leaving = (found.cpu().pin_memory() for found in (entering, leaving))
    lab.states["found"] = States(entering, leaving)
    tokens = windows_WT.numel() / seconds
    scaled = seconds * WINDOWS / len(windows_WT)
    return lab.part(seconds, gb, tokens, flops, moved, scaled=scaled, place=place)


def _states(lab: Lab) -> States:
    if not lab.states:
        states(lab)
    return lab.states["found"]


def finetune(
    lab: Lab,
    compiled: bool | None = None,
    micro_batch: int | None = None,
    recompute: bool = False,
    late: bool = False,
) -> dict[str, Any]:
    """A loss batch to warm up, then one epoch; weights that are kept make room, as in a run."""
    runner, device, known = lab.runner, lab.runner.device, _states(lab)
    job = lab.job("at_end", lab.size.terms) if late else lab.job()
    batch, (windows, length) = job.settings.batch, known.entering_WTD.shape[:2]
    at_once = micro_batch or batch
    contexts = runner.trunk.contexts(at_once, length)  # while the trunk is on the device
    runner.offload()
    clock = Clock(device)
    run = runner.run_block if compiled is None else block_function(compiled)
    span = job.build(runner.meta_blocks, contexts, device, lab.dtype, recompute, run)
    building, _ = clock.stop()
    config = TrainingConfig(job.settings.loss, batch, 1)
    groups = job.parameter_groups(span)
    stepper = TorchStepper.make(span, groups, config, 1000, device, micro_batch)

    def epoch(taken: States) -> list[float]:
        return train(stepper, lambda _: on_device(taken.batches(batch), device), 1, lambda *_: None)

    first = slice(batch)
    with tensor_core_products(device, lab.dtype):
        span.rehearse(known.entering_WTD[:at_once].to(device))
        epoch(States(known.entering_WTD[first], known.leaving_WTD[first]))
        clock = Clock(device)
        losses = epoch(known)
        seconds, gb = clock.stop()
    return _trained(lab, seconds, gb, windows * length, build=building, loss=losses[0])


def plain(lab: Lab, collect: bool) -> dict[str, Any]:
    """The paper's loop: everything in the arithmetic's dtype, KL over the batch, Adam."""
    runner, device, known = lab.runner, lab.runner.device, _states(lab)
    job, base = lab.job(), runner.trunk.model.model
    start = job.build(runner.meta_blocks, runner.trunk.contexts(1, 2), device, lab.dtype)
    blocks = [runner.weights.of(block) for block in job.neighbours]
    # A copy, as it makes of the neighbours: what is kept itself goes to the host now.
    donor = copy.deepcopy(runner.weights.of(job.donor_block))
    starts, rank = start.learned.blocks, job.settings.rank
    student = plain_group(blocks, donor, starts, rank).to(device, lab.dtype)
    del start, blocks, donor
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


def _trained(lab: Lab, seconds: float, gb: float, tokens: int, **more: Any) -> dict[str, Any]:
    shape, group = lab.shape, len(lab.job().neighbours)
    flops = 3 * group * tokens * shape.forward_flops(lab.size.length)
    steps = tokens / lab.size.length / lab.recipe.fusion.batch
    # Each step reads and writes W, its effective form and its gradient, and what learns.
    weights = 6 * lab.dtype.itemsize * shape.products + 8 * 4 * shape.pairs(128)
    states = 6 * tokens * shape.hidden * lab.dtype.itemsize
    moved = group * (steps * weights + states)
    return lab.part(seconds, gb, tokens / seconds, flops, moved, **more)


@dataclass(frozen=True)
class Measured:
    """A part, and with which kernels it runs."""

    work: Callable[[Lab], dict[str, Any]]
    exact: bool = True
    """Whether they always give the same bits."""

    def __call__(self, lab: Lab) -> dict[str, Any]:
        lab.tidy()
        with deterministic_kernels(lab.runner.device, self.exact):
            return self.work(lab)


PARTS = {
    "score": Measured(score),
    "states": Measured(states),
    "fine-tune": Measured(finetune),
    "fine-tune, the paper's loop in plain torch": Measured(partial(plain, collect=False), False),
    "fine-tune, not deterministic": Measured(finetune, False),
    "fine-tune, the paper's loop, collecting garbage": Measured(
        partial(plain, collect=True), False
    ),
    FRUGAL: Measured(partial(finetune, micro_batch=1, recompute=True)),
    "fine-tune, a late round of fold: at_end": Measured(partial(finetune, late=True)),
    "fine-tune, not compiled": Measured(partial(finetune, compiled=False)),
}
"""What matters most first: time may be over before the last."""
