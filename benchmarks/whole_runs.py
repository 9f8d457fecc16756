"""Whole runs of the example model beside what the simulator makes of them; a part of `scheduling.py`.

One small run of each engine (one round) gives the constants. What is foretold by them are larger runs: three rounds, other windows and
epochs, one and two replicas.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import simulator
import torch
from rates import Budget, Rates
from rich.console import Console
from shapes import Shape

from fusegpt_ray import Recipe, compress
from fusegpt_ray.importance.sweep import Part, sweep
from fusegpt_ray.local import LocalEngine
from fusegpt_ray.model.source import Source
from fusegpt_ray.report import Display
from fusegpt_ray.text import calibration

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = Shape(blocks=12, hidden=192, intermediate=416, heads=6, kv_heads=2, vocabulary=2048)
BATCH, SCORE_WINDOWS, RANK = 4, 16, 32


class Size(NamedTuple):
    windows: int
    length: int
    epochs: int = 1
    sparsity: float = 0.25

    @property
    def budget(self) -> Budget:
        return Budget(SCORE_WINDOWS, BATCH, self.windows, self.length, self.epochs, sparsity=self.sparsity, rank=RANK)


SIZES = Size(24, 256, 3, 0.08), Size(32, 256, 4, 0.25)
TOY = Size(16, 32, 2, 0.08), Size(24, 32, 3, 0.16)


class Timed(NamedTuple):
    phases: dict[str, float]
    """As the simulator has them, but for the start of replicas, which is in the first scoring."""
    rounds: list[dict[str, Any]]
    """The manifest's records."""


def compared(folder: Path, engines: Sequence[str], toy: bool, repeats: int) -> list[dict[str, Any]]:
    """Print and return measured and simulated seconds of every phase: all runs in turn, constants measured anew in every turn."""
    if not engines:
        return []
    small, large = TOY if toy else SIZES
    table_WN = full_table(folder, large)
    _run(folder, "warming-up", "local", 1, small)
    turns: dict[str, list[dict[str, Any]]] = {}
    for turn in range(repeats):
        local = rates = constants(_run(folder, f"local-{turn}", "local", 1, small), small, table_WN)
        for engine, replicas in [("local", 1), ("ray", 1), ("ray", 2)]:
            if engine not in engines:
                continue
            name = f"{engine}-{replicas}-{turn}"
            if engine == "ray" and replicas == 1:
                rates = constants(_run(folder, f"{name}-small", engine, replicas, small), small, table_WN, local)
            measured = _run(folder, name, engine, replicas, large).phases
            expected = simulator.run(TINY, large.budget, replicas, rates, 1, table_WN)
            expected["score"] += rates.replica
            expected["fixed"] -= rates.replica
            phases = {phase: (measured[phase], expected[phase]) for phase in simulator.PHASES}
            phases["all"] = (sum(measured.values()), sum(expected.values()))
            label = f"{engine}, {replicas} replica{'s' * (replicas > 1)}"
            turns.setdefault(label, []).append({"rates": rates._asdict(), "phases": phases})
            print(json.dumps({"turn": turn, "run": label, "phases": phases}), file=sys.stderr, flush=True)  # should a later one fail
    print(f"\nWhole runs: medians of {repeats}; ratios within a turn.\n")
    print("| run | phase | seconds | simulated | simulated ÷ measured | from | to |\n|---|---|---|---|---|---|---|")
    for label, found in turns.items():
        for phase in (*simulator.PHASES, "all"):
            pairs = [turn["phases"][phase] for turn in found]
            ratios = [simulated / measured for measured, simulated in pairs]
            seconds = " | ".join(f"{statistics.median(half):.1f}" for half in zip(*pairs, strict=True))
            spread = " | ".join(f"{ratio:.2f}" for ratio in (statistics.median(ratios), min(ratios), max(ratios)))
            print(f"| {label} | {phase} | {seconds} | {spread} |")
    return [{"run": label, "turns": found} for label, found in turns.items()]


def constants(found: Timed, size: Size, table_WN: np.ndarray, local: Rates | None = None) -> Rates:
    """From a run of one round. `local`: of the engine that starts no replicas; a block takes as long on another."""
    (record,) = found.rounds
    starting = record["seconds"]["finetune"] - found.phases["finetune"]
    done = record["block_forwards"]["done"]
    rates = Rates(
        block=local.block if local else found.phases["score"] / done,
        tune_window=found.phases["finetune"] / (size.epochs * size.windows) * size.budget.group / (len(record["group"]) - 1),
        group=starting,
        replica=max(found.phases["score"] - local.block * done, 0) if local else 0.0,
        once=found.phases["fixed"] - starting,
    )
    walking = simulator.run(TINY, size.budget, 1, rates, 1, table_WN)["states"]
    stored = size.windows * 2 * 2 * size.length * TINY.hidden
    return rates._replace(store=max(found.phases["states"] - walking, 0) / stored)


def full_table(folder: Path, size: Size) -> np.ndarray:
    """Sums of every block on the windows of scoring, [W, N]."""
    local = engine(recipe(folder, "none", size))
    parts = torch.from_numpy(windows(local)[:SCORE_WINDOWS]).split(BATCH)
    everyone = tuple(range(len(local.dense)))
    return torch.cat(sweep(local.runner, local.dense, [Part(part, everyone) for part in parts])).numpy()


class Stopwatch(Display):
    """Says nothing, and notes when epochs end."""

    def __init__(self) -> None:
        super().__init__(Console(quiet=True))
        self.rounds: list[list[float]] = []

    def epoch(self, number: int, epochs: int, loss: float) -> None:
        if number == 1:
            self.rounds.append([])
        self.rounds[-1].append(time.monotonic())


def _run(folder: Path, name: str, engine: str, replicas: int, size: Size) -> Timed:
    watch, begin = Stopwatch(), time.monotonic()
    (published,) = compress(recipe(folder, name, size, engine, replicas), watch)
    total, records = time.monotonic() - begin, published.manifest["rounds"]
    phases = {phase: sum(record["seconds"][phase] for record in records) for phase in ("score", "states")}
    phases["finetune"] = sum((ends[-1] - ends[0]) / (len(ends) - 1) * len(ends) for ends in watch.rounds)
    phases["fixed"] = total - sum(phases.values())
    return Timed(phases, records)


def recipe(folder: Path, name: str, size: Size, engine: str = "local", replicas: int = 1) -> Recipe:
    return Recipe.parse(
        {
            "model": {"source": str(EXAMPLES / "tiny-llama")},
            "sparsity": size.sparsity,
            "calibration": {
                "data": str(EXAMPLES / "text" / "calibration.txt"),
                "windows": size.windows,
                "length": size.length,
                "bos": "never",  # as the paper
            },
            "evaluation": {"heldout": {"data": str(EXAMPLES / "text" / "heldout.txt"), "windows": 16}},
            "importance": {"windows": min(SCORE_WINDOWS, size.windows), "batch": BATCH},
            "fusion": {"rank": RANK, "lora_rank": RANK, "epochs": size.epochs},
            "cluster": {"engine": engine, "replicas": replicas},
            "output": {"uri": str(folder), "name": name},
        }
    )


def engine(recipe: Recipe) -> LocalEngine:
    source = Source.find(recipe.model.source, None)
    return LocalEngine(recipe, source, source.stack())


def windows(engine: LocalEngine) -> np.ndarray:
    text = engine.recipe.calibration
    return calibration.sample_windows(engine.tokens(text, "data"), text.windows, text.length, text.seed, "data")
