"""A family of models on 1 to 256 GPUs: hours, and how well the GPUs are used, by formula.

    python benchmarks/scale.py [--gpus 1 8 32] [--copies 1 4] [--check]

7B, 13B and 70B LLaMAs, each published at three sparsities on the way of one run, with the paper's
budget (`budget.py`) in `preset: rounds`. Work is that of `fusegpt_ray/cost.py`, at the rates that
were measured on one GPU (`rates.py`). A run on several GPUs is divided as it is in truth: scoring
by batches of windows, of which the first is looked at alone; fine-tuning by loss batches, of which
each worker takes the same part. What no GPU shortens is assumed: 10 s a round, and publishing at 1
GB/s. Members wait in the family's own line (`scheduling/waiting.py`), here with a clock that is
turned on by hand, the longest first. Each takes as many GPUs as end the whole family first, of 1,
2, 4 … as far as a loss batch can be divided.

`--copies`: so many runs of each model (other texts, say). Efficiency is the GPU hours of all runs,
each on a single GPU, by those that the family holds all its GPUs. A single GPU is taken to have
room for all of them.

`--check` runs the same lines in threads that sleep, an hour in half a second, and prints both.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from budget import FRUGAL, LENGTH, paper_budget
from random_stack import empty_stack
from shapes import SHAPES

from fusegpt_ray.cost import Cost, cost
from fusegpt_ray.rates import MEASURED, RATES
from fusegpt_ray.recipe import Recipe, blocks_to_remove
from fusegpt_ray.scheduling.waiting import Entry, Waiting
from fusegpt_ray.targets import Target
from fusegpt_ray.workers.room import Need

MODELS = ("llama2-7b", "llama2-13b", "llama2-70b")
SPARSITIES = (0.125, 0.25, 0.375)
SECONDS_A_ROUND, PUBLISHED_A_SECOND = 10, 1e9
COLUMNS = ("loss batch", "runs", "GPUs", "GPUs of 7B, 13B, 70B", "hours", "efficiency")


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

    def seconds(self, gpus: int) -> float:
        """On so many GPUs, all of which are held for the whole run."""
        spent: float = self.rounds * SECONDS_A_ROUND
        spent += sum(self.cost.published_bytes.values()) / PUBLISHED_A_SECOND
        for stage in self.cost.stages:
            alone = stage.flops / RATES[MEASURED][stage.name]
            spent += alone * self._longest_part(stage.name, gpus)
        return spent

    def _longest_part(self, stage: str, gpus: int) -> float:
        """Of a stage's work, done by one of so many GPUs."""
        if stage != "scoring":
            return 1 / gpus
        batches = -(-self.recipe.importance.windows // self.recipe.importance.batch)
        return (1 + -(-(batches - 1) // gpus)) / batches


def shares(batch: int, most: int) -> list[int]:
    """Numbers of workers that divide a loss batch evenly."""
    return [n for n in (1, 2, 4, 8, 16, 32, 64) if batch % n == 0 and n <= most]


def line(members: Sequence[Member], each: Sequence[int], gpus: int) -> Waiting[float]:
    """The family's line; a job is the seconds that it takes."""
    runs = [(one.seconds(n), n) for one, n in zip(members, each, strict=True)]
    runs.sort(reverse=True)
    entries = [Entry(spent, group, Need(n)) for group, (spent, n) in enumerate(runs)]
    return Waiting(entries, Need(gpus))


def several(
    kinds: Sequence[Member], each: Sequence[int], copies: int
) -> tuple[list[Member], list[int]]:
    """So many runs of each kind, and their GPUs."""
    return [one for one in kinds for _ in range(copies)], [n for n in each for _ in range(copies)]


def hours(members: Sequence[Member], each: Sequence[int], gpus: int) -> float:
    """Until the last one ends, by a clock that jumps from end to end."""
    waiting, clock, order = line(members, each, gpus), 0.0, itertools.count()
    working: list[tuple[float, int, Entry[float]]] = []
    while waiting or working:
        while entry := waiting.take_now():
            heapq.heappush(working, (clock + entry.job, next(order), entry))
        clock, _, done = heapq.heappop(working)
        waiting.release(done)
    return clock / 3600


def slept(members: Sequence[Member], each: Sequence[int], gpus: int, hour: float) -> float:
    """The same in threads, each of which takes what fits and sleeps for as long; in hours of so
    many seconds.
    """
    waiting, began = line(members, each, gpus), time.monotonic()

    def work() -> None:
        while entry := waiting.take():
            time.sleep(entry.job / 3600 * hour)
            waiting.release(entry)

    threads = [threading.Thread(target=work) for _ in members]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    return (time.monotonic() - began) / hour


def best(kinds: Sequence[Member], copies: int, batch: int, gpus: int) -> tuple[float, list[int]]:
    """The shortest, and the GPUs of a run of each kind."""
    found = []
    for each in itertools.product(shares(batch, gpus), repeat=len(kinds)):
        found.append((hours(*several(kinds, each, copies), gpus), [*each]))
    return min(found)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 16, 32, 64, 128, 256])
    parser.add_argument("--copies", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32], help="of fine-tuning")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args(argv)
    columns = [*COLUMNS, *(["in threads that sleep"] if arguments.check else [])]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for batch, copies in itertools.product(arguments.batch, arguments.copies):
        kinds = [Member.of(name, batch) for name in MODELS]
        alone = sum(one.seconds(1) for one in kinds) * copies / 3600
        for gpus in arguments.gpus:
            took, each = best(kinds, copies, batch, gpus)
            cells = [batch, copies * len(kinds), gpus, ", ".join(map(str, each)), f"{took:.1f}"]
            cells.append(f"{alone / gpus / took:.2f}")
            if arguments.check:
                cells.append(f"{slept(*several(kinds, each, copies), gpus, hour=0.5):.1f}")
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
