"""Predicts how long a run takes on 1–256 GPUs, from a few constants. Numbers only: neither torch nor Ray, nor a GPU.

    python benchmarks/simulator.py [--shape llama2-7b llama2-13b llama2-70b] [--gpu gpu.json] [--json out.json]

What decides the time is the code that decides it in a run: `search` asks for waves of jobs, `cut` and `in_turn` make shares of them,
`chunk_size` cuts the walks to a group, `group_span` says which blocks that is. Replicas pull shares from a queue, event by event.
What is made up is the table of sums that the search looks at (`synthetic_table`), and, without `--gpu`, what a GPU does in a second
(`rates.py`; all of it is printed).

Phases of a run:
- **score**: waves of shares, the next one when the last is done;
- **states**: windows walk to the group and through its teacher, in chunks;
- **fine-tune**: steps one after the other. Workers divide the loss batch, so there are never more of them than it has windows;
- **fixed**: starts of replicas and of training, building and saving the group, publishing. It does not shrink with GPUs.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import statistics
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rates import Budget, Machine, Rates, gpu_rates
from shapes import SHAPES, Shape

from fusegpt_ray.fusion.group import group_span
from fusegpt_ray.importance.ranking import Ranking
from fusegpt_ray.importance.search import Job, search
from fusegpt_ray.importance.shares import cost, cut, in_turn
from fusegpt_ray.model.chunks import chunk_size
from fusegpt_ray.recipe import blocks_to_remove
from fusegpt_ray.sections import Importance

PHASES = ("score", "states", "finetune", "fixed")
GPUS = tuple(2**power for power in range(9))
SHARES_EACH = 4
SLOW, SLOW_SECONDS = 2.0, 5.0
"""As in `distributed/replicas.py`."""


def synthetic_table(depth: int, windows: int, length: int, seed: int = 0) -> np.ndarray:
    """Sums [windows, blocks] as flat as those of a trained model of 16 blocks: exact search takes about 0.4 of brute force."""
    generator = np.random.default_rng(seed)
    means_N = 0.02 * (1 + 1.3 * generator.random(depth))
    means_N[[0, -1]] *= 5
    noise_WN = generator.gamma(20, 1 / 20, (windows, 1)) * generator.gamma(400, 1 / 400, (windows, depth))
    return length * np.minimum(means_N * noise_WN, 1.0)


class Queued(NamedTuple):
    seconds: float
    """Until the last share was done."""
    twice: int
    """Shares that were given out a second time."""
    busy: list[float]
    """How much longer each replica is at work, on what nobody waits for any more."""


def queue(seconds: Sequence[float], replicas: int, speeds: Sequence[float] = (), busy: Sequence[float] = ()) -> Queued:
    """Replicas take shares from a queue, in order; shares that are overdue are given out again, as `Replicas` does it.

    `seconds`: of each share at speed 1, which also stand for its cost. `speeds`: of the first replicas where they are not 1; 0 for one
    that never answers. `busy`: for how long replicas are busy at first.
    """
    speed = [*speeds, *[1.0] * (replicas - len(speeds))]
    ends = [(left, who) for who, left in enumerate(busy) if left]  # when, which replica
    heapq.heapify(ends)
    waiting, idle = deque(range(len(seconds))), deque(set(range(replicas)) - {who for _, who in ends})
    running: dict[int, tuple[int, float]] = {}  # by replica: share, and when it began
    done, twice = set[int](), set[int]()
    paces: list[float] = []
    now = last = 0.0

    def due(call: tuple[int, float]) -> float:
        share, began = call
        return began + max(SLOW * statistics.median(paces) * seconds[share], SLOW_SECONDS)

    while len(done) < len(seconds):
        late: list[tuple[int, float]] = []
        if speeds and idle and not waiting and paces:  # at equal speeds nothing is ever overdue
            late = sorted((call for call in running.values() if call[0] not in done | twice), key=due)
        while idle and (waiting or (late and due(late[0]) <= now)):
            if waiting:
                share = waiting.popleft()
            else:
                share, _ = late.pop(0)
                twice.add(share)
            who = idle.popleft()
            running[who] = (share, now)
            heapq.heappush(ends, (now + seconds[share] / speed[who] if speed[who] else math.inf, who))
        now = max(now, min([ends[0][0]] + [due(call) for call in late[:1] if idle]))
        if ends[0][0] <= now:
            _, who = heapq.heappop(ends)
            idle.append(who)
            share, began = running.pop(who, (-1, 0.0))
            if share >= 0 and share not in done:
                done.add(share)
                paces.append((now - began) / seconds[share])
                last = now
    left = dict.fromkeys(range(replicas), 0.0) | {who: end - last for end, who in ends}
    return Queued(last, len(twice), list(left.values()))


class Scored(NamedTuple):
    seconds: float
    ranking: Ranking
    waves: int
    shares: int
    done: int
    """Block-forwards, with the full model's walk for every part; `ranking.cost` counts it once a batch."""
    busiest: int
    """Block-forwards of the longest share in each wave."""
    twice: int


