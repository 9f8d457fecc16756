"""What the parts of a run take on a GPU: measured by `gpu.py`, or from FLOPs and assumptions. Numbers only, for the simulator."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from shapes import Shape


class Budget(NamedTuple):
    """What the recipe asks; the paper's."""

    score_windows: int = 32
    batch: int = 4
    windows: int = 1024
    length: int = 2048
    epochs: int = 20
    loss_batch: int = 8
    sparsity: float = 0.25
    group: int = 7
    rank: int = 128


class Rates(NamedTuple):
    """What the parts of a run take, in seconds."""

    block: float
    """A block-forward of one window."""
    tune_window: float
    """A window of a step: forward and backward of a group of all its neighbours."""
    tune_step: float = 0.0
    """What every worker does once a step: forming the effective weights, and back; the optimizer."""
    read: float = 0.0
    """A block's weights, read into the device."""
    keeps: bool = True
    """Blocks stay there."""
    held: float = math.inf
    """States of a window that may be held while they walk; of one model each."""
    share: float = 0.0
    """Handing out a share and taking its result."""
    store: float = 0.0
    """A byte of states into the object store, or out of it; for one process."""
    reduce: float = 0.0
    """A byte of gradients between two workers."""
    replica: float = 0.0
    """Start of the replicas."""
    makes_way: bool = False
    """Replicas end for every training and start again after it."""
    train: float = 0.0
    """Start of a group's training."""
    group: float = 0.0
    """Building and saving a group."""
    once: float = 0.0
    """Everything that a run does once: start, tokenising, evaluation, publishing, proof."""


class Machine(NamedTuple):
    """Assumptions about GPUs: 8 in a node, of 80 GB each."""

    peak_tflops: float = 989.0
    """An H100's, dense bf16, by its data sheet."""
    sweep_share: float = 0.5
    """Of that, in scoring and states."""
    tune_share: float = 0.4
    """Of that, in fine-tuning."""
    memory_gb: float = 80.0
    read_gbs: float = 5.0
    """Of a checkpoint in the page cache, through the host to the device."""
    store_gbs: float = 2.0
    """States through the object store, a process."""
    reduce_gbs: float = 200.0
    """All-reduce over NVLink; all workers are in one node."""
    replica: float = 30.0
    train: float = 17.0
    share: float = 0.05
    group: float = 10.0
    publish_gbs: float = 0.5
    """Reading, writing and proving the published model."""
    once: float = 120.0


def gpu_rates(shape: Shape, budget: Budget, machine: Machine, measured: dict[str, Any] | None = None) -> Rates:
    """From FLOPs and assumptions, or where there are any, from the numbers of `benchmarks/gpu.py` for this shape."""
    peak = machine.peak_tflops * 1e12
    forward = shape.forward_flops(budget.length) * budget.length
    block = forward / (peak * machine.sweep_share)
    window = 3 * budget.group * forward / (peak * machine.tune_share)
    step = 12 * budget.group * shape.products * budget.rank / (peak * machine.tune_share)
    weights = 2 * shape.products  # bytes of a block
    keeps, read, group = shape.blocks * weights <= 0.4 * machine.memory_gb * 1e9, weights / machine.read_gbs / 1e9, machine.group
    if measured:  # there `score` is a full table of 32 windows
        score, tune = measured["score"], measured["finetune"]
        reading = score.get("reading", 0.0)
        block = max(score["seconds"] - reading, 0) / (32 * shape.blocks * (shape.blocks + 1) / 2)
        whole = budget.length / tune["tokens"] * budget.loss_batch  # of a step; divided as the FLOPs are
        window, step = (whole * part / (budget.loss_batch * window + step) for part in (window, step))
        keeps, group = measured.get("resident", keeps), tune["build"]
        read = read if keeps else reading / shape.blocks  # of blocks that are there, `reading` is none
    return Rates(
        block=block,
        tune_window=window,
        tune_step=step,
        read=read,
        keeps=keeps,
        held=0.7 * (machine.memory_gb * 1e9 - 3 * weights) / (2 * budget.length * shape.hidden),
        share=machine.share,
        store=1 / machine.store_gbs / 1e9,
        reduce=1 / machine.reduce_gbs / 1e9,
        replica=machine.replica,
        makes_way=True,
        train=machine.train,
        group=group,
        once=machine.once + 2 * (shape.blocks * shape.products + 2 * shape.vocabulary * shape.hidden) / machine.publish_gbs / 1e9,
    )
