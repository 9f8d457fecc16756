"""A family of models on 1 to 256 GPUs: hours, and how well the GPUs are used, by formula.

    python benchmarks/scale.py [--gpus 1 8 32] [--copies 1 4]

7B, 13B and 70B LLaMAs, each published at three sparsities on the way of one run, with the paper's
budget (`budget.py`) in `preset: rounds`. Nothing is run: it is what `fusegpt plan` foretells
(`scheduling/forecast.py`) at the rates that were measured on one GPU (`rates.py`), the longest run
first. Each kind takes as many replicas and training workers as end the whole family first, of 1,
2, 4 … as far as a loss batch can be divided.

Three ways of using the GPUs are told apart:

- "beside": among other sets of workers, replicas and training workers live at the same time, each
  on GPUs of its own, and a run publishes on all of them;
- "in turn": replicas end before training begins, and the other way round;
- "put off": so they do, and a run that others wait for publishes on a single GPU. This is what the
  scheduler does.

`--copies`: so many runs of each model (other texts, say). Efficiency is the GPU hours of all runs,
each on a single GPU, by those that the family holds all its GPUs. A single GPU is taken to have
room for all of them.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from budget import FRUGAL, LENGTH, paper_budget
from random_stack import empty_stack
from shapes import SHAPES

from fusegpt_ray.cost.cost import Cost, cost
from fusegpt_ray.cost.rates import MEASURED, RATES
from fusegpt_ray.planning.outlook import Device
from fusegpt_ray.recipe.recipe import Recipe, blocks_to_remove
from fusegpt_ray.scheduling.forecast import Premises, work
from fusegpt_ray.scheduling.schedule import Work, schedule
from fusegpt_ray.scheduling.waiting import Entry
from fusegpt_ray.targets import Target
from fusegpt_ray.workers.room import Room

MODELS = ("llama2-7b", "llama2-13b", "llama2-70b")
SPARSITIES = (0.125, 0.25, 0.375)
WAYS = ("beside", "in turn", "put off")
COLUMNS = ("loss batch", "runs", "GPUs", "way", "of them for 7B, 13B, 70B", "hours", "efficiency")


@dataclass(frozen=True)
class Member:
    """A run of the family."""

    recipe: Recipe
    cost: Cost
    rounds: int

    @classmethod
    def of(cls, name: str, batch: int) -> Member:
        shape = SHAPES[name]
        recipe = paper_budget(max(SPARSITIES), FRUGAL.get(name, {}))
        fusion = recipe.fusion.model_copy(update={"batch": batch})
        recipe = recipe.model_copy(update={"fusion": fusion})
        removed = [blocks_to_remove(shape.blocks, sparsity) for sparsity in SPARSITIES]
        targets = [
            Target(sparsity, count, f"{name}-p{sparsity}")
            for sparsity, count in zip(SPARSITIES, removed, strict=True)
        ]
        dense = empty_stack(shape, LENGTH, torch.bfloat16)
        return cls(recipe, cost(recipe, dense, targets), removed[-1])

    def on(self, gpus: int) -> Recipe:
        """With so many replicas and training workers."""
        workers = {"replicas": gpus, "workers": gpus}
        cluster = self.recipe.cluster.model_copy(update=workers)
        return self.recipe.model_copy(update={"cluster": cluster})

    def work(self, gpus: int, name: str = "") -> Work:
        """On so many GPUs."""
        return work(name, self.on(gpus), self.cost, self.rounds, RATES[MEASURED], gpus)

    def alone(self) -> float:
        """Seconds on a single GPU."""
        return self.work(1).shared + self.work(1).publishing


def shares(batch: int, most: int) -> list[int]:
    """Numbers of workers that divide a loss batch evenly."""
    return [n for n in (1, 2, 4, 8, 16, 32, 64) if batch % n == 0 and n <= most]


def room(recipes: Sequence[Recipe], gpus: int, way: str) -> Room:
    """On so many GPUs."""
    asked = Premises(Device.named(MEASURED), gpus)
    found = asked.room(recipes)
    if way == "put off":
        return found
    if way == "beside" and not found.roomy and found.sets > 1:
        found = replace(found, needs=[asked.need(one, at_once=True) for one in recipes], roomy=True)
    return replace(found, publishers=())


def hours(members: Sequence[Member], each: Sequence[int], gpus: int, way: str = "put off") -> float:
    """Until the last one ends, on so many GPUs each."""
    runs = sorted(
        (one.work(n, str(number)).shared, number, one, n)
        for number, (one, n) in enumerate(zip(members, each, strict=True))
    )[::-1]
    there = room([one.on(n) for *_, one, n in runs], gpus, way)
    entries = [
        Entry(one.work(n, str(number)), number, need, publisher=publisher)
        for (_, number, one, n), need, publisher in zip(
            runs, there.needs, there.publishers, strict=True
        )
    ]
    return schedule(entries, there).seconds / 3600


def several(
    kinds: Sequence[Member], each: Sequence[int], copies: int
) -> tuple[list[Member], list[int]]:
    """So many runs of each kind, and their GPUs."""
    return [one for one in kinds for _ in range(copies)], [n for n in each for _ in range(copies)]


def best(
    kinds: Sequence[Member], copies: int, batch: int, gpus: int, way: str = "put off"
) -> tuple[float, list[int]]:
    """The shortest, and the GPUs of a run of each kind."""
    found = []
    for each in itertools.product(shares(batch, gpus), repeat=len(kinds)):
        found.append((hours(*several(kinds, each, copies), gpus, way), [*each]))
    return min(found)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 16, 32, 64, 128, 256])
    parser.add_argument("--copies", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32], help="of fine-tuning")
    arguments = parser.parse_args(argv)
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    for batch, copies in itertools.product(arguments.batch, arguments.copies):
        kinds = [Member.of(name, batch) for name in MODELS]
        alone = sum(one.alone() for one in kinds) * copies / 3600
        for gpus, way in itertools.product(arguments.gpus, WAYS):
            took, each = best(kinds, copies, batch, gpus, way)
            cells = [batch, copies * len(kinds), gpus, way, ", ".join(map(str, each))]
            cells += [f"{took:.2f}", f"{alone / gpus / took:.2f}"]
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
