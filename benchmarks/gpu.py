"""One device, true shapes, random weights: what a round costs, and what a run at 25 % with the
paper's budget would take.

    python benchmarks/gpu.py [--shape llama2-7b llama2-13b llama3-8b llama2-70b] [--peak-tflops 989]
    [--micro-batch 8] python benchmarks/gpu.py --shape toy        # on a CPU, in seconds

Neither Ray nor DeepSpeed: `Runner`, `sweep`, `GroupFusion` and `TorchStepper`, as
the local engine uses them. Trunk and one block are written to a temporary folder; every block of
the model is that one, read from its file (then from the page cache) once if all fit the device,
else each time it is needed, as the engines do. So a 70B model takes 3 GB of disk, and the reading
and copying of a real one that is cached.

- **score**: the full table of a round, every block on all windows: the upper bound of a search
  (docs/performance.md). A shape measured on fewer than 32 windows is scaled to 32, the reading of
  its weights apart;
- **states**: entering the group and leaving the dense teacher, as in a round after the first (two
  walks), on some windows and scaled;
- **fine-tune**: steps of the default recipe (8 windows, 7 neighbours, ranks 128), states coming
  from host memory. What the student's products and causal attention need, forward and backward, is
  counted: what forming the fused weights costs on top is not;
- **share**: of `--peak-tflops`, or of a large matrix product measured here;
- **hours**: rounds × (score, on the blocks left, + states of 1024 windows + 20 epochs of 1024 ×
  2048 tokens). Without publishing, and with the fused terms of a first round in all rounds.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from shapes import SHAPES, Shape

from fusegpt_ray.fusion.group_fusion import GroupFusion
from fusegpt_ray.importance.sweep import Part, sweep
from fusegpt_ray.model.architecture import dense_stack, find_blocks
from fusegpt_ray.model.config import build_skeleton
from fusegpt_ray.model.runner import Runner, pick_device
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.publishing.publish import versions
from fusegpt_ray.recipe import Recipe
from fusegpt_ray.store.checkpoint import Entry, write_safetensors
from fusegpt_ray.training.loop import train
from fusegpt_ray.training.states import States
from fusegpt_ray.training.stepper import TorchStepper, TrainingConfig

SCORE_WINDOWS, WINDOWS, LENGTH, EPOCHS, SPARSITY = 32, 1024, 2048, 20, 0.25
"""The paper's budget."""
HEADER = """| shape | score s | TFLOP/s | share | GB | states s | GB | fine-tune tokens/s | TFLOP/s | share | GB | hours |
|---|---|---|---|---|---|---|---|---|---|---|---|"""  # noqa: E501 - a table


class Size(NamedTuple):
    """How much of a shape is measured."""

    length: int = LENGTH
    score_windows: int = SCORE_WINDOWS
    state_windows: int = 64
    matmul: int = 8192


SIZES = dict.fromkeys(SHAPES, Size()) | {
    "toy": Size(length=32, score_windows=4, state_windows=16, matmul=512),
    "llama2-70b": Size(score_windows=4, state_windows=16),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape", nargs="+", default=[name for name in SHAPES if name != "toy"], choices=SHAPES
    )
    parser.add_argument(
        "--peak-tflops",
        type=float,
        help="the device's, at the dtype of the arithmetic; left out: measured",
    )
    parser.add_argument(
        "--micro-batch",
        type=int,
        help="windows of a loss batch that pass the group at once; left out: all 8",
    )
    parser.add_argument("--json", help="write all numbers to this file")
    arguments = parser.parse_args(argv)
    device = pick_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    found: dict[str, Any] = {
        "device": name,
        "cuda": torch.version.cuda,
        "dtype": str(dtype),
        "versions": versions(),
        "shapes": {},
    }
    print(HEADER)
    for label in arguments.shape:
        with tempfile.TemporaryDirectory() as folder:
            found["shapes"][label] = row = measure(
                SHAPES[label], SIZES[label], folder, device, dtype, arguments
            )
        score, states, tuning = row["score"], row["states"], row["finetune"]
        cells = [
            f"{score['seconds']:.1f}",
            f"{score['tflops']:.3g}",
            f"{score['share']:.0%}",
            f"{score['gb']:.1f}",
        ]
        cells += [f"{states['seconds']:.1f}", f"{states['gb']:.1f}"]
        cells += [
            f"{tuning['tokens']:.0f}",
            f"{tuning['tflops']:.3g}",
            f"{tuning['share']:.0%}",
            f"{tuning['gb']:.1f}",
        ]
        print(f"| {label} | {' | '.join(cells)} | {row['hours']:.2f} |", flush=True)
        if arguments.json:
            Path(arguments.json).write_text(json.dumps(found, indent=1) + "\n")
    print(f"\n{name}, {dtype}; GB: the most that was allocated on the device in each step.")
    return 0


