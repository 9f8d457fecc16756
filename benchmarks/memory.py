"""The memory of a whole compression, from scoring to publishing, while the checkpoint grows in
depth: one process, the local engine.

    python benchmarks/memory.py [--depths 8 16 32 64] [--hidden 512] [--intermediate 1408] [--json
    out.json]

Random LLaMAs of the same block in float32; two blocks are fused away from each, proof and held-out
perplexities included. Every run is a fresh process that has already compressed a tiny model, so
that all is imported and counts as what was there before. Linux only.

- **peak**: the largest resident memory of the run (VmHWM) above what was resident before it.
  Weights are read, never mapped;
- **formula**: what the run may hold by the package's cost model (`cost.py`; docs/performance.md
  tells its terms);
- **under that limit**: the same run, its private memory limited to what was there before plus the
  formula (RLIMIT_DATA: what goes beyond is not allocated). Reading the whole checkpoint at once
  must fail under it, or the limit limits nothing.

The comparison with plain `from_pretrained` holds a model of up to 2 GB whole, by design. Here it is
made as for larger ones, on the first blocks; the last line tells the peak with the whole model.
While they are compared the limit is lifted: safetensors maps the whole file, private and writable,
which the limit counts and the peak does not. Memory that is freed goes back at once
(MALLOC_MMAP_THRESHOLD_ for tensors of these sizes; glibc does so by itself above 32 MB, as tensors
of a 7B model are): else free memory of a fragmented heap would count, too.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from fusegpt_ray.cost.footprint import replica_bytes, worker_bytes
from fusegpt_ray.model.source import Source
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.publishing.publish import versions
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.store.storage import STEP

VOCABULARY = 256
WINDOWS, LENGTH, BATCH, RANK, NEIGHBOURS = 8, 32, 4, 16, 2
REMOVED = 2
MB = 1_000_000


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depths", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=1408)
    parser.add_argument("--json", help="write all numbers to this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(_child(json.loads(arguments.child))))
        return 0
    rows = []
    print(
        "| blocks | checkpoint MB | peak MB | formula MB | checkpoint ÷ peak | run under that limit"
        " | all weights at once under it |"
    )
    print("|---|---|---|---|---|---|---|")
    for depth in arguments.depths:
        with tempfile.TemporaryDirectory() as folder:
            row = _measure(
                Path(folder),
                depth,
                arguments.hidden,
                arguments.intermediate,
                depth == arguments.depths[-1],
            )
        rows.append(row)
        sizes = [f"{row[key] / MB:.0f}" for key in ("checkpoint", "peak", "formula")]
        limited, whole = (row[key] for key in ("under_limit", "whole_under_limit"))
        print(
            f"| {depth} | {' | '.join(sizes)} | {row['checkpoint'] / row['peak']:.1f} | {limited} |"
            f" {whole} |",
            flush=True,
        )
    print(
        "\nThe deepest with the `from_pretrained` check of small models:"
        f" {rows[-1]['with_plain_check'] / MB:.0f} MB."
    )
    if arguments.json:
        Path(arguments.json).write_text(
            json.dumps(
                {"arguments": vars(arguments), "versions": versions(), "rows": rows}, indent=1
            )
            + "\n"
        )
    return 0


def _measure(
    folder: Path, depth: int, hidden: int, intermediate: int, last: bool
) -> dict[str, Any]:
    _checkpoint(folder / "tiny", 4, 32, 64)
    _checkpoint(folder / "model", depth, hidden, intermediate)
    (folder / "text.txt").write_text(" ".join(f"w{i * i % VOCABULARY}" for i in range(4000)))
    parts = formula(folder, depth)
    limit = max(parts.values())
    task = {"folder": str(folder), "depth": depth}
    row = {
        "depth": depth,
        "checkpoint": (folder / "model" / "model.safetensors").stat().st_size,
        "formula": limit,
        "parts": parts,
        **_run({**task, "output": "free"}),
        "under_limit": _run({**task, "output": "limited", "limit": limit})["end"],
        "whole_under_limit": _run({**task, "output": "whole", "limit": limit})["end"],
    }
    if last:
        row["with_plain_check"] = _run({**task, "output": "plain"})["peak"]
    return row


def formula(folder: Path, depth: int) -> dict[str, int]:
    """What checking files, scoring and fine-tuning a group may hold, in bytes, by the package's own
    cost model; the run may hold the largest.
    """
    recipe, dense = Recipe.parse(_settings(folder, "model", depth, "formula")), _dense(folder)
    return {
        "check": 3 * STEP,
        "score": replica_bytes(dense, torch.float32, WINDOWS, LENGTH),
        "finetune": worker_bytes(recipe, dense, torch.float32, REMOVED),
    }


def _dense(folder: Path) -> Stack:
    return Source.find(str(folder / "model"), None).stack()


def _checkpoint(folder: Path, depth: int, hidden: int, intermediate: int) -> None:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=depth,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="100GB")
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)


def _run(task: dict[str, Any]) -> dict[str, Any]:
    """A task in a process of its own."""
    command = [sys.executable, __file__, "--child", json.dumps(task)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def _child(task: dict[str, Any]) -> dict[str, Any]:
    from fusegpt_ray.measuring import evaluation
    from fusegpt_ray.publishing import plain, proof

    folder = Path(task["folder"])
    _compress(folder, "tiny", 4, f"{task['output']}-tiny")
    if task["output"] != "plain":
        plain.SMALL_BYTES = 0
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    if "limit" in task:
        allowed = _status("VmData") + task["limit"]
        _limit(allowed)
        for module in (evaluation, proof):
            module.compare_plain = _unlimited(module.compare_plain, allowed)  # type: ignore[attr-defined]
    end = "done"
    try:
        if task["output"] == "whole":
            _read_all(folder / "model")
        else:
            end = _compress(folder, "model", task["depth"], task["output"])
    except Exception as error:  # torch raises RuntimeError, and others wrap it
        if "limit" not in task or "memory" not in f"{type(error)} {error}".lower():
            raise
        return {"end": "fails"}
    return {"end": end, "peak": _status("VmHWM") - before, "before": before}


def _limit(data: int) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (data, resource.RLIM_INFINITY))


def _unlimited(compare: Callable[..., Any], allowed: int) -> Callable[..., Any]:
    """Without the limit: safetensors maps the whole file, which it counts, though little is
    held.
    """

    def lifted(*arguments: Any) -> Any:
        _limit(resource.RLIM_INFINITY)
        try:
            return compare(*arguments)
        finally:
            gc.collect()
            _limit(allowed)

    return lifted


def _settings(folder: Path, model: str, depth: int, output: str) -> dict[str, Any]:
    """The recipe of a run."""
    return {
        "model": {"source": str(folder / model)},
        "preset": "rounds",
        "sparsity": (REMOVED - 0.5) / depth,
        "calibration": {
            "data": str(folder / "text.txt"),
            "windows": WINDOWS,
            "length": LENGTH,
            "bos": "never",  # as the paper
        },
        "evaluation": {"text": {"data": str(folder / "text.txt"), "windows": WINDOWS}},
        "importance": {"windows": WINDOWS, "batch": BATCH},
        "fusion": {
            "group_size": NEIGHBOURS,
            "rank": RANK,
            "lora_rank": RANK,
            "epochs": 1,
            "batch": BATCH,
        },
        "cluster": {"engine": "local", "weights": "streamed"},
        "output": {"uri": str(folder), "name": output},
    }


def _compress(folder: Path, model: str, depth: int, output: str) -> str:
    """How it ended: done, or where it had to begin again with fewer windows at once for want of
    memory.
    """
    from fusegpt_ray import compress
    from fusegpt_ray.compressing.rounds import fewer_at_once
    from fusegpt_ray.terminal.display import Display

    recipe = Recipe.parse(_settings(folder, model, depth, output))
    (published,) = compress(recipe, Display())
    return fewer_at_once(recipe, published.manifest["rounds"]) or "done"


def _read_all(folder: Path) -> None:
    from fusegpt_ray.store.checkpoint import read_index, read_tensors

    tensors = [
        read_tensors({name: ref}) for name, ref in read_index(str(folder), "model.source").items()
    ]
    assert tensors


def _status(key: str) -> int:
    """Bytes of this process, as the kernel counts them."""
    (line,) = [
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(f"{key}:")
    ]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    sys.exit(main())
