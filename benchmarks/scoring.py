"""What early stopping and racing save in scoring a model's blocks, beside brute force: one process,
the pipeline's own code.

    python benchmarks/scoring.py MODEL --data valid.txt [--windows 32] [--length 256] [--batch 4]
    [--repeats 3] [--json out.json]

- **brute force**: plain transformers, one full forward pass for the model and for the model without
  each block, a batch at a time, the head and logits left out (they would only make brute force look
  worse);
- **full table**: every block in a single walk, `importance.all: true`;
- **exact**: the default; **racing**: `importance.racing`.

All run in turn, `--repeats` times; ratios are taken within a turn, the medians of the turns are
shown. Wall seconds are noisy where others use the machine too; CPU seconds of the process less so.
Block-forwards are counted, not timed.

Then racing is run over `--seeds` resamplings of the full table's windows (with replacement, hence
other windows each time) against the full table of each, for how often it chooses another block; and
over made-up models whose blocks are all as close as the model's nearest two. Last, how much of the
machine's measured rate of matrix products a walk over random blocks of a 1B model reaches
(`--shape`: hidden, intermediate, heads, blocks; 0 blocks to leave it out).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from resampling import WAYS, flat, race, resampled
from torch import nn

from fusegpt_ray import Recipe
from fusegpt_ray.importance.metrics import macro_influence
from fusegpt_ray.importance.ranking import Ranking, lowest
from fusegpt_ray.importance.scoring import score
from fusegpt_ray.importance.sweep import Part, sweep
from fusegpt_ray.model.architecture import find_blocks
from fusegpt_ray.model.source import Source
from fusegpt_ray.recipe.text_sections import Text
from fusegpt_ray.text import calibration
from fusegpt_ray.workers.base import Setup
from fusegpt_ray.workers.local import LocalWorkers

Way = Callable[[], tuple[int, Ranking | None]]
"""Finds the block to remove."""


class Turn(NamedTuple):
    wall: float
    cpu: float
    removed: int
    ranking: Ranking | None


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--shape", type=int, nargs=4, default=[2048, 5632, 16, 4])
    parser.add_argument("--json", help="write all numbers to this file")
    arguments = parser.parse_args()

    source = Source.find(arguments.model, None)
    windows_WT = _windows(source, arguments)
    rows = _rows(_turns(source, windows_WT, arguments), arguments.windows)
    _print_ways(rows)
    races = _races(source, windows_WT, arguments)
    _print_races(races)
    rate = _matmul_share(*arguments.shape) if arguments.shape[-1] else {}
    if rate:
        print(
            f"\nwalk {rate['walk']:.1f} GFLOP/s, matrix products {rate['matmul']:.1f} GFLOP/s:"
            f" {rate['walk'] / rate['matmul']:.0%}"
        )
    if arguments.json:
        result = {
            "arguments": vars(arguments),
            "ways": rows,
            "racing": races,
            "rate": rate,
            "threads": torch.get_num_threads(),
        }
        Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _turns(
    source: Source, windows_WT: np.ndarray, arguments: argparse.Namespace
) -> dict[str, list[Turn]]:
    """All ways in turn; the first turn warms up and is not counted."""
    ways: dict[str, Way] = {"brute force": _brute_force(arguments, windows_WT)}
    for name, settings in WAYS.items():
        ways[name] = _scoring(source, arguments, windows_WT, settings)
    runs: dict[str, list[Turn]] = {name: [] for name in ways}
    for turn in range(arguments.repeats + 1):
        for name, way in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            removed, ranking = way()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            print(
                f"{f'turn {turn}' if turn else 'warming up'}: {name} {wall:.2f} s, CPU {cpu:.2f} s",
                file=sys.stderr,
            )
            if turn:
                runs[name].append(Turn(wall, cpu, removed, ranking))
    return runs


def _races(
    source: Source, windows_WT: np.ndarray, arguments: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    engine = _engine(source, arguments.model, arguments, {"all": True})
    parts = torch.from_numpy(windows_WT).split(arguments.batch)
    everyone = tuple(range(len(engine.setup.dense)))
    table_WN = torch.cat(
        sweep(engine.runner, engine.setup.dense, [Part(part, everyone) for part in parts])
    ).numpy()
    return {
        "its windows, resampled": race(resampled(table_WN), arguments),
        "flat models": race(flat(table_WN), arguments),
    }


def _print_ways(rows: dict[str, dict[str, Any]]) -> None:
    print(
        "| way | block | windows | block-forwards | seconds | CPU seconds | block-forwards ÷ brute"
        " force | seconds ÷ | CPU seconds ÷ |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        values = [
            row["removed"],
            row["windows"],
            row["block_forwards"],
            f"{row['wall']:.1f}",
            f"{row['cpu']:.1f}",
        ]
        ratios = [f"{row[key]:.3f}" for key in ("work_ratio", "wall_ratio", "cpu_ratio")]
        print(f"| {name} | " + " | ".join(map(str, values + ratios)) + " |")


def _print_races(races: dict[str, dict[str, Any]]) -> None:
    print(
        "\n| racing at 0.05 on | seeds | another block | higher by at most | racing ÷ brute force |"
        " exact ÷ brute force |"
    )
    print("|---|---|---|---|---|---|")
    for name, found in races.items():
        values = [
            found["seeds"],
            found["differ"],
            f"{found['excess']:.2%}",
            f"{found['racing']:.3f}",
            f"{found['exact']:.3f}",
        ]
        print(f"| {name} | " + " | ".join(map(str, values)) + " |")


def _engine(
    source: Source, model: str, arguments: argparse.Namespace, importance: dict[str, Any]
) -> LocalWorkers:
    settings = {
        "model": {"source": model, "dtype": "float32"},
        "calibration": {
            "data": arguments.data,
            "windows": arguments.windows,
            "length": arguments.length,
            "bos": "never",  # as the paper
        },
        "importance": {"windows": arguments.windows, "batch": arguments.batch} | importance,
        "cluster": {"engine": "local"},
        "method": "mi",
        "output": {"uri": ".", "name": "none"},  # nothing is written
    }
    return LocalWorkers(Setup.of(Recipe.parse(settings), source, source.stack()))


def _windows(source: Source, arguments: argparse.Namespace) -> np.ndarray:
    engine = _engine(source, arguments.model, arguments, {})
    stream = engine.tokens(Text(data=arguments.data), "data")
    return calibration.sample_windows(stream, arguments.windows, arguments.length, 0, "data")


def _scoring(
    source: Source,
    arguments: argparse.Namespace,
    windows_WT: np.ndarray,
    importance: dict[str, Any],
) -> Way:
    engine = _engine(source, arguments.model, arguments, importance)
    assert engine.runner  # the trunk is read once a run, as brute force's model is

    def way() -> tuple[int, Ranking | None]:
        setup = engine.setup
        ranking = score(engine, setup.dense, windows_WT, setup.importance)
        return ranking.lowest, ranking

    return way


@torch.no_grad()
def _brute_force(arguments: argparse.Namespace, windows_WT: np.ndarray) -> Way:
    """The model and the model without each block, by transformers' own forward pass; the states
    before the final norm are compared.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=torch.float32
    ).eval()
    path = find_blocks(model)
    blocks = model.get_submodule(path)
    seen: list[torch.Tensor] = []
    base = model.base_model
    norm = next(
        module
        for name, module in base.named_children()
        if name in ("norm", "ln_f", "final_layer_norm")
    )
    norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    batches = torch.from_numpy(windows_WT).split(arguments.batch)

    def states(kept: list[int], batch: torch.Tensor) -> torch.Tensor:
        model.set_submodule(path, nn.ModuleList([blocks[i] for i in kept]))
        model.config.num_hidden_layers = len(kept)
        base(input_ids=batch, use_cache=False)
        return seen.pop()

    @torch.no_grad()
    def way() -> tuple[int, Ranking | None]:
        totals = dict.fromkeys(range(len(blocks)), 0.0)
        for batch in batches:
            full = states(list(totals), batch)
            for i in totals:
                totals[i] += float(
                    macro_influence(full, states([j for j in totals if j != i], batch)).sum()
                )
        return lowest(totals), None

    return way


