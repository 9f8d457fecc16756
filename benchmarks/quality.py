"""Perplexity of the dense, the dropped and the finished model, setting by setting, on one trained
model: what each choice is worth, for the same work.

    python benchmarks/quality.py MODEL --calibration valid.txt [more.txt …] --test test.txt
    [more.txt …] [--weights 3 1] [--settings paper rounds …] [--seeds 0 1] [--work 0.5 1 2]
    [--json out.json]

Every setting runs the same pipeline in one process (float32 on a CPU) with the same windows and
seed; several calibration texts are mixed by `--weights`, else in equal parts. Work is counted, not
timed: the FLOPs of scoring, repairs, states, fine-tuning and healing
(`fusegpt_ray/cost/cost.py`), by those of the paper's recipe. A setting that heals takes as many
tokens as the paper's work, or `--work` times as much, has left for it; a text with fewer is passed
again. `damage left` is log(finished / dense) ÷ log(paper / dense) where `paper` ran too: below 1 is
better than the paper's recipe. Seconds are this machine's and noisy.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusegpt_ray import Recipe, compress
from fusegpt_ray.planning.plan import plan
from fusegpt_ray.terminal.display import Display
from fusegpt_ray.text.protocol import stages

HEAL: dict[str, Any] = {"batch": 4, "held_out": 16, "looks": 8, "repeat": True}
ONE = {"batch": 1, "learning_rate": 5e-4}
SLOW = ONE | {"learning_rate": 2e-4}
FILLED_IN = {"train": "lora", "batch": 8}  # as a recipe has it that leaves all of it out
LOW, ALL = {"train": "lora", "learning_rate": 4e-3}, {"train": "all", "learning_rate": 1e-3}
BEST: dict[str, Any] = {"preset": "best", "fusion": {"epochs": 1}}
FOUR: dict[str, Any] = {"importance": {"windows": 4}}
# The paper's recipe, ours, one step between them at a time; and what healing makes of them.
SETTINGS: dict[str, dict[str, Any]] = {
    "mi": {"method": "mi"},
    "mi+linear": {"method": "mi+linear"},
    "mi+matrix": {"method": "mi+linear", "fusion": {"start": "matrix"}},
    "mi+scale": {"method": "mi+linear", "fusion": {"start": "scale"}},
    "mi+ft": {"method": "mi+ft", "preset": "paper"},
    "paper": {"preset": "paper"},
    "paper, LoRA 3e-4": {"preset": "paper", "fusion": {"lora_learning_rate": 3e-4}},
    "paper, normalized_mse": {"preset": "paper", "fusion": {"loss": "normalized_mse"}},
    "paper, dense teacher": {"preset": "paper", "fusion": {"teacher": "dense"}},
    "rounds": {},
    "rounds, terms kept": {"fusion": {"fold": "at_end"}},
    "rounds, linear start": {"fusion": {"start": "linear"}},
    "rounds, mi+ft": {"method": "mi+ft"},
    "dropped, healed": {"method": "mi", "heal": LOW},
    "dropped, healed (all)": {"method": "mi", "heal": ALL},
    "dropped, healed (all, 2 a step)": {"method": "mi", "heal": ALL | {"batch": 2}},
    "dropped, healed (all, 1 a step)": {"method": "mi", "heal": ALL | ONE},
    "best, healed (all, 1 a step)": BEST | {"heal": ALL | SLOW},
    "scored on 4 windows, best, healed (all, 1 a step)": BEST | FOUR | {"heal": ALL | SLOW},
    "scored on 4 windows, best, healed (all, 1 a step at 5e-4)": BEST | FOUR | {"heal": ALL | ONE},
    "searched, dropped, healed (all)": {
        "method": "mi",
        "search": {"candidates": ["mi", "kl", "run", "spaced"], "tokens": 16384},
        "heal": ALL,
    },
    "best, 2 epochs, healed (all)": BEST
    | {"fusion": {"epochs": 2}, "heal": ALL | {"learning_rate": 3e-4}},
    "dropped by kl, healed": {"method": "mi", "importance": {"metric": "kl"}, "heal": LOW},
    "scored on 8 windows, dropped, healed (all, 1 a step)": {
        "method": "mi",
        "importance": {"windows": 8},
        "heal": ALL | ONE,
    },
    "scored on 4 windows, dropped, healed (all, 1 a step)": FOUR
    | {"method": "mi", "heal": ALL | ONE},
    "scored on 4 windows, dropped, healed (all, 1 a step at 2e-4)": FOUR
    | {"method": "mi", "heal": ALL | SLOW},
    "scored on 4 windows, repaired, healed (all, 1 a step at 2e-4)": FOUR
    | {"method": "mi+linear", "heal": ALL | SLOW},
    "scored on 4 windows, best": BEST | FOUR | {"heal": FILLED_IN},
    "scored on 4 windows, dropped, healed (LoRA as filled in)": FOUR
    | {"method": "mi", "heal": FILLED_IN},
    "dropped by kl, healed (all, 1 a step)": {
        "method": "mi",
        "importance": {"metric": "kl"},
        "heal": ALL | ONE,
    },
    "repaired, healed": {"method": "mi+linear", "heal": LOW},
    "repaired, healed (all)": {"method": "mi+linear", "heal": ALL},
    "fused 2, healed": {"fusion": {"epochs": 2}, "heal": LOW},
    "fused 5, healed": {"fusion": {"epochs": 5}, "heal": LOW},
    "fused 5, healed (all)": {"fusion": {"epochs": 5}, "heal": ALL},
    "repaired, fused 5, healed (all)": {
        "fusion": {"epochs": 5, "start": "linear"},
        "heal": {"train": "all", "learning_rate": 3e-4},
    },
    # What others drop, and the same healed.
    "sleb": {"method": "sleb"},
    "sleb, healed (all)": {"method": "sleb", "heal": ALL},
    "shortgpt": {"method": "shortgpt"},
    "shortgpt, healed (all)": {"method": "shortgpt", "heal": ALL},
    "angular": {"method": "angular"},
    "angular, healed (all)": {"method": "angular", "heal": ALL},
    # The others: a block or an MLP in place of a run, gates, width.
    "streamline": {"method": "streamline", "fusion": {"epochs": 4}},
    "streamline, healed (all)": {"method": "streamline", "fusion": {"epochs": 4}, "heal": ALL},
    "streamline, MLP": {"method": "streamline", "fusion": {"epochs": 4, "light": "mlp"}},
    "streamline, MLP, healed (all)": {
        "method": "streamline",
        "fusion": {"epochs": 4, "light": "mlp"},
        "heal": ALL,
    },
    "foldgpt": {"method": "foldgpt"},
    "foldgpt, healed (all)": {"method": "foldgpt", "heal": ALL},
    # Neighbours that share one set of weights, two by two; and the last states beside the logits.
    "foldgpt, in pairs, healed (all)": {"method": "foldgpt", "heal": ALL | {"share": 2}},
    "foldgpt, 6 groups by similarity, healed (all)": {
        "method": "foldgpt",
        "heal": ALL | {"share": 2, "share_by": "similarity"},
    },
    "foldgpt, in pairs, healed (all, states too)": {
        "method": "foldgpt",
        "heal": ALL | {"share": 2, "hidden": 1.0},
    },
    "slicegpt": {"method": "slicegpt"},
    "slicegpt, healed (all)": {"method": "slicegpt", "heal": ALL},
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True, nargs="+")
    parser.add_argument("--weights", nargs="+", type=float, help="of the calibration texts")
    parser.add_argument(
        "--test", required=True, nargs="+", help="held-out texts, in or out of domain"
    )
    parser.add_argument(
        "--settings", nargs="+", default=["mi", "paper", "rounds"], choices=SETTINGS
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--sparsity", type=float, default=0.25)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument(
        "--work", nargs="+", type=float, default=[1.0], help="of what heals, in the paper's work"
    )
    parser.add_argument("--json", help="write every manifest to this file")
    arguments = parser.parse_args()

    results = {}
    for seed in arguments.seeds:
        budget = work(parsed(arguments, SETTINGS["paper"], seed, "nowhere"))
        for name in arguments.settings:
            for times in arguments.work if "heal" in SETTINGS[name] else [1.0]:
                print(f"== {name}, {times:g} × the work, seed {seed}", file=sys.stderr)
                with tempfile.TemporaryDirectory() as folder:
                    recipe = within(times * budget, arguments, SETTINGS[name], seed, folder)
                    (published,) = compress(recipe, Display())
                done = published.manifest | {"work": work(recipe) / budget, "seed": seed}
                results[f"{name}, {times:g} × the work, seed {seed}"] = done
                if arguments.json:
                    Path(arguments.json).write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    return 0


def parsed(
    arguments: argparse.Namespace,
    chosen: Mapping[str, Any],
    seed: int,
    folder: str,
    heal_windows: int | None = None,
) -> Recipe:
    """The recipe of a setting; `heal_windows`: how many windows to heal on, if it heals."""
    weights = arguments.weights or [1.0] * len(arguments.calibration)
    pairs = zip(arguments.calibration, weights, strict=True)
    texts = [{"data": text, "weight": weight} for text, weight in pairs]
    recipe = {
        "model": {"source": arguments.model, "dtype": "float32"},
        "sparsity": arguments.sparsity,
        "method": chosen.get("method", "fusegpt"),
        "preset": chosen.get("preset", "rounds"),
        "seed": seed,
        "calibration": {
            "data": texts if len(texts) > 1 else arguments.calibration[0],
            "windows": arguments.windows,
            "length": arguments.length,
            "bos": "never",  # as the paper
            "seed": seed,
        },
        "evaluation": {Path(text).name: {"data": text} for text in arguments.test},
        "importance": {"windows": min(32, arguments.windows)} | chosen.get("importance", {}),
        "fusion": {"epochs": arguments.epochs, **chosen.get("fusion", {})},
        "cluster": {"engine": "local"},
        "output": {"uri": folder, "name": "benchmark"},
    }
    if "search" in chosen:
        recipe["search"] = chosen["search"]
    if "heal" in chosen:
        heal = HEAL | chosen["heal"]
        recipe["heal"] = heal | {"tokens": (heal_windows or heal["batch"]) * arguments.length}
    return Recipe.parse(recipe)


def within(
    budget: float,
    arguments: argparse.Namespace,
    chosen: Mapping[str, Any],
    seed: int,
    folder: str,
) -> Recipe:
    """The recipe of a setting, which heals on as many windows as the work is left for."""
    setting = chosen, seed, folder
    recipe = parsed(arguments, *setting)
    if recipe.heal is None:
        return recipe
    step = recipe.heal.batch
    # So many that a trial of a search is no longer bounded by them.
    one, two = (work(parsed(arguments, *setting, n * step)) for n in (1000, 1001))
    steps = 1000 + int((budget - one) / (two - one))
    assert steps > 0, "the work before healing is more than all of the paper's"
    return parsed(arguments, *setting, steps * step)


def work(recipe: Recipe) -> float:
    """FLOPs of all but evaluation."""
    with contextlib.redirect_stderr(io.StringIO()):
        found = plan(recipe, Display()).cost
    return float(sum(stage.flops for stage in found.stages if stage.name != "evaluation"))


def table(results: dict[str, dict[str, Any]]) -> str:
    """A Markdown table, one row a setting and text."""
    lines = [
        "| setting | work | healed on | removed | text | dense | dropped | repaired | fused |"
        " finished | damage left | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, manifest in results.items():
        healing = manifest.get("healing", {"tokens": 0, "seconds": {}})
        spent = [*manifest["rounds"], healing]
        seconds = sum(sum(record["seconds"].values()) for record in spent)
        for text, row in manifest["perplexity"].items():
            left = "–"
            if paper := results.get(f"paper, 1 × the work, seed {manifest['seed']}"):
                theirs = paper["perplexity"][text]
                damage = math.log(theirs["fused"] / theirs["dense"])
                left = f"{math.log(finished(row) / row['dense']) / damage:.2f}"
            removed = ", ".join(map(str, manifest["removed"]))
            before = ("dense", "dropped", "repaired", "fused")
            numbers = [*(row.get(stage, math.nan) for stage in before), finished(row)]
            values = " | ".join("–" if math.isnan(n) else f"{n:.2f}" for n in numbers)
            about = f"{name} | {manifest['work']:.2f} | {healing['tokens']:,} | {removed} | {text}"
            lines.append(f"| {about} | {values} | {left} | {seconds:.0f} |")
    return "\n".join(lines)


def finished(row: Mapping[str, float]) -> float:
    """Of the published model: the last of its stages."""
    return float(row[stages([row])[-1]])


if __name__ == "__main__":
    sys.exit(main())
