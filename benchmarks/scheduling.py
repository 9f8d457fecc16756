"""How work is shared out, on a fake cluster; and whether the simulator foretells what such runs, and whole ones, take.

    python benchmarks/scheduling.py [--replicas 1 2 4 8] [--json out.json] [--gpu gpu.json]
    python benchmarks/scheduling.py --toy        # in a minute or two

Ray's cluster utility starts nodes of one CPU each on this machine: a replica has a node to itself.

- **Work**: the example model is scored by `scoring.score` on real replicas. Every block-forward is counted where it happens, those of
  a process that is killed included. On each number of replicas, with a node killed on the way, and with a replica that is ten times
  slower, the sums must be the same bits.
- **Wall clock**: the machine has fewer cores than replicas, so blocks are *emulated*: a share sleeps as long as its block-forwards
  took when they were real on one replica, and looks its sums up in a made-up table of 32 blocks. Everything else is the pipeline's.
- **Whole runs**: see `whole_runs.py`.
- **GPUs**: `simulator.py`'s table.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import ray
import simulator
import torch
import whole_runs
from rates import Budget, Rates
from ray.cluster_utils import Cluster
from whole_runs import BATCH, EXAMPLES

from fusegpt_ray.distributed import replicas as replicas_module
from fusegpt_ray.distributed import scoring
from fusegpt_ray.distributed.replicas import Replica, Replicas
from fusegpt_ray.importance.ranking import Ranking
from fusegpt_ray.importance.search import block_forwards
from fusegpt_ray.importance.sums import Sums
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.model.source import Source
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.publishing.publish import versions
from fusegpt_ray.sections import Importance

DEPTH, SLOWED = 32, 10
"""Blocks of the emulated model; how much slower the slow replica is."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, nargs="*", default=[1, 2, 4, 8], help="none: no cluster")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--runs", nargs="*", choices=["local", "ray"], default=["local", "ray"], help="whole runs, by engine")
    parser.add_argument("--repeats", type=int, default=3, help="of whole runs")
    parser.add_argument("--toy", action="store_true", help="two nodes, few windows, whole runs of the local engine only")
    simulator.add_arguments(parser)
    arguments = parser.parse_args(argv)
    if arguments.toy:
        arguments.replicas, arguments.windows, arguments.length = [1, 2], 8, 32
        arguments.runs, arguments.repeats = ["local"], 1
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    found: dict[str, Any] = {"versions": versions(), "cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()}
    with tempfile.TemporaryDirectory() as folder:
        if arguments.replicas:
            with redirect_stdout(sys.stderr), _cluster(max(arguments.replicas) + 1) as nodes:  # Ray tells of dead nodes at length
                found["work"], block = work(nodes, arguments, Path(folder))
                found["emulated"] = emulated(arguments, Path(folder), block)
        found["runs"] = whole_runs.compared(Path(folder), arguments.runs, arguments.toy, arguments.repeats)
    found["gpus"] = simulator.predict(arguments)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=1) + "\n")
    return 0


# --- a fake cluster whose replicas note what they do ---


