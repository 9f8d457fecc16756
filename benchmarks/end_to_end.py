"""Whole runs: the paper's recipe in plain torch, and ours, from the same model and windows to a
saved model and its perplexity.

    python benchmarks/end_to_end.py MODEL --calibration valid.txt --test test.txt [--epochs 10]
    [--repeats 1] [--json out.json]

- **plain**: `plain.py`, the paper's method without the package: brute-force scoring, plain loops,
  everything in memory;
- **paper**: `fusegpt compress` with `preset: paper`; **rounds**: with `preset: rounds`; **rounds,
  half**: with half of the epochs.

Each is a process of its own, one after the other, `--repeats` times; ratios are taken within a
turn, medians are shown. *Whole* is the process from its start to the saved model: ours also checks
the model's files, publishes, and proves what it published. *CPU* and *GB* (the most memory it ever
held) are the process's, by the operating system. Perplexity of every saved model is measured in the
same way, here, by plain transformers over consecutive windows of the test texts.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from plain import Compression

from fusegpt_ray import Recipe, compress
from fusegpt_ray.terminal.display import Display
from fusegpt_ray.text.calibration import consecutive_windows, sample_windows

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "paper": {"preset": "paper"},
    "rounds": {"preset": "rounds"},
    "rounds, half": {"preset": "rounds"},
}
PHASES = ("score", "states", "finetune")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a LLaMA: the plain way knows no other architecture")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--test", required=True, nargs="+", help="held-out texts")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--remove", type=int, default=4, help="blocks")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", help="write all numbers to this file")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # one way, in a process of its own
    parser.add_argument("--out", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.only:
        found = _plain(arguments) if arguments.only == "plain" else _ours(arguments)
        Path(arguments.out, "found.json").write_text(json.dumps(found))
        return 0
    turns = [_turn(arguments, number, argv) for number in range(arguments.repeats)]
    show(turns, arguments)
    if arguments.json:
        Path(arguments.json).write_text(
            json.dumps({"arguments": vars(arguments), "turns": turns}, indent=1) + "\n"
        )
    return 0


def show(turns: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    def median(way: str, *keys: str, over: str | None = None) -> float:
        values = []
        for turn in turns:
            value, base = turn[way], turn[over] if over else None
            for key in keys:
                value, base = value[key], base[key] if base else None
            values.append(value / base if base else value)
        return statistics.median(values)

    texts = list(turns[0][arguments.ways[0]]["perplexity"])
    first = arguments.ways[0]
    columns = [
        "way",
        "removed",
        *texts,
        "score s",
        "states s",
        "fine-tune s",
        "whole s",
        "CPU s",
        "GB",
        f"the three ÷ {first}",
        "CPU ÷",
    ]
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    for way in arguments.ways:
        cells = [way, ", ".join(map(str, turns[0][way]["removed"]))]
        cells += [f"{median(way, 'perplexity', text):.2f}" for text in texts]
        cells += [f"{median(way, 'seconds', phase):.1f}" for phase in PHASES]
        cells += [
            f"{median(way, 'whole'):.1f}",
            f"{median(way, 'cpu'):.1f}",
            f"{median(way, 'gb'):.2f}",
        ]
        cells += [
            f"{median(way, 'seconds', 'all', over=first):.2f}",
            f"{median(way, 'cpu', over=first):.2f}",
        ]
        print(f"| {' | '.join(cells)} |")


def _turn(arguments: argparse.Namespace, number: int, argv: list[str] | None) -> dict[str, Any]:
    """Every way once."""
    rows = {}
    for way in arguments.ways:
        with tempfile.TemporaryDirectory() as out:
            command = [
                sys.executable,
                __file__,
                *(argv or sys.argv[1:]),
                "--only",
                way,
                "--out",
                out,
            ]
            began = time.perf_counter()
            process = subprocess.Popen(command, stdout=sys.stderr)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            assert process.returncode == 0, way
            row = json.loads(Path(out, "found.json").read_text())
            row |= {
                "whole": time.perf_counter() - began,
                "cpu": usage.ru_utime + usage.ru_stime,
                "gb": usage.ru_maxrss * 1024 / 1e9,
            }
            row["seconds"]["all"] = sum(row["seconds"].values())
            row["perplexity"] = {
                Path(text).name: perplexity(row["folder"], text, arguments.length)
                for text in arguments.test
            }
        rows[way] = row
        print(f"turn {number}: {way} {row}", file=sys.stderr)
    return rows


def _plain(arguments: argparse.Namespace) -> dict[str, Any]:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=torch.float32
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
    stream = np.array(tokenizer(Path(arguments.calibration).read_text())["input_ids"])
    windows_WT = torch.from_numpy(
        sample_windows(lambda: [stream], arguments.windows, arguments.length, 0, "calibration")
    )
    torch.manual_seed(0)
    compression = Compression(model, windows_WT, arguments.epochs, arguments.rank)
    removed = compression.run(arguments.remove)
    compression.fold()
    folder = f"{arguments.out}/model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"removed": removed, "seconds": compression.seconds, "folder": folder}


def _ours(arguments: argparse.Namespace) -> dict[str, Any]:
    depth = transformers.AutoConfig.from_pretrained(arguments.model).num_hidden_layers
    epochs = max(1, arguments.epochs // 2) if arguments.only.endswith("half") else arguments.epochs
    recipe = {
        "model": {"source": arguments.model, "dtype": "float32"},
        "sparsity": arguments.remove / depth,
        "calibration": {
            "data": arguments.calibration,
            "windows": arguments.windows,
            "length": arguments.length,
            "bos": "never",  # as the paper
        },
        "importance": {"windows": min(32, arguments.windows)},
        **WAYS[arguments.only],
        "fusion": {
            "epochs": epochs,
            "rank": arguments.rank,
            "lora_rank": arguments.rank,
        },
        "cluster": {"engine": "local"},
        "output": {"uri": arguments.out, "name": "model"},
    }
    (published,) = compress(Recipe.parse(recipe), Display())
    rounds = published.manifest["rounds"]
    seconds = {phase: math.fsum(record["seconds"][phase] for record in rounds) for phase in PHASES}
    return {"removed": published.manifest["removed"], "seconds": seconds, "folder": published.uri}


@torch.no_grad()
def perplexity(folder: str, text: str, length: int) -> float:
    """Of plain transformers over consecutive windows."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    stream = np.array(
        transformers.AutoTokenizer.from_pretrained(folder)(Path(text).read_text())["input_ids"]
    )
    windows_WT = torch.from_numpy(consecutive_windows(lambda: [stream], length, None, "test"))
    return math.exp(
        statistics.mean(model(ids_BT, labels=ids_BT).loss.item() for ids_BT in windows_WT.split(1))
    )


if __name__ == "__main__":
    sys.exit(main())