def _rows(runs: dict[str, list[Turn]], windows: int) -> dict[str, dict[str, Any]]:
    brute = runs["brute force"]
    cost = next(turn.ranking.cost for turn in runs["exact"] if turn.ranking)
    rows = {}
    for name, turns in runs.items():
        ranking = turns[0].ranking
        done = ranking.cost.done if ranking else cost.brute_force
        rows[name] = {
            "removed": turns[0].removed,
            "windows": ranking.windows if ranking else windows,
            "block_forwards": done,
            "wall": statistics.median(turn.wall for turn in turns),
            "cpu": statistics.median(turn.cpu for turn in turns),
            "work_ratio": done / cost.brute_force,
            "wall_ratio": statistics.median(
                turn.wall / other.wall for turn, other in zip(turns, brute, strict=True)
            ),
            "cpu_ratio": statistics.median(
                turn.cpu / other.cpu for turn, other in zip(turns, brute, strict=True)
            ),
            "turns": [[turn.wall, turn.cpu] for turn in turns],
        }
    return rows


@torch.no_grad()
def _matmul_share(hidden: int, intermediate: int, heads: int, depth: int) -> dict[str, float]:
    """Rates in GFLOP/s of a whole sweep over random LLaMA blocks read from disk (embedding and
    metric in its time, only blocks' products in its FLOPs), and of plain matrix products of the
    blocks' shapes on as many rows. In turn, medians of five."""
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        num_hidden_layers=depth,
        vocab_size=512,
        max_position_embeddings=512,
    )
    batch, length = 2, 256
    rows = batch * length
    with tempfile.TemporaryDirectory() as folder:
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
        tokens = torch.randint(0, 512, (batch, length))
        source = Source.find(folder, None)
        stack = source.stack()
        arguments = argparse.Namespace(
            model=folder, data="unused", windows=batch, length=length, batch=batch
        )
        runner = _engine(source, folder, arguments, {}).runner
        projections = 4 * hidden**2 + 3 * hidden * intermediate
        attention = 2 * length * hidden  # scores and values, for each token
        flops = depth * (depth + 1) / 2 * 2 * rows * (projections + attention)
        shapes = [(hidden, hidden)] * 4 + [(hidden, intermediate)] * 2 + [(intermediate, hidden)]
        weights = [torch.randn(out, inside) for inside, out in shapes]
        inputs = {inside: torch.randn(rows, inside) for inside in (hidden, intermediate)}
        times: dict[str, list[float]] = {"walk": [], "matmul": []}
        for _ in range(6):
            begin = time.perf_counter()
            sweep(runner, stack, [Part(tokens, tuple(range(depth)))])
            middle = time.perf_counter()
            for weight in weights:
                nn.functional.linear(inputs[weight.shape[1]], weight)
            times["walk"].append(flops / (middle - begin) / 1e9)
            times["matmul"].append(2 * rows * projections / (time.perf_counter() - middle) / 1e9)
    return {name: statistics.median(rates[1:]) for name, rates in times.items()}


if __name__ == "__main__":
    sys.exit(main())
