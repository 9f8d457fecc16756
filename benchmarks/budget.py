"""What the paper's budget takes on GPUs, by formula: hours, and gigabytes on each of them.

    python benchmarks/budget.py [--sparsity 0.25]

1024 windows of 2048 tokens, 20 epochs, scores on 32 windows, bfloat16, `preset: rounds`. Nothing
is run: the work and the memory are those of `fusegpt_ray/cost/`, from the
headers that such a model's files would have, and the hours follow from the rates that were measured
on one GPU (`rates.py`). Reading, saving and publishing are not in them, and eight GPUs are taken
to share the computing evenly. 70B trains single windows, and activations are computed again.

The second table is of healing on as many tokens (2.1 million), with low-rank updates (rank 64),
single windows and activations computed again; on eight GPUs with ZeRO 3.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any

import torch
from random_stack import empty_stack
from shapes import SHAPES, Shape

from fusegpt_ray.cost.cost import cost
from fusegpt_ray.cost.footprint import activation_bytes, healing_bytes, training_bytes
from fusegpt_ray.cost.rates import MEASURED, RATES
from fusegpt_ray.recipe.recipe import Recipe, blocks_to_remove
from fusegpt_ray.targets import Target

LENGTH = 2048
FRUGAL = {"llama2-70b": {"micro_batch": 1, "recompute_activations": True}}
HEADER = """
| {} | PFLOP: scoring | states | fine-tuning | hours: 1 GPU | 8 GPUs | GB: fine-tuning | activations | with `fold: at_end` in the last round |
|---|---|---|---|---|---|---|---|---|"""  # noqa: E501 - a table

HEALING = """
| healing | PFLOP | hours: 1 GPU | 8 GPUs | GB: 1 GPU | each of 8 |
|---|---|---|---|---|---|"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sparsity", type=float, default=0.25)
    sparsity = parser.parse_args(argv).sparsity
    rates = RATES[MEASURED]
    print(HEADER.format(MEASURED))
    for name, shape in SHAPES.items():
        if name == "toy":
            continue
        dense = empty_stack(shape, LENGTH, torch.bfloat16)
        rounds = blocks_to_remove(shape.blocks, sparsity)
        recipe = paper_budget(sparsity, FRUGAL.get(name, {}))
        one = cost(recipe, dense, [Target(sparsity, rounds, name)])
        work = {stage.name: stage.flops / 1e15 for stage in one.stages}
        gigabytes = [
            each / 1e9
            for each in (
                training_bytes(recipe, dense, torch.bfloat16, rounds),
                activation_bytes(recipe, dense, torch.bfloat16),
                training_bytes(at_end(recipe), dense, torch.bfloat16, rounds),
            )
        ]
        cells = [f"{work[stage]:.0f}" for stage in ("scoring", "states", "fine-tuning")]
        cells += [f"{one.hours(rates, gpus):.1f}" for gpus in (1, 8)]
        cells += [f"{each:.0f}" for each in gigabytes]
        print(f"| {name} | {' | '.join(cells)} |")
    print(HEALING)
    for name, shape in SHAPES.items():
        if name != "toy":
            print(f"| {name} | {' | '.join(healing(shape, sparsity, rates))} |")
    return 0


def healing(shape: Shape, sparsity: float, rates: Mapping[str, float]) -> list[str]:
    """The cells of a row of the second table."""
    dense = empty_stack(shape, LENGTH, torch.bfloat16)
    rounds = blocks_to_remove(shape.blocks, sparsity)
    cells, held = list[str](), list[str]()
    for workers in (1, 8):
        lean = {"workers": workers, "micro_batch": 1, "recompute_activations": True}
        recipe = paper_budget(sparsity, lean | {"zero_stage": 3}, {"batch": 8})
        found = cost(recipe, dense, [Target(sparsity, rounds, "nowhere")])
        (stage,) = (stage for stage in found.stages if stage.name == "healing")
        if not cells:
            cells.append(f"{stage.flops / 1e15:.0f}")
        cells.append(f"{stage.flops / rates['healing'] / workers / 3600:.2f}")
        bytes_held = healing_bytes(recipe, dense, torch.bfloat16, shape.blocks - rounds)
        held.append(f"{bytes_held / 1e9:.0f}")
    return cells + held


def paper_budget(
    sparsity: float, cluster: Mapping[str, Any], heal: Mapping[str, Any] | None = None
) -> Recipe:
    return Recipe.parse(
        {
            "model": {"source": "none"},
            "preset": "rounds",
            "sparsity": sparsity,
            "calibration": {"data": "none"},
            "cluster": cluster,
            **({"heal": heal} if heal else {}),
            "output": {"uri": "none", "name": "none"},
        }
    )


def at_end(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"fusion": recipe.fusion.model_copy(update={"fold": "at_end"})})


if __name__ == "__main__":
    sys.exit(main())
