"""One device, true shapes, random weights: what a round costs, beside the paper's plain loop and
beside what the device can do.

    python benchmarks/gpu.py [--shape llama2-7b llama2-70b …] [--minutes 8] [--json out.json]
    python benchmarks/gpu.py --shape toy              # on a CPU, in half a minute
    python benchmarks/gpu.py --shape toy --compile    # blocks compiled as on a GPU, in minutes

Neither Ray nor DeepSpeed: `Runner`, `sweep`, `GroupFusion` and `TorchStepper`, as the local engine
uses them. Trunk and one block are written to a temporary folder; every block of the model is that
one, read from its file (then from the page cache) once if all fit the device, else each time it is
needed, as the engines do. So a 70B model takes 3 GB of disk, and the reading and copying of a real
one that is cached.

Every part runs alone, the ones that matter most first, until `--minutes` are over; so do the
shapes. What was measured is written to `--json` after each part. A part that fails, or needs more
memory than there is, has a row that says so, and the others go on; after a failure the exit status
is 1.

- **score**: the full table of a round, every block on all windows: the upper bound of a search
  (docs/performance.md). A shape measured on fewer than 32 windows is scaled to 32, the reading of
  its weights apart;
- **states**: entering the group and leaving the dense teacher, as in a round after the first (two
  walks), on some windows and scaled; they wait where those of all windows would;
- **fine-tune**: steps of the default recipe (8 windows, 7 neighbours, ranks 128), states coming
  from pinned host memory: as the tool does it; with kernels that may give other bits; with single
  windows and recomputed activations; with the terms of eight rounds (`fold: at_end`); not compiled;
  and the paper's loop in plain torch, as its public code does, with a collection of garbage after
  each step and without, with whichever kernels torch takes. A 70B group is trained with single
  windows only: nothing else fits one GPU.

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
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from gpu_lab import EPOCHS, FRUGAL, LENGTH, SCORE_WINDOWS, WINDOWS, Lab, Size
from gpu_parts import PARTS
from shapes import SHAPES, Shape

from fusegpt_ray.model.compiled import compiles
from fusegpt_ray.model.device import pick_device
from fusegpt_ray.model.memory import empty_cache, is_out_of_memory
from fusegpt_ray.publishing.publish import versions

T = TypeVar("T")
SPARSITY = 0.25
SIZES = {
    "llama2-7b": Size(),
    "llama2-70b": Size(score_windows=4, state_windows=16, parts=("score", "states", FRUGAL)),
    "llama2-13b": Size(),
    "llama3-8b": Size(),
    "toy": Size(length=32, score_windows=4, state_windows=16, matmul=512, terms=2),
}
"""What matters most first."""
HEADER = """
| {} | seconds | tokens/s | TFLOP/s | share | least s | GB |
|---|---|---|---|---|---|---|"""
say = partial(print, flush=True)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    device = pick_device()
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    shapes: dict[str, dict[str, Any]] = {}
    found = {
        "device": name,
        "cuda": torch.version.cuda,
        "versions": versions(),
        "shapes": shapes,
    }
    ends = time.monotonic() + 60 * arguments.minutes
    for label in arguments.shape:
        if time.monotonic() > ends:
            say(f"\n{label}: no time left")
            continue
        row = shapes[label] = {}
        measure(label, row, arguments, device, ends, partial(save, arguments.json, found))
        # Nothing of a shape stays on the device: the next one measures how much is free there.
        torch._dynamo.reset()
        empty_cache()
    say(f"\n{name}; GB: the most that was allocated on the device in each part.")
    parts = [part for row in shapes.values() for part in row.values() if isinstance(part, dict)]
    return int(any("failed" in part for part in parts))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shapes = [name for name in SIZES if name != "toy"]
    parser.add_argument("--shape", nargs="+", default=shapes, choices=SIZES)
    parser.add_argument("--minutes", type=float, default=60, help="no part begins later")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--peak-tflops",
        type=float,
        help="the device's, at the dtype of the arithmetic; left out: measured",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile blocks on a CPU, too, as on a GPU: needs a C++ compiler",
    )
    parser.add_argument("--json", help="write all numbers to this file, after each part")
    return parser.parse_args(argv)


def measure(
    label: str,
    row: dict[str, Any],
    arguments: argparse.Namespace,
    device: torch.device,
    ends: float,
    keep: Callable[[], None],
) -> None:
    """Fill `row` with the parts of one shape that there is time for, and `keep` it after each."""
    shape, size = SHAPES[label], SIZES[label]
    with tempfile.TemporaryDirectory() as folder:
        say(HEADER.format(label))
        compiled = arguments.compile or compiles("auto", device)
        opened = partial(Lab.open, shape, size, folder, device, arguments.peak_tflops, compiled)
        lab, problem = attempt(opened)
        row |= {"opening": problem} if lab is None else facts(lab)
        keep()
        if lab is None:
            say(f"| opening | {told(problem)} | | | | | |")
            return
        for name in arguments.only:
            if name not in (size.parts or PARTS):
                continue
            if time.monotonic() > ends:
                say(f"| {name} | no time left | | | | | |")
                continue
            part, problem = attempt(partial(PARTS[name], lab))
            row[name] = problem if part is None else part
            row["blocks"] = lab.blocks
            keep()
            cells = [told(problem), *[""] * 5] if part is None else cells_of(part, lab.peak)
            say(f"| {name} | {' | '.join(cells)} |")
        weights = "kept on the device" if lab.runner.resident else "read for every walk"
        rate = f"{lab.read_rate / 1e9:.2f} GB/s from the page cache"
        say(f"\n{label}: {lab.dtype}; {lab.blocks}; weights are {weights}, at {rate}")
        if (total := hours(shape, row)) is not None:
            row["hours"] = total
            keep()
            say(f"{label}, a quarter of its blocks: {total:.2f} hours")


def attempt(work: Callable[[], T]) -> tuple[T | None, dict[str, str]]:
    """What `work` finds, or why it finds nothing. The error ends here, and with it what its frames
    hold of the device's memory.
    """
    try:
        return work(), {}
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        if is_out_of_memory(error):
            return None, {"too large": reason}
        traceback.print_exc()
        return None, {"failed": reason}


def told(problem: Mapping[str, str]) -> str:
    """For a cell of a table."""
    ((kind, reason),) = problem.items()
    return f"{kind}: {reason[:80]}".replace("|", "/")


def facts(lab: Lab) -> dict[str, Any]:
    return {
        "peak_tflops": lab.peak / 1e12,
        "copy_gb_per_s": lab.copy_rate / 1e9,
        "read_gb_per_s": lab.read_rate / 1e9,
        "resident": lab.runner.resident,
        "dtype": str(lab.dtype),
    }


def cells_of(part: Mapping[str, Any], peak: float) -> list[str]:
    return [
        f"{part['seconds']:.3g}",
        f"{part['tokens']:.0f}",
        f"{part['flops'] / part['seconds'] / 1e12:.3g}",
        f"{part['flops'] / part['seconds'] / peak:.0%}",
        f"{part['least']:.3g}",
        f"{part['gb']:.1f}",
    ]


def save(path: str | None, found: Mapping[str, Any]) -> None:
    """Whole or not at all, so that whoever ends the process leaves the parts before."""
    if path:
        part = Path(f"{path}.part")
        part.write_text(json.dumps(found, indent=1) + "\n")
        part.replace(path)


def hours(shape: Shape, row: Mapping[str, Any]) -> float | None:
    """A run at 25 % with the paper's budget: 1024 windows, 20 epochs, scores on 32 windows. None
    where one of its parts was not measured.
    """
    score, states = row.get("score", {}), row.get("states", {})
    tuning = next(
        (row[name] for name in ("fine-tune", FRUGAL) if "tokens" in row.get(name, {})), None
    )
    if tuning is None or "scaled" not in score or "scaled" not in states:
        return None
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
