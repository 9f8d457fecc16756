"""How far the streamed walk is from plain `from_pretrained` by dtype, and what comparing them
costs.

    python benchmarks/comparison.py [--model FOLDER …] [--shape llama2-7b …] [--windows 4] [--json
    out.json]

Before any work every command compares both on one window (docs/adr/0016-as-the-library-reads.md). A
tolerance that honest arithmetic exceeds would refuse good models, so here are the numbers for
several families with large random weights, for trained models that are given, and for true widths
with a few blocks, of which those above 2 GB are compared on their first blocks only. On the
accelerator that torch sees, else on the CPU.

- **KL**: mean and largest over windows of 256 tokens, nats a token; the command compares the first
  window;
- **other**: the KL where one matrix of the first block was read with noise of 5 %: what should be
  found;
- **seconds**: of one comparison, the reading of the checkpoint (from the page cache) included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from shapes import SHAPES

from fusegpt_ray.model.architecture import dense_stack
from fusegpt_ray.model.device import pick_device
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.publishing.plain import KL_TOLERANCE, TOKENS, compare_plain
from fusegpt_ray.publishing.publish import versions
from fusegpt_ray.store.checkpoint import read_index, read_tensors
from fusegpt_ray.store.writer import Entry, write_safetensors

BLOCKS, HIDDEN, VOCABULARY = 6, 256, 2000
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 8,
    "max_position_embeddings": 2 * TOKENS,
}
GROUPED = COMMON | {"intermediate_size": 2 * HIDDEN, "num_key_value_heads": 4}
FAMILIES: dict[str, type[transformers.PretrainedConfig]] = {
    name: transformers.CONFIG_MAPPING[name]
    for name in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "lfm2")
} | {name: transformers.CONFIG_MAPPING[name] for name in ("gpt_neox", "opt", "falcon")}
OWN: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 32, "sliding_window": 64},
    "gemma3_text": {"head_dim": 32, "sliding_window": 64},
    "qwen3": {"head_dim": 32},
    "phi3": {"pad_token_id": 0},
    "lfm2": {"full_attn_idxs": [1, 4]},
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="*", default=[], help="folders of trained models")
    parser.add_argument("--shape", nargs="*", default=[], choices=SHAPES)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--json", help="write all numbers to this file")
    arguments = parser.parse_args()
    device = pick_device()
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}; {', '.join(f'{key} {value}' for key, value in versions().items())}\n")
    print("| model | dtype | mean KL | largest | allowed | other | seconds |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for model, folder in _models(arguments.model, arguments.shape):
        for dtype in (torch.float32, torch.bfloat16):
            row = {"model": model, **_measure(folder, dtype, device, arguments.windows)}
            rows.append(row)
            numbers = [f"{row[key]:.1e}" for key in ("mean", "largest", "allowed", "other")]
            print(f"| {model} | {row['dtype']} | {' | '.join(numbers)} | {row['seconds']:.2f} |")
            sys.stdout.flush()
    if arguments.json:
        found = {"device": name, "arguments": vars(arguments), "versions": versions(), "rows": rows}
        Path(arguments.json).write_text(json.dumps(found, indent=1) + "\n")
    return 0


def _models(trained: list[str], shapes: list[str]) -> Iterator[tuple[str, Path]]:
    for given in map(Path, trained):
        yield f"{given.name} (trained)", given
    for name, make in FAMILIES.items():
        heads = GROUPED if "lfm2" not in name else GROUPED | {"block_auto_adjust_ff_dim": False}
        sizes = COMMON if name in ("gpt_neox", "opt", "falcon") else heads
        if name == "opt":
            sizes = sizes | {"word_embed_proj_dim": HIDDEN, "ffn_dim": 2 * HIDDEN}
        with _random(make(**sizes, **OWN.get(name, {})), 0.08) as folder:
            yield name, folder
    for name in shapes:
        shape = SHAPES[name]
        sizes = {
            "vocab_size": shape.vocabulary,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
        }
        config = transformers.LlamaConfig(**sizes, num_hidden_layers=BLOCKS)
        with _random(config, 0.02) as folder:
            yield f"{name}, {BLOCKS} blocks", folder


@contextmanager
def _random(config: transformers.PretrainedConfig, scale: float) -> Iterator[Path]:
    torch.manual_seed(0)
    with torch.device(pick_device()):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=scale)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        del model
        yield Path(folder)


def _measure(
    folder: Path, dtype: torch.dtype, device: torch.device, windows: int
) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())
    stack = dense_stack(config, read_index(str(folder), "model.source"))
    runner = Runner(stack, device, dtype, batch_size=8)
    draw = torch.Generator().manual_seed(1)
    vocabulary = runner.trunk.model.config.get_text_config().vocab_size
    ids_WT = torch.randint(3, vocabulary, (windows, TOKENS), generator=draw)
    found, seconds = [], []
    for window_1T in ids_WT.split(1):
        began = time.monotonic()
        found.append(compare_plain(str(folder), stack, runner, window_1T).kl)
        seconds.append(time.monotonic() - began)
    kls = [float("nan") if kl is None else kl for kl in found]
    with tempfile.TemporaryDirectory() as place:
        other = compare_plain(str(folder), _changed(stack, Path(place)), runner, ids_WT[:1]).kl
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "mean": statistics.mean(kls),
        "largest": max(kls),
        "allowed": KL_TOLERANCE[dtype],
        "other": float("nan") if other is None else other,
        "seconds": statistics.median(seconds),
    }


def _changed(stack: Stack, folder: Path) -> Stack:
    """With noise of 5 % in one matrix of the first block."""
    block = stack.blocks[0]
    name = max(block.weights, key=lambda name: block.weights[name].end - block.weights[name].begin)
    value = read_tensors({name: block.weights[name]})[name].float()
    value += (
        0.05 * value.std() * torch.randn(value.shape, generator=torch.Generator().manual_seed(2))
    )
    entry = Entry(name, torch.float32, tuple(value.shape), lambda: value)
    _, refs = write_safetensors(str(folder / "changed.safetensors"), [entry])
    blocks = (replace(block, weights={**block.weights, **refs}), *stack.blocks[1:])
    return replace(stack, blocks=blocks)


if __name__ == "__main__":
    sys.exit(main())