@contextmanager
def _cluster(count: int) -> Iterator[dict[str, tuple[Cluster, Any]]]:
    """Nodes by their ids, beside a head that has no CPU to give."""
    store = {"object_store_memory": 80_000_000}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **store})
    nodes = [cluster.add_node(num_cpus=1, **store) for _ in range(count)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        yield {node.node_id: (cluster, node) for node in nodes}
    finally:
        ray.shutdown()
        cluster.shutdown()


class Way(NamedTuple):
    """How shares are done in one run."""

    folder: str
    """Every attempt at a share is a file in it, named share_node_process_…, of one byte a block-forward."""
    slow: bool = False
    """The first process to take a share is slow."""
    nap: float = 0.0
    """Seconds a block-forward of emulated blocks."""
    table_WN: np.ndarray | None = None
    """Their sums; None: blocks are real."""


class Watched(Replicas):
    """Replicas that sweep that way."""

    def __init__(self, dense: Stack, count: int, way: Way) -> None:
        super().__init__(dense, Replica(count, 1, 0, 1, torch.float32, BATCH, "resident"))
        self.way, self.calls, self.planned = way, 0, 0.0

    def map_refs(self, function: Callable[..., Any], shares: Sequence[tuple[Any, ...]], *others: Any) -> Iterator[Any]:
        if function is not scoring._sweep:
            return super().map_refs(function, shares, *others)
        self.calls += 1
        self.planned += simulator.queue(others[-1], self.replica.count).seconds
        noted = [(self.way, f"{self.calls}-{number}", function, *share) for number, share in enumerate(shares)]
        return super().map_refs(_noted, noted, *others)


def _noted(runner: Runner, way: Way, name: str, function: Callable[..., Any], stack: Stack, parts: list[Any]) -> list[np.ndarray]:
    slower = SLOWED if way.slow and _is_first(Path(way.folder) / "slow") else 1
    node = ray.get_runtime_context().get_node_id()
    path = Path(way.folder) / f"share_{name}_{node}_{os.getpid()}_{uuid.uuid4().hex}"
    with path.open("wb", buffering=0) as notes:
        apply = runner.apply

        def noting(*arguments: Any) -> torch.Tensor:
            begin = time.monotonic()
            h_BTD = apply(*arguments)
            notes.write(bytes(len(h_BTD)))
            time.sleep((slower - 1) * (time.monotonic() - begin))
            return h_BTD

        if way.table_WN is None:
            runner.apply = noting  # type: ignore[method-assign, assignment]  # of this share's copy of the runner
            found = function(runner, stack, parts)
        else:
            found = []
            for windows_WT, positions in parts:
                done = len(windows_WT) * block_forwards(len(stack), positions)
                time.sleep(slower * way.nap * done)
                notes.write(bytes(done))
                found.append(way.table_WN[windows_WT[:, 0]][:, list(positions)])
    _end_of(path).touch()
    return found


def _end_of(path: Path) -> Path:
    """The mark of an attempt that ended. The attempt's own file keeps its name: somebody may be looking at it."""
    return path.with_name(f"ended_{path.name}")


def _is_first(mark: Path) -> bool:
    """Whether this process is the one that made the mark."""
    try:
        with mark.open("x") as file:
            file.write(str(os.getpid()))
    except FileExistsError:
        return mark.read_text() == str(os.getpid())
    return True


def _ready(runner: Runner, stack: Stack, windows_WT: np.ndarray) -> None:
    """The replica is there and has read its blocks."""
    for _ in runner.walk(stack, torch.tensor(windows_WT)):
        pass


def _nothing(runner: Runner) -> None:
    pass


class Scoring(NamedTuple):
    seconds: float
    ranking: Ranking
    sums: Sums
    share_seconds: float
    """To hand out a share of nothing and take its result."""
    row: dict[str, Any]


def _score(
    dense: Stack, stack: Stack, windows_WT: np.ndarray, count: int, way: Way, nodes: dict[str, tuple[Cluster, Any]] | None = None
) -> Scoring:
    """Score on so many replicas that are ready; with `nodes`, the one that begins first is killed."""
    Path(way.folder).mkdir()
    replicas, sums = Watched(dense, count, way), Sums()
    dict(replicas.map(_ready, [(dense, np.zeros((1, 4), dtype=np.int64))] * count, BATCH))  # all are idle: one for each
    begin = time.monotonic()
    dict(replicas.map(_nothing, [()] * 20 * count, BATCH))
    overhead = (time.monotonic() - begin) / 20
    killer = threading.Thread(target=_kill_first, args=(Path(way.folder), nodes), daemon=True)
    if nodes:
        killer.start()
    begin = time.monotonic()
    ranking = scoring.score(stack, windows_WT, Importance(windows=len(windows_WT), batch=BATCH), replicas, BATCH, None, sums)
    seconds = time.monotonic() - begin
    if nodes:
        killer.join()
    replicas.close()
    done, tries, by = 0, Counter[str](), Counter[str]()
    for path in Path(way.folder).glob("share_*"):
        _, name, _, process, *_ = path.name.split("_")
        done, size = done + path.stat().st_size, path.stat().st_size
        tries[name] += 1
        by[process] += size
    row = {"replicas": count, "seconds": seconds, "shares": len(tries), "twice": sum(n > 1 for n in tries.values())}
    row |= {"done": done, "busiest": max(by.values()), "planned": replicas.planned, "removed": ranking.lowest}
    return Scoring(seconds, ranking, sums, overhead, row)


def _kill_first(folder: Path, nodes: dict[str, tuple[Cluster, Any]]) -> None:
    """SIGKILL to the first replica that has begun a share, and to its node."""
    while not (begun := [path for path in folder.glob("share_*") if path.stat().st_size and not _end_of(path).exists()]):
        time.sleep(0.005)
    _, _, node, process, *_ = begun[0].name.split("_")
    os.kill(int(process), signal.SIGKILL)
    cluster, raylet = nodes.pop(node)
    cluster.remove_node(raylet, allow_graceful=False)


# --- the parts of the benchmark ---


def work(nodes: dict[str, tuple[Cluster, Any]], arguments: argparse.Namespace, folder: Path) -> tuple[list[dict[str, Any]], float]:
    """Rows, and the seconds of a block-forward on one replica."""
    engine = whole_runs.engine(whole_runs.recipe(folder, "none", whole_runs.Size(arguments.windows, arguments.length)))
    stack, windows_WT = engine.dense, whole_runs.windows(engine)
    few = sorted(arguments.replicas)[:3][-1]
    plans = [(f"{count}", count, False, False) for count in arguments.replicas]
    plans += [(f"{few}, a node is killed", few, False, True), (f"{few}, one {SLOWED} times slower", few, True, False)]
    rows: list[dict[str, Any]] = []
    first = None
    say("\n| replicas | shares | given out twice | block-forwards | of the busiest replica | as planned | same bits |")
    say("|---|---|---|---|---|---|---|")
    for number, (label, count, slow, killing) in enumerate(plans):
        replicas_module.SLOW_SECONDS = 0.5 if slow else simulator.SLOW_SECONDS  # these shares take less than the five seconds
        found = _score(stack, stack, windows_WT, count, Way(str(folder / f"work-{number}"), slow), nodes if killing else None)
        first = first or found
        alike = found.ranking == first.ranking and found.sums.known.keys() == first.sums.known.keys()
        alike = alike and all(np.array_equal(found.sums.known[key], own) for key, own in first.sums.known.items())
        row = {"label": label, "same": alike, **found.row}
        rows.append(row)
        cells = [f"{row[key] / first.row['done']:.3f}" for key in ("done", "busiest", "planned")]
        say(f"| {label} | {row['shares']} | {row['twice']} | {' | '.join(cells)} | {'yes' if alike else 'NO'} |")
    replicas_module.SLOW_SECONDS = simulator.SLOW_SECONDS
    assert first
    return rows, first.seconds / first.row["done"]


class Deep:
    """As much of a stack as scoring looks at."""

    def __init__(self, depth: int) -> None:
        self.kept = tuple(range(depth))

    def __len__(self) -> int:
        return len(self.kept)


def emulated(arguments: argparse.Namespace, folder: Path, nap: float) -> dict[str, Any]:
    """Wall clock beside the simulator's."""
    dense = Source.find(str(EXAMPLES / "tiny-llama"), None).stack()
    all_WN = simulator.synthetic_table(DEPTH, arguments.windows, 2)
    few, most, half = sorted(arguments.replicas)[:3][-1], max(arguments.replicas), arguments.windows // 2
    plans = [(f"{count}", count, arguments.windows, False) for count in arguments.replicas]
    if not arguments.toy:
        plans += [(f"{most}, {half} windows", most, half, False), (f"{few}, one {SLOWED} times slower", few, arguments.windows, True)]
    rows: list[dict[str, Any]] = []
    say(f"\nEmulated: {DEPTH} blocks that sleep {nap * 1000:.2f} ms a block-forward. Speed-up: over one replica's sleep.\n")
    say("| replicas | block-forwards | seconds | speed-up | simulated | simulated ÷ measured | given out twice | simulated |")
    say("|---|---|---|---|---|---|---|---|")
    for number, (label, count, windows, slow) in enumerate(plans):
        table_WN, budget = all_WN[:windows], Budget(score_windows=windows, batch=BATCH, length=2)
        numbers_WT = np.arange(windows)[:, None].repeat(2, 1)
        found = _score(
            dense, cast(Stack, Deep(DEPTH)), numbers_WT, count, Way(str(folder / f"emulated-{number}"), slow, nap, table_WN)
        )
        rates = Rates(block=nap, tune_window=0, share=found.share_seconds)
        expected = simulator.score(table_WN, range(DEPTH), budget, count, rates, speeds=[1 / SLOWED] if slow else [])
        alone = simulator.score(table_WN, range(DEPTH), budget, 1, rates).done
        assert expected.ranking == found.ranking
        row = {"label": label, "simulated": expected.seconds, "simulated_twice": expected.twice, "simulated_done": expected.done}
        rows.append(row | found.row | {"share_seconds": found.share_seconds, "alone": alone})
        cells = [f"{found.row['done'] / alone:.3f}", f"{found.seconds:.2f}", f"{nap * alone / found.seconds:.2f}"]
        cells += [f"{expected.seconds:.2f}", f"{expected.seconds / found.seconds:.3f}", f"{found.row['twice']}", f"{expected.twice}"]
        say(f"| {label} | {' | '.join(cells)} |")
    return {"nap": nap, "rows": rows}


def say(line: str) -> None:
    print(line, file=sys.__stdout__, flush=True)


if __name__ == "__main__":
    sys.exit(main())
