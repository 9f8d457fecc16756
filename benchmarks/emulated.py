"""How well many replicas are used, checked with more of them than the machine has cores: blocks
that sleep instead of computing.

    OMP_NUM_THREADS=1 python benchmarks/emulated.py [--replicas 1 2 4 8 16 32] [--seconds 0.2]
        [--windows 64] [--members 12] [--sets 4] [--json out.json]

Everything is real (Ray, its actors, the search, the scheduler, checkpoints that are published) but
for one thing: a block of the embedded example takes `--seconds` for each window of 16 tokens beside
the little that it computes. So the time of 32 replicas can be had on two cores.

- **Scoring**: a sweep over all blocks, and the exact search of the next round, on one set of so
  many replicas. *Ideal* is what batches that cannot be divided would take if nothing else took
  time: wave after wave, the longest first. *Efficiency* is what all replicas slept by what they
  could have slept.
- **A family**: `--members` runs (`method: mi`, a quarter of the blocks, a held-out text) on
  `--sets` sets of workers that share the largest number of replicas, one run after another on each.
  *Alone* is what all of them slept together. *Start* is the time until every replica has begun: on
  real nodes a matter of seconds, here of starting so many processes on a few cores.

What is not in it: GPUs, training workers, networks, and stores that are far away.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import ray
from rich.console import Console

from fusegpt_ray.distributed.cluster import RayWorkers
from fusegpt_ray.family.members import Members
from fusegpt_ray.family.run import compress_family
from fusegpt_ray.importance.scoring import score
from fusegpt_ray.model.rows import as_rows
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.model.source import Source
from fusegpt_ray.recipe.cluster_section import Cluster
from fusegpt_ray.recipe.sections import Importance
from fusegpt_ray.terminal.display import Display
from fusegpt_ray.workers.base import Setup

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
LENGTH = 16
SECONDS, SLEPT = "EMULATED_SECONDS", "EMULATED_FOLDER"
"""Environment variables of replicas: seconds of a block for a window, and where each process keeps
how long it has slept in all."""


def emulate() -> None:
    """In a process of Ray's: blocks sleep from now on."""
    from fusegpt_ray.model.runner import Runner

    each, folder = float(os.environ[SECONDS]), Path(os.environ[SLEPT])
    computes, slept = Runner._after, 0.0

    def after(self: Runner, module: Any, dense: int, h_BTD: Any, owns: Any = None) -> Any:
        nonlocal slept
        time.sleep(each * len(h_BTD))
        slept += each * len(h_BTD)
        (folder / str(os.getpid())).write_text(f"{slept}")
        return computes(self, module, dense, h_BTD, owns)

    Runner._after = after  # type: ignore[method-assign]


class Clock:
    """Of what replicas sleep, from a moment on."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._before = self._read()
        self.began = time.time()

    def _read(self) -> dict[str, float]:
        """By process."""
        told = {file.name: file.read_text() for file in self._folder.iterdir()}
        return {name: float(text) for name, text in told.items() if text}  # else it is being told

    @property
    def passed(self) -> float:
        return time.time() - self.began

    @property
    def slept(self) -> float:
        """By all of them together."""
        return sum(now - self._before.get(name, 0) for name, now in self._read().items())

    @property
    def awake(self) -> int:
        """How many new processes have begun to sleep."""
        return len(self._read().keys() - self._before.keys())


@dataclass
class Start:
    """When all replicas had begun, and what they had slept by then, in a thread that looks."""

    clock: Clock
    replicas: int
    seconds: float = math.inf
    slept: float = 0.0
    _over: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Self:
        threading.Thread(target=self._look, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()

    def _look(self) -> None:
        while self.clock.awake < self.replicas and not self._over.wait(0.2):
            continue
        self.seconds, self.slept = self.clock.passed, self.clock.slept


def longest_first(costs: Sequence[float], replicas: int) -> float:
    """How long a wave takes on so many that each take the next one, the longest first."""
    free = [0.0] * replicas
    for cost in sorted(costs, reverse=True):
        heapq.heapreplace(free, free[0] + cost)
    return max(free)


class Counting:
    """Workers that note what waves they are given."""

    def __init__(self, workers: RayWorkers) -> None:
        self._workers, self.waves = workers, list[Sequence[float]]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._workers, name)

    def map(
        self, function: Callable[..., Any], tasks: Any, batch_size: int, costs: Sequence[float]
    ) -> Iterator[tuple[int, Any]]:
        self.waves.append(costs)
        return self._workers.map(function, tasks, batch_size, costs)


def warmed(runner: Runner, ids_WT: Any) -> int:
    """The process, once it has its weights: the next task is another's."""
    for _ in runner.walk(runner.stack, as_rows(ids_WT)):
        continue
    return os.getpid()