def score(
    table_WN: np.ndarray,
    kept: Sequence[int],
    budget: Budget,
    replicas: int,
    rates: Rates,
    last: Ranking | None = None,
    speeds: Sequence[float] = (),
) -> Scored:
    """One scoring; `table_WN`: the sums of the blocks `kept`."""
    tables = np.split(table_WN, range(budget.batch, len(table_WN), budget.batch))
    batches, depth = list(map(len, tables)), len(kept)
    seconds, waves, given, done, busiest, twice = 0.0, 0, 0, 0, 0, 0
    busy: list[float] = []

    def measure(jobs: list[Job]) -> list[np.ndarray]:
        nonlocal seconds, waves, given, done, busiest, twice, busy
        shares = cut(jobs, batches, depth, replicas)
        busiest += max(sum(cost(part, batches, depth) for part in share) for share in shares)
        if rates.keeps:
            shares = [[part] for part in in_turn(shares, batches, depth)]
        done += sum(cost(part, batches, depth) for share in shares for part in share)
        wave = queue([rates.share + _sweep(share, batches, depth, rates) for share in shares], replicas, speeds, busy)
        seconds, waves, given = seconds + wave.seconds, waves + 1, given + len(shares)
        twice, busy = twice + wave.twice, wave.busy
        return [tables[batch][:, list(positions)] for batch, positions in jobs]

    ranking = search(measure, kept, batches, budget.length, Importance(windows=len(table_WN), batch=budget.batch), last)
    return Scored(seconds, ranking, waves, given, done, busiest, twice)


def states(shape: Shape, budget: Budget, walked: int, replicas: int, workers: int, rates: Rates) -> float:
    """Windows walk over so many blocks, to the group and through its teacher; what enters and leaves the group is stored."""
    state = budget.length * shape.hidden
    own = budget.windows // workers
    pieces = replicas * (SHARES_EACH if rates.keeps else 1)
    size = chunk_size(own, budget.batch, 4 * state, math.ceil(pieces / workers))
    chunks = [min(size, own - first) for _ in range(workers) for first in range(0, own, size)]
    computing = [_walk(windows * walked * rates.block, walked, rates) for windows in chunks]
    storing = [windows * 2 * 2 * state * rates.store for windows in chunks]
    return queue([rates.share + sum(pair) for pair in zip(computing, storing, strict=True)], replicas).seconds


def finetune(shape: Shape, budget: Budget, neighbours: int, workers: int, rates: Rates) -> float:
    """All steps of a group. States are read ahead; gradients meet after every step."""
    share = neighbours / budget.group
    window_bytes = 2 * 2 * budget.length * shape.hidden
    windows = budget.loss_batch / workers
    reducing = 4 * neighbours * shape.pairs(budget.rank) * 2 * (workers - 1) / workers * rates.reduce
    step = max(share * (windows * rates.tune_window + rates.tune_step), windows * window_bytes * rates.store) + reducing
    return budget.epochs * budget.windows / budget.loss_batch * step


def workers_of(gpus: int, budget: Budget) -> int:
    """As many as divide the loss batch."""
    return max(n for n in range(1, min(gpus, budget.loss_batch) + 1) if budget.loss_batch % n == 0)


