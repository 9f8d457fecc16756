"""What rounding does to a group's training: loss curves beside float32's.

    python benchmarks/rounding.py MODEL --data text.txt [--epochs 26] [--json out]

One group is trained for epochs × windows / 8 steps (208 by default) of the default recipe:

- **float32**: arithmetic and low-rank products, seed 0: what the others are compared with;
- **TF32 products**: float32 arithmetic; the products B·A and C·D, and those of their gradients,
  take inputs of TensorFloat32, as on a GPU (there by the hardware; on a CPU inputs are rounded to
  its 10 bits of mantissa);
- **bf16**: bfloat16 arithmetic beside float32 masters;
- **bf16, TF32 products**: both, which is what a GPU does;
- **another seed**: float32, seed 1.

*Difference*: of an epoch's mean loss from float32's, relative; the mean and the largest over all
epochs. A rounding that changes less than another seed does is not worth its avoidance.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from fusegpt_ray import Recipe
from fusegpt_ray.fusion.group_fusion import GroupFusion
from fusegpt_ray.fusion.linear import FusedLinear
from fusegpt_ray.model.device import pick_device, tensor_core_products
from fusegpt_ray.model.source import Source
from fusegpt_ray.text import calibration
from fusegpt_ray.training.loop import train
from fusegpt_ray.training.prefetch import on_device
from fusegpt_ray.training.states import States
from fusegpt_ray.training.stepper import TorchStepper, TrainingConfig
from fusegpt_ray.workers.base import Setup
from fusegpt_ray.workers.local import LocalWorkers

WAYS = {
    "float32": ("float32", False, 0),
    "TF32 products": ("float32", True, 0),
    "bf16": ("bfloat16", False, 0),
    "bf16, TF32 products": ("bfloat16", True, 0),
    "another seed": ("float32", False, 1),
}
"""The arithmetic's dtype, whether products are rounded, and the seed."""


class _Rounded(torch.autograd.Function):
    """A product whose inputs, and those of its gradients' products, are of TensorFloat32."""

    @staticmethod
    def forward(ctx: Any, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(left, right)
        return _tf32(left) @ _tf32(right)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        left, right = ctx.saved_tensors
        grad = _tf32(grads[0])
        return grad @ _tf32(right).T, _tf32(left).T @ grad


def _tf32(value: torch.Tensor) -> torch.Tensor:
    """To the nearest number with 10 bits of mantissa."""
    bits = value.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--donor", type=int, default=3)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=26)
    parser.add_argument("--json", help="write all losses to this file")
    arguments = parser.parse_args(argv)
    found = {name: losses(arguments, *way) for name, way in WAYS.items()}
    print("| way | first | last | difference: mean | largest |\n|---|---|---|---|---|")
    for name, curve in found.items():
        apart = [abs(a / b - 1) for a, b in zip(curve, found["float32"], strict=True)]
        mean, most = statistics.mean(apart), max(apart)
        print(f"| {name} | {curve[0]:.4g} | {curve[-1]:.4g} | {mean:.1e} | {most:.1e} |")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=1) + "\n")
    return 0


def losses(arguments: argparse.Namespace, dtype: str, rounded: bool, seed: int) -> list[float]:
    """The mean loss of every epoch."""
    recipe = Recipe.parse(
        {
            "model": {"source": arguments.model, "dtype": dtype},
            "preset": "rounds",
            "calibration": {
                "data": arguments.data,
                "windows": arguments.windows,
                "length": arguments.length,
            },
            "importance": {"windows": min(32, arguments.windows)},
            "cluster": {"engine": "local"},
            "output": {"uri": tempfile.gettempdir(), "name": "none"},  # nothing is written
        }
    )
    source, settings, device = Source.find(arguments.model, None), recipe.fusion, pick_device()
    dense, text = source.stack(), recipe.calibration
    with LocalWorkers(Setup.of(recipe, source, dense)) as workers:
        stream, runner = workers.tokens(text, "data"), workers.runner
        windows_WT = torch.from_numpy(
            calibration.sample_windows(stream, text.windows, text.length, text.seed, "data")
        )
        job = GroupFusion(dense, dense, arguments.donor, settings, True, seed, "unused")
        states = States(*job.source.walk(runner, windows_WT))
        contexts = runner.trunk.contexts(settings.batch, text.length)
        span = job.build(runner.trunk.meta_blocks, contexts, device, runner.dtype)
        config = TrainingConfig(settings.loss, settings.batch, arguments.epochs)
        steps = arguments.epochs * text.windows // settings.batch
        stepper = TorchStepper.make(span, job.parameter_groups(span), config, steps, device)

        def epoch(_: int) -> Any:
            return on_device(states.batches(settings.batch), device)

        emulated = rounded and device.type == "cpu"
        product = _Rounded.apply if emulated else torch.mm
        hardware = torch.bfloat16 if rounded else torch.float32
        with (
            mock.patch.object(FusedLinear, "product", staticmethod(product)),
            tensor_core_products(device, hardware),
        ):
            return train(stepper, epoch, arguments.epochs, lambda *_: None)


if __name__ == "__main__":
    sys.exit(main())
