"""Perplexity of the dense, the dropped and the fused model, setting by setting, on one trained
model: what each choice is worth.

    python benchmarks/quality.py MODEL --calibration valid.txt --test test.txt [--settings paper
    default …] [--json out.json]

Every setting runs the same pipeline in one process (float32 on a CPU) with the same windows, budget
and seed; only the recipe's fusion section (or the method) differs. `damage left` is log(fused /
dense) ÷ log(paper / dense) where `paper` ran too: below 1 is better than the paper's recipe.
Seconds are this machine's and noisy: compare them within one run only.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

from fusegpt_ray import Recipe, compress
from fusegpt_ray.report import Display

# The paper's recipe, ours, and one step between them at a time.
SETTINGS: dict[str, dict[str, Any]] = {
    "mi": {"method": "mi"},
    "mi+linear": {"method": "mi+linear"},
    "mi+matrix": {"method": "mi+linear", "fusion": {"start": "matrix"}},
    "mi+scale": {"method": "mi+linear", "fusion": {"start": "scale"}},
    "mi+ft": {"method": "mi+ft", "fusion": {"preset": "paper"}},
    "paper": {"fusion": {"preset": "paper"}},
    "paper, LoRA 3e-4": {"fusion": {"preset": "paper", "lora_learning_rate": 3e-4}},
    "paper, normalized_mse": {"fusion": {"preset": "paper", "loss": "normalized_mse"}},
    "paper, dense teacher": {"fusion": {"preset": "paper", "teacher": "dense"}},
    "default": {"fusion": {"preset": "default"}},
    "default, terms kept": {"fusion": {"preset": "default", "fold": "at_end"}},
    "default, linear start": {"fusion": {"preset": "default", "start": "linear"}},
    "default, mi+ft": {"method": "mi+ft", "fusion": {"preset": "default"}},
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument(
        "--test", required=True, nargs="+", help="held-out texts, in or out of domain"
    )
    parser.add_argument(
        "--settings", nargs="+", default=["mi", "paper", "default"], choices=SETTINGS
    )
    parser.add_argument("--sparsity", type=float, default=0.25)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--json", help="write every manifest to this file")
    arguments = parser.parse_args()

    results = {}
    for name in arguments.settings:
        print(f"== {name}", file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            chosen = SETTINGS[name]
            recipe = Recipe.parse(
                {
                    "model": {"source": arguments.model, "dtype": "float32"},
                    "sparsity": arguments.sparsity,
                    "method": chosen.get("method", "fusegpt"),
                    "calibration": {
                        "data": arguments.calibration,
                        "windows": arguments.windows,
                        "length": arguments.length,
                        "bos": "never",  # as the paper
                    },
                    "evaluation": {Path(text).name: {"data": text} for text in arguments.test},
                    "importance": {"windows": min(32, arguments.windows)},
                    "fusion": {"epochs": arguments.epochs, **chosen.get("fusion", {})},
                    "cluster": {"engine": "local"},
                    "output": {"uri": folder, "name": "benchmark"},
                }
            )
            (published,) = compress(recipe, Display())
            results[name] = published.manifest
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    return 0


def table(results: dict[str, dict[str, Any]]) -> str:
    """A Markdown table, one row a setting and text."""
    lines = [
        "| setting | removed | text | dense | dropped | fused | damage left | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, manifest in results.items():
        seconds = sum(sum(record["seconds"].values()) for record in manifest["rounds"])
        for text, row in manifest["perplexity"].items():
            left = "–"
            if "paper" in results:
                paper = results["paper"]["perplexity"][text]
                damage = math.log(paper["fused"] / paper["dense"])
                left = f"{math.log(row['fused'] / row['dense']) / damage:.2f}"
            removed = ", ".join(map(str, manifest["removed"]))
            values = " | ".join(f"{row[key]:.2f}" for key in ("dense", "dropped", "fused"))
            lines.append(f"| {name} | {removed} | {text} | {values} | {left} | {seconds:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