def run(
    shape: Shape, budget: Budget, replicas: int, rates: Rates, workers: int | None = None, table_WN: np.ndarray | None = None
) -> dict[str, float]:
    """Seconds of every phase of a whole run."""
    workers = workers or workers_of(replicas, budget)
    if table_WN is None:
        table_WN = synthetic_table(shape.blocks, budget.score_windows, budget.length)
    kept, changed, last = list(range(shape.blocks)), set[int](), None
    phases = dict.fromkeys(PHASES, 0.0)
    rounds = blocks_to_remove(shape.blocks, budget.sparsity)
    for number in range(rounds):
        if number == 0 or rates.makes_way:
            phases["fixed"] += rates.replica + (len(kept) * rates.read if rates.keeps else 0)
        found = score(table_WN[:, kept], kept, budget, replicas, rates, last)
        last = found.ranking
        position = kept.index(last.lowest)
        span = group_span(position, len(kept), budget.group)
        group = [kept[i] for i in span if i != position]
        stop = kept[span.stop] if span.stop < len(kept) else shape.blocks  # of the dense teacher
        walked = stop
        if kept[: span.start] != list(range(span.start)) or changed & set(kept[: span.start]):
            walked += span.start  # the model and its teacher differ before the group
        phases["score"] += found.seconds
        phases["states"] += states(shape, budget, walked, replicas, workers, rates)
        phases["finetune"] += finetune(shape, budget, len(group), workers, rates)
        phases["fixed"] += rates.train + rates.group
        changed |= set(group)
        del kept[position]
    phases["fixed"] += rates.once
    return phases


def _sweep(share: Sequence[Job], batches: Sequence[int], depth: int, rates: Rates) -> float:
    """As many parts walk together as their states fit."""
    walks: list[tuple[int, int]] = []  # states held, block-forwards
    for part in share:
        states = batches[part[0]] * (1 + len(part[1]))
        if walks and walks[-1][0] + states <= rates.held:
            states += walks[-1][0]
            walks[-1] = (states, walks[-1][1] + cost(part, batches, depth))
        else:
            walks.append((states, cost(part, batches, depth)))
    return sum(_walk(done * rates.block, depth, rates) for _, done in walks)


def _walk(computing: float, blocks: int, rates: Rates) -> float:
    """Streamed: the next block is read while one computes, and nothing computes while the first one is read."""
    return computing if rates.keeps else rates.read + max(computing, (blocks - 1) * rates.read)


def predictions(names: Sequence[str], budget: Budget, machine: Machine, measured: dict[str, Any]) -> dict[str, Any]:
    """By shape: its rates, and the phases' seconds by number of GPUs."""
    found: dict[str, Any] = {}
    for name in names:
        rates = gpu_rates(SHAPES[name], budget, machine, measured.get(name))
        table = {gpus: run(SHAPES[name], budget, gpus, rates) for gpus in GPUS}
        found[name] = {"measured": name in measured, "rates": rates._asdict(), "seconds": table}
    return found


def show(found: dict[str, Any], budget: Budget, machine: Machine) -> None:
    print(f"\nBudget: {_told(budget)}. Replicas: one a GPU; workers: at most {budget.loss_batch}.")
    print(f"Assumed of each GPU: {_told(machine)}.\n")
    print("| shape | GPUs | workers | hours | speed-up | score | states | fine-tune | fixed |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, row in found.items():
        one = sum(row["seconds"][1].values())
        for gpus, phases in row["seconds"].items():
            total = sum(phases.values())
            shares = " | ".join(f"{phases[phase] / total:.1%}" for phase in PHASES)
            label = name + (" (measured)" if row["measured"] else "")
            print(f"| {label} | {gpus} | {workers_of(gpus, budget)} | {total / 3600:.2f} | {one / total:.2f} | {shares} |")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["llama2-7b", "llama2-13b", "llama2-70b"])
    parser.add_argument("--gpu", help="what benchmarks/gpu.py --json wrote: its rates instead of assumed ones")
    parser.add_argument("--json", help="write all numbers to this file")


def predict(arguments: argparse.Namespace) -> dict[str, Any]:
    """Print the table that the arguments ask for; its numbers."""
    budget, machine = Budget(), Machine()
    measured = json.loads(Path(arguments.gpu).read_text())["shapes"] if arguments.gpu else {}
    found = predictions(arguments.shape, budget, machine, measured)
    show(found, budget, machine)
    return {"budget": budget._asdict(), "machine": machine._asdict(), "shapes": found}


def _told(values: Any) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in values._asdict().items())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    found = predict(arguments)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
