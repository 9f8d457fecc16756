"""Deeper models, of the embedded example or another one: what each way begins with, how many tokens
it takes to be as good as the old model again, and how good it is in the end.

    python benchmarks/deeper.py [--model MODEL --calibration TEXT --test TEXT] [--depth 0.25]
    [--tokens 16384] [--rates 1e-4 3e-4] [--train all new] [--json FILE]

Every row is a whole run of the same pipeline (float32, in one process) on the same windows: tli and
dus by the same share, then all blocks trained on next tokens, or the new ones alone. *Dense* is the
control: the model as it is, trained in the same way on the same windows. *At first*, *at best* and
*in the end* are the cross-entropy on windows of the training text that are held out, in nats a
token, at the first look, at the one with the lowest, whose state is kept, and at the last; tli's at
first is the dense model's. *As before after* is how many tokens had been trained on at the first
look that was no worse. Perplexities are those of another file, for which nothing was chosen.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from fusegpt_ray import Recipe, compress
from fusegpt_ray.compressing.compression import Compression
from fusegpt_ray.healing.whole_model import WholeModel
from fusegpt_ray.measuring.evaluation import perplexity
from fusegpt_ray.pipeline import open_workers
from fusegpt_ray.planning.plan import plan
from fusegpt_ray.store import storage
from fusegpt_ray.terminal.display import Display
from fusegpt_ray.training.finetune import train_span

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ROOT / "examples/text"
LENGTH, BATCH, HELD_OUT = 256, 4, 8


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(ROOT / "examples/tiny-llama"))
    parser.add_argument("--calibration", default=str(TEXTS / "calibration.txt"))
    parser.add_argument("--test", default=str(TEXTS / "heldout.txt"))
    parser.add_argument("--depth", type=float, default=0.25)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-4, 3e-4])
    parser.add_argument("--methods", nargs="+", default=["dense", "tli", "dus"])
    parser.add_argument("--train", nargs="+", default=["all", "new"], help="what learns")
    parser.add_argument("--looks", type=int, default=8)
    parser.add_argument("--windows", type=int, default=48, help="of the test text")
    parser.add_argument("--json", help="write every manifest to this file")
    arguments = parser.parse_args(given)

    results: dict[str, dict[str, Any]] = {}
    for method, learns, rate in product(arguments.methods, arguments.train, arguments.rates):
        if (method, learns) == ("dense", "new"):
            continue
        name = f"{method}, {learns}, {rate:g}"
        print(f"== {name}", file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            if method == "dense":
                results[name] = control(recipe(arguments, "tli", learns, rate, folder))
            else:
                (one,) = compress(recipe(arguments, method, learns, rate, folder), Display())
                results[name] = one.manifest
        if arguments.json:
            Path(arguments.json).write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    return 0


def control(asked: Recipe) -> dict[str, Any]:
    """What a manifest would tell of the dense model, trained as the recipe says."""
    assert asked.heal is not None
    planned, show = plan(asked, Display()), Display()
    dense, here = planned.model.stack, storage.absolute(asked.output.uri)
    with open_workers(planned.setup, show) as workers:
        run = Compression.begin(planned, workers, show)
        assert run.healing is not None
        held_out = run.held_out["heldout"].tokens_WT
        model = WholeModel(dense, dense, asked.heal, asked.seed, here)
        text, looked_at = (drawn.tokens_WT for drawn in run.healing)
        task = model.task(text, looked_at, asked.cluster, {}, storage.join(here, "checkpoints"))
        trained = train_span(workers, task, lambda _: None)
        stacks = {"dense": dense, "inserted": dense, "healed": dense.swap(trained.saved.blocks)}
        found = {name: perplexity(workers, stack, held_out) for name, stack in stacks.items()}
    healing = {"held_out": trained.held_out, "tokens": run.healing[0].tokens}
    return {"method": "dense", "healing": healing, "perplexity": {"heldout": found}}


def recipe(
    arguments: argparse.Namespace, method: str, learns: str, rate: float, folder: str
) -> Recipe:
    """One run."""
    held_out = {"data": arguments.test, "windows": arguments.windows}
    return Recipe.parse(
        {
            "model": {"source": arguments.model, "dtype": "float32"},
            "method": method,
            "depth": arguments.depth,
            "calibration": {
                "data": arguments.calibration,
                "windows": 64,
                "length": LENGTH,
            },
            "importance": {"windows": 16},
            "evaluation": {"heldout": held_out},
            "heal": {
                "tokens": arguments.tokens,
                "train": learns,
                "batch": BATCH,
                "held_out": HELD_OUT,
                "looks": arguments.looks,
                "learning_rate": rate,
            },
            "cluster": {"engine": "local"},
            "output": {"uri": folder, "name": "benchmark", "report": False},
        }
    )


def table(results: dict[str, dict[str, Any]]) -> str:
    """A Markdown table, one row a run; what begins as the dense model tells its loss."""
    before = min(
        (one["healing"]["held_out"][0] for one in results.values() if one["method"] != "dus"),
        default=None,
    )
    lines = [
        "| method, what learns, rate | at first | at best | in the end | as before after | dense"
        " | inserted | trained |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, one in results.items():
        healing, row = one["healing"], one["perplexity"]["heldout"]
        looks, tokens = healing["held_out"], healing["tokens"]
        back = [n for n, loss in enumerate(looks) if before is not None and loss <= before]
        after = f"{back[0] * tokens // (len(looks) - 1):,}" if back else "never"
        values = " | ".join(f"{row[stage]:.2f}" for stage in ("dense", "inserted", "healed"))
        losses = " | ".join(f"{loss:.4f}" for loss in (looks[0], min(looks), looks[-1]))
        lines.append(f"| {name} | {losses} | {after} | {values} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
