"""One device, true shapes, random weights: what a round costs, beside the paper's plain loop and
beside what the device can do.

    python benchmarks/gpu.py [--shape llama2-7b llama2-13b llama3-8b llama2-70b] [--minutes 8]
    python benchmarks/gpu.py --shape toy        # on a CPU, in a minute

Neither Ray nor DeepSpeed: `Runner`, `sweep`, `GroupFusion` and `TorchStepper`, as the local engine
uses them. Trunk and one block are written to a temporary folder; every block of the model is that
one, read from its file (then from the page cache) once if all fit the device, else each time it is
needed, as the engines do. So a 70B model takes 3 GB of disk, and the reading and copying of a real
one that is cached.

Every part runs alone, the ones that matter most first, until `--minutes` are over:

- **score**: the full table of a round, every block on all windows: the upper bound of a search
  (docs/performance.md). A shape measured on fewer than 32 windows is scaled to 32, the reading of
  its weights apart;
- **states**: entering the group and leaving the dense teacher, as in a round after the first (two
  walks), on some windows and scaled;
- **fine-tune**: steps of the default recipe (8 windows, 7 neighbours, ranks 128), states coming
  from pinned host memory: as the tool does it; not compiled; with kernels that may give other bits;
  with single windows and recomputed activations; with the terms of eight rounds (`fold: at_end`);
  and the paper's loop in plain torch, as its public code does, with a collection of garbage after
  each step and without.

What the student's products and causal attention need, forward and backward, is counted as work:
what forming the fused weights costs on top is not. *Share* is of a large matrix product measured
here, or of `--peak-tflops`. *Least* is what the device would need at its measured rates: the
products at the matrix product's, and reading and writing every weight and state once at the copy's.
Hours: rounds × (score, on the blocks left, + states of 1024 windows + 20 epochs of 1024 × 2048
tokens), without publishing.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from gpu_parts import EPOCHS, LENGTH, PARTS, SCORE_WINDOWS, WINDOWS, Lab, Size
from shapes import SHAPES, Shape

from fusegpt_ray.model.device import pick_device
from fusegpt_ray.publishing.publish import versions

SPARSITY = 0.25
SIZES = dict.fromkeys(SHAPES, Size()) | {
    "toy": Size(length=32, score_windows=4, state_windows=16, matmul=512, terms=2),
    "llama2-70b": Size(score_windows=4, state_windows=16),
}
HEADER = """
| {} | seconds | tokens/s | TFLOP/s | share | least s | GB |
|---|---|---|---|---|---|---|"""


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    device = pick_device()
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    found: dict[str, Any] = {
        "device": name,
        "cuda": torch.version.cuda,
        "versions": versions(),
        "shapes": {},
    }
    ends = time.monotonic() + 60 * arguments.minutes
    for label in arguments.shape:
        if time.monotonic() > ends:
            print(f"\n{label}: no time left")
            continue
        with tempfile.TemporaryDirectory() as folder:
            lab = Lab.open(SHAPES[label], SIZES[label], folder, device, arguments.peak_tflops)
            found["shapes"][label] = row = measure(label, lab, ends, arguments.only)
        if {"score", "states", "fine-tune"} <= row.keys():
            row["hours"] = hours(SHAPES[label], row)
            print(f"\n{label}, a quarter of its blocks: {row['hours']:.2f} hours")
        if arguments.json:
            Path(arguments.json).write_text(json.dumps(found, indent=1) + "\n")
    print(f"\n{name}, {lab.dtype}; GB: the most that was allocated on the device in each part.")
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shapes = [name for name in SHAPES if name != "toy"]
    parser.add_argument("--shape", nargs="+", default=shapes, choices=SHAPES)
    parser.add_argument("--minutes", type=float, default=60, help="no part begins later")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--peak-tflops",
        type=float,
        help="the device's, at the dtype of the arithmetic; left out: measured",
    )
    parser.add_argument("--json", help="write all numbers to this file")
    return parser.parse_args(argv)


def measure(label: str, lab: Lab, ends: float, only: list[str]) -> dict[str, Any]:
    """The parts of one shape that there is time for."""
    row: dict[str, Any] = {
        "peak_tflops": lab.peak / 1e12,
        "copy_gb_per_s": lab.copy_rate / 1e9,
        "resident": lab.runner.resident,
    }
    print(HEADER.format(label))
    for name in only:
        if time.monotonic() > ends:
            print(f"| {name} | no time left | | | | | |")
            continue
        row[name] = part = PARTS[name](lab)
        cells = [
            f"{part['seconds']:.3g}",
            f"{part['tokens']:.0f}",
            f"{part['flops'] / part['seconds'] / 1e12:.3g}",
            f"{part['flops'] / part['seconds'] / lab.peak:.0%}",
            f"{part['least']:.3g}",
            f"{part['gb']:.1f}",
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    return row


def hours(shape: Shape, row: dict[str, Any]) -> float:
    """A run at 25 % with the paper's budget: 1024 windows, 20 epochs, scores on 32 windows."""
    score, states, tuning = (row[name] for name in ("score", "states", "fine-tune"))
    total = 0.0
    for number in range(math.ceil(shape.blocks * SPARSITY)):
        left = shape.blocks - number
        walk = score["scaled"] * left * (left + 1) / (shape.blocks * (shape.blocks + 1))
        steps = EPOCHS * WINDOWS * LENGTH / tuning["tokens"]
        total += walk + states["scaled"] + tuning["build"] + steps
    return total / 3600


if __name__ == "__main__":
    assert SCORE_WINDOWS <= WINDOWS
    sys.exit(main())