def scoring(replicas: int, windows: int, seconds: float, folder: Path) -> list[dict[str, Any]]:
    """A full table, and an exact round after it."""
    source = Source.find(str(EXAMPLES / "tiny-llama"), None)
    dense = source.stack()
    settings = Importance(windows=windows, batch=1)
    cluster = Cluster(replicas=replicas, gpus_per_replica=0, weights="resident")
    draw = np.random.default_rng(0)
    ids_WT = draw.integers(3, 1000, (windows, LENGTH))
    rows = []
    with RayWorkers(Setup(source, dense, cluster, "float32", settings)) as workers:
        alike = [(ids_WT[:1],)] * replicas
        while len({pid for _, pid in workers.map(warmed, alike, 1)}) < replicas:
            continue
        stack, last = dense, None
        for name in ("full table", "next round"):
            full = settings.model_copy(update={"all": True}) if last is None else settings
            counting, clock = Counting(workers), Clock(folder)
            ranking = score(counting, stack, ids_WT, full, last)  # type: ignore[arg-type]
            took, slept = clock.passed, clock.slept
            ideal = seconds * sum(longest_first(costs, replicas) for costs in counting.waves)
            efficiency = {"ideal": slept / replicas / ideal, "measured": slept / replicas / took}
            counts = {"replicas": replicas, "waves": len(counting.waves), "slept": slept}
            rows.append({"what": name, **counts, "ideal": ideal, "took": took, "used": efficiency})
            print_row(rows[-1])
            last, stack = ranking, stack.drop(ranking.lowest)
    return rows


def family(members: int, sets: int, replicas: int, windows: int, folder: Path) -> dict[str, Any]:
    """Runs of the same model on other windows, so many at once."""
    with tempfile.TemporaryDirectory() as output:
        text = {"data": str(EXAMPLES / "text/heldout.txt"), "windows": windows}
        recipe = {
            "model": {"source": str(EXAMPLES / "tiny-llama"), "dtype": "float32"},
            "sparsity": 0.25,
            "method": "mi",
            "calibration": {
                "data": str(EXAMPLES / "text/calibration.txt"),
                "windows": windows,
                "length": LENGTH,
            },
            "importance": {"windows": windows, "batch": 1},
            "evaluation": {"heldout": text},
            "cluster": {"replicas": replicas // sets, "gpus_per_replica": 0, "weights": "resident"},
            "output": {"uri": output, "name": "emulated", "report": False},
            "family": {
                "at_once": sets,
                "members": [{"name": f"m{number}", "seed": number} for number in range(members)],
            },
        }
        clock = Clock(folder)
        with Start(clock, replicas) as start:
            result = compress_family(Members.parse(recipe), Display(Console(quiet=True)))
        took, slept = clock.passed, clock.slept
        assert result["state"] == "done", result
    after = (slept - start.slept) / (took - start.seconds)
    return {
        "members": members,
        "sets": sets,
        "replicas": replicas,
        "slept": slept,
        "start": start.seconds,
        "took": took,
        "used": {"measured": slept / replicas / took, "after the start": after / replicas},
    }


def print_row(row: dict[str, Any]) -> None:
    cells = [row["what"], str(row["replicas"]), str(row["waves"]), f"{row['slept']:.0f}"]
    cells += [f"{row['ideal']:.1f}", f"{row['took']:.1f}"]
    cells += [f"{row['used']['ideal']:.2f}", f"{row['used']['measured']:.2f}"]
    print(f"| {' | '.join(cells)} |", flush=True)


def in_words(family: dict[str, Any]) -> str:
    used = family["used"]
    return (
        f"\n{family['members']} runs on {family['sets']} sets of"
        f" {family['replicas'] // family['sets']} replicas: alone {family['slept']:.0f} s, start"
        f" {family['start']:.0f} s, took {family['took']:.0f} s, efficiency"
        f" {used['measured']:.2f}, after the start {used['after the start']:.2f}"
    )


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--seconds", type=float, default=0.2, help="of a block, for a window")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--members", type=int, default=12, help="of the family; 0: none")
    parser.add_argument("--sets", type=int, default=4)
    parser.add_argument("--json", help="write all numbers to this file")
    arguments = parser.parse_args(given)
    most = max(arguments.replicas)
    with tempfile.TemporaryDirectory() as kept:
        variables = {SECONDS: str(arguments.seconds), SLEPT: kept, "OMP_NUM_THREADS": "1"}
        os.environ.setdefault("RAY_worker_niceness", "0")  # what sleeps takes nothing from others
        setup = {"worker_process_setup_hook": emulate, "env_vars": variables}
        ray.init(
            address="local",
            num_cpus=most + arguments.sets + 1,
            runtime_env=setup,
            include_dashboard=False,
            log_to_driver=False,
        )
        folder, seconds = Path(kept), arguments.seconds
        print(
            "| scoring | replicas | waves | slept | ideal | took | efficiency: ideal | measured |"
        )
        print("|---|---|---|---|---|---|---|---|")
        found: dict[str, Any] = {"seconds": seconds, "windows": arguments.windows, "scoring": []}
        for replicas in arguments.replicas:
            found["scoring"] += scoring(replicas, arguments.windows, seconds, folder)
        if arguments.members:
            told = family(arguments.members, arguments.sets, most, arguments.windows, folder)
            found["family"] = told
            print(in_words(told))
        ray.shutdown()
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=2), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