def measure(
    shape: Shape,
    size: Size,
    folder: str,
    device: torch.device,
    dtype: torch.dtype,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Every step of one shape."""
    flops = shape.forward_flops(size.length)
    peak = (
        arguments.peak_tflops * 1e12
        if arguments.peak_tflops
        else matmul_rate(size.matmul, device, dtype)
    )
    dense = random_stack(shape, size.length, folder, dtype)
    recipe = Recipe.parse(
        {
            "model": {"source": folder},
            "calibration": {"data": "none"},
            "output": {"uri": folder, "name": "none"},
        }
    )
    runner = Runner(dense, device, dtype, recipe.importance.batch, recipe.cluster.weights)
    windows_WT = torch.randint(
        shape.vocabulary, (max(size.score_windows, size.state_windows), size.length)
    )
    row: dict[str, Any] = {"peak_tflops": peak / 1e12, "resident": runner.resident}
    row["score"] = measure_score(runner, dense, shape, windows_WT[: size.score_windows], recipe)
    # A round in the middle of the model, after one that removed block 1.
    job = GroupFusion(dense.drop(1), dense, shape.blocks // 2, recipe.fusion, True, 0, folder)
    states, row["states"] = measure_states(runner, job, windows_WT[: size.state_windows])
    row["finetune"] = measure_finetuning(runner, job, states, recipe, arguments.micro_batch)
    rates = {
        "score": row["score"].pop("token_blocks") * flops,
        "finetune": 3 * len(job.neighbours) * row["finetune"]["tokens"] * flops,
    }
    for step, rate in rates.items():
        row[step] |= {"tflops": rate / 1e12, "share": rate / peak}
    row["hours"] = hours(shape, row)
    return row


def measure_score(
    runner: Runner, dense: Stack, shape: Shape, windows_WT: torch.Tensor, recipe: Recipe
) -> dict[str, Any]:
    """The reading of the weights alone, then the whole sweep."""
    sweep(runner, dense, [Part(windows_WT[:1], (shape.blocks - 1,))])  # warming up
    clock = Clock(runner.device)
    for _ in runner.weights.walk(dense.blocks):
        pass
    reading, _ = clock.stop()
    everyone = tuple(range(shape.blocks))
    parts = [Part(part, everyone) for part in windows_WT.split(recipe.importance.batch)]
    clock = Clock(runner.device)
    sweep(runner, dense, parts)
    seconds, gb = clock.stop()
    scaled = reading + max(seconds - reading, 0) * SCORE_WINDOWS / len(windows_WT)
    return {
        "seconds": scaled,
        "measured": seconds,
        "reading": reading,
        "windows": len(windows_WT),
        "gb": gb,
        "token_blocks": shape.blocks * (shape.blocks + 1) / 2 * windows_WT.numel() / seconds,
    }


def measure_states(
    runner: Runner, job: GroupFusion, windows_WT: torch.Tensor
) -> tuple[States, dict[str, Any]]:
    clock = Clock(runner.device)
    entering, leaving = (states.cpu() for states in job.source.walk(runner, windows_WT))
    seconds, gb = clock.stop()
    return States(entering, leaving), {
        "seconds": seconds * WINDOWS / len(windows_WT),
        "measured": seconds,
        "windows": len(windows_WT),
        "gb": gb,
    }


def measure_finetuning(
    runner: Runner, job: GroupFusion, states: States, recipe: Recipe, micro_batch: int | None
) -> dict[str, Any]:
    """A loss batch to warm up, then one epoch."""
    settings, device = recipe.fusion, runner.device
    windows, length = states.entering_WTD.shape[:2]
    clock = Clock(device)
    contexts = runner.trunk.contexts(micro_batch or settings.batch, length)
    student = job.build(runner.trunk.meta_blocks, contexts, device, runner.dtype)
    building, _ = clock.stop()
    config = TrainingConfig(settings.loss, settings.batch, 1)
    groups = job.parameter_groups(student)
    stepper = TorchStepper.make(student, groups, config, 1000, device, micro_batch)

    def epoch(taken: States) -> list[float]:
        return train(stepper, lambda: taken.batches(settings.batch), 1, lambda *_: None)

    first = slice(settings.batch)
    epoch(States(states.entering_WTD[first], states.leaving_WTD[first]))
    clock = Clock(device)
    losses = epoch(states)
    seconds, gb = clock.stop()
    return {
        "tokens": windows * length / seconds,
        "seconds": seconds,
        "build": building,
        "loss": losses[0],
        "gb": gb,
    }


def hours(shape: Shape, row: dict[str, Any]) -> float:
    """A run at 25 % with the paper's budget."""
    total = 0.0
    for number in range(math.ceil(shape.blocks * SPARSITY)):
        left = shape.blocks - number
        total += row["score"]["seconds"] * left * (left + 1) / (shape.blocks * (shape.blocks + 1))
        total += (
            row["states"]["seconds"]
            + row["finetune"]["build"]
            + EPOCHS * WINDOWS * LENGTH / row["finetune"]["tokens"]
        )
    return total / 3600


def random_stack(shape: Shape, length: int, folder: str, dtype: torch.dtype) -> Stack:
    """A LLaMA whose blocks are all the same one, in two small files."""
    config = transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=length,
        tie_word_embeddings=False,
    )
    raw = config.to_dict()
    model = build_skeleton(raw)
    path = find_blocks(model)

    def value(size: torch.Size) -> torch.Tensor:
        return torch.ones(size) if len(size) == 1 else 0.02 * torch.randn(size)  # norms, products

    sizes = {name: parameter.shape for name, parameter in model.named_parameters()}
    trunk = [
        Entry(name, dtype, size, partial(value, size))
        for name, size in sizes.items()
        if not name.startswith(f"{path}.")
    ]
    first = f"{path}.0."
    block = [
        Entry(name, dtype, size, partial(value, size))
        for name, size in sizes.items()
        if name.startswith(first)
    ]
    _, refs = write_safetensors(f"{folder}/trunk.safetensors", trunk)
    _, same = write_safetensors(f"{folder}/block.safetensors", block)
    for number in range(shape.blocks):
        refs |= {f"{path}.{number}.{name.removeprefix(first)}": ref for name, ref in same.items()}
    return dense_stack(raw, refs)


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
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - self.begin
        return seconds, (
            torch.cuda.max_memory_allocated(self.device) / 1e9
            if self.device.type == "cuda"
            else 0.0
        )


def matmul_rate(size: int, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product: the median of ten, after a first one."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(11):
        clock = Clock(device)
        torch.matmul(left, right)
        times.append(clock.stop()[0])
    return 2 * size**3 / statistics.median(times[1:])


if __name__ == "__main__":
    sys.exit(main())
