"""Other families than LLaMA: a tiny GPT-NeoX, Qwen3 and Mixtral learn the embedded example's text,
and lose a quarter of their blocks in three ways.

    python benchmarks/families.py [--family neox qwen3 mixtral] [--steps 600] [--blocks 8]
        [--models DIR] [--seed 0]

Each is trained on `examples/text/calibration.txt` with the example's tokenizer, and then dropped
(`method: mi`), fused by the paper's recipe with few epochs, and by the default (`fusegpt`, healed),
through `compress` and on the same windows. Perplexities are those of each run's manifest, on
`examples/text/heldout.txt`, which no model has seen. With `--models`, trained models are kept
there, and one that is there already is not trained again.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers as tf

from fusegpt_ray import Recipe, compress
from fusegpt_ray.terminal.display import Display

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
CALIBRATION, HELD_OUT = EXAMPLES / "text/calibration.txt", EXAMPLES / "text/heldout.txt"
HIDDEN, HEADS, LENGTH, BATCH = 128, 4, 128, 8
RATE, WARM_UP = 2e-3, 50
FUSION = {"rank": 16, "lora_rank": 16, "batch": 4}
WAYS: dict[str, dict[str, Any]] = {
    "dropped": {"method": "mi"},
    "`preset: paper`, 2 epochs": {"preset": "paper", "fusion": FUSION | {"epochs": 2}},
    "the default, healed": {
        "fusion": FUSION,
        "heal": {"tokens": 16384, "train": "all", "batch": 4, "learning_rate": 1e-4},
    },
}


def config(family: str, blocks: int, vocabulary: int) -> tf.PretrainedConfig:
    """A tiny model of a family; tokens as in the example's tokenizer."""
    shape: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": HIDDEN,
        "num_hidden_layers": blocks,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    if family == "neox":
        return tf.GPTNeoXConfig(**shape, intermediate_size=4 * HIDDEN)
    shape |= {"num_key_value_heads": HEADS // 2, "tie_word_embeddings": True}
    if family == "qwen3":
        return tf.Qwen3Config(**shape, intermediate_size=3 * HIDDEN, head_dim=HIDDEN // HEADS)
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": False}
    return tf.MixtralConfig(**shape, **experts, intermediate_size=HIDDEN)


FAMILIES = ("neox", "qwen3", "mixtral")


def batches(tokens: torch.Tensor) -> Iterator[torch.Tensor]:
    """Endless batches: in every pass all windows in a new order, cut from a new offset."""
    while True:
        offset = int(torch.randint(LENGTH, ()))
        count = (len(tokens) - offset) // LENGTH
        windows = tokens[offset : offset + count * LENGTH].view(count, LENGTH)
        yield from windows[torch.randperm(count)].split(BATCH)


def train(model: Any, tokens: torch.Tensor, steps: int) -> None:
    """AdamW at a rate that rises and falls once."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=steps, pct_start=min(0.3, WARM_UP / steps)
    )
    began = time.monotonic()
    model.train()
    for step, batch in zip(range(1, steps + 1), batches(tokens), strict=False):
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            seconds = time.monotonic() - began
            print(f"  step {step}: loss {loss.item():.3f}, {seconds:.0f} s", flush=True)


def trained(family: str, blocks: int, steps: int, seed: int, folder: Path) -> Path:
    """The folder of the trained model, which is made if it is not there."""
    out = folder / f"{family}-{blocks}-{steps}-{seed}"
    if (out / "config.json").exists():
        return out
    tokenizer = tf.AutoTokenizer.from_pretrained(EXAMPLES / "tiny-llama")
    text = CALIBRATION.read_text(encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    torch.manual_seed(seed)
    described = config(family, blocks, len(tokenizer))
    model = tf.AutoModelForCausalLM.from_config(described, dtype=torch.float32)
    train(model, torch.tensor(ids), steps)
    tokenizer.save_pretrained(out)
    model.save_pretrained(out)
    return out


def recipe(model: Path, way: str, windows: int, seed: int, folder: Path) -> dict[str, Any]:
    return {
        "seed": seed,
        "model": {"source": str(model), "dtype": "float32"},
        "sparsity": 0.25,
        "method": "fusegpt",
        "calibration": {"data": str(CALIBRATION), "windows": windows, "length": LENGTH},
        "evaluation": {"heldout": {"data": str(HELD_OUT)}},
        "importance": {"windows": min(16, windows)},
        "cluster": {"engine": "local"},
        "output": {"uri": str(folder), "name": "family"},
        **WAYS[way],
    }


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", nargs="+", default=[*FAMILIES], choices=FAMILIES)
    parser.add_argument("--steps", type=int, default=600, help="of training")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--windows", type=int, default=64, help="of calibration")
    parser.add_argument("--models", type=Path, help="a folder to keep trained models in")
    parser.add_argument("--seed", type=int, default=0, help="of training, and of each recipe")
    arguments = parser.parse_args(given)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for family in arguments.family:
            kept = arguments.models or folder / "models"
            model = trained(family, arguments.blocks, arguments.steps, arguments.seed, kept)
            for number, way in enumerate(WAYS):
                out = folder / f"{family}-{number}"
                asked = recipe(model, way, arguments.windows, arguments.seed, out)
                (published,) = compress(Recipe.parse(asked), Display())
                found = published.manifest
                values = found["perplexity"]["heldout"]
                ended = values.get("healed", values.get("fused", values["dropped"]))
                removed = ", ".join(map(str, found["removed"]))
                cells = (f"{values[key]:.2f}" for key in ("dense", "dropped"))
                rows.append(f"| {family} | {way} | {removed} | {' | '.join(cells)} | {ended:.2f} |")
                print(rows[-1], flush=True)
    print("\n| family | way | removed | dense | dropped | finished |\n|---|---|---|---:|---:|---:|")
    print("\n".join(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
