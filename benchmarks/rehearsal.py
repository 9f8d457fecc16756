"""What it costs to watch an empty model and to rehearse the way to a shallower one, before any
weight is read.

    OMP_NUM_THREADS=1 python benchmarks/rehearsal.py [--shape toy llama2-7b llama2-70b hybrid bias]

All are made of config.json alone (docs/adr/0016-as-the-library-reads.md): no weights, no GPU. Of
two shapes of 80 blocks only some can go, so that each is tried alone: a hybrid with experts in
every other block, and GPT-NeoX-Japanese, of which the last block alone has a bias. Seconds are
those of the processor, which a busy machine does not change much.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import transformers as tf
from shapes import SHAPES

from fusegpt_ray.model.stack import Block, Stack
from fusegpt_ray.model.structure import observe
from fusegpt_ray.publishing.rehearsal import rehearse

DEPTH = 80
SIZES: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": DEPTH,
}


def hybrid() -> tf.PretrainedConfig:
    """As `layer_types` follow the blocks, nearly every candidate makes another config.json."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 2}
    heads = {"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 128}
    return tf.Qwen3NextConfig(**SIZES, **experts, **heads)


def bias() -> tf.PretrainedConfig:
    return tf.GPTNeoXJapaneseConfig(**SIZES, intermediate_multiple_size=2)


PARTIAL = {
    "hybrid": (hybrid, "Qwen3NextForCausalLM"),
    "bias": (bias, "GPTNeoXJapaneseForCausalLM"),
}
"""Of which not any block can go."""


def described(name: str) -> tuple[dict[str, Any], int]:
    """A config.json, and how many blocks it has."""
    if name in PARTIAL:
        make, kind = PARTIAL[name]
        return make().to_dict() | {"architectures": [kind]}, DEPTH
    shape = SHAPES[name]
    config = tf.LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        num_hidden_layers=shape.blocks,
    )
    return config.to_dict() | {"architectures": ["LlamaForCausalLM"]}, shape.blocks


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shapes = ["toy", "llama2-7b", "llama2-70b", *PARTIAL]
    parser.add_argument("--shape", nargs="*", default=shapes, choices=[*SHAPES, *PARTIAL])
    arguments = parser.parse_args()
    print("| shape | blocks | watching s | rehearsing s |\n|---|---|---|---|")
    for name in arguments.shape:
        raw, depth = described(name)
        began = time.process_time()
        structure = observe(raw)
        watched = time.process_time()
        blocks = tuple(Block(number, {}) for number in range(depth))
        rehearse(Stack(raw, "model.layers.", {}, blocks), structure, [depth // 4])
        seconds = f"{watched - began:.2f} | {time.process_time() - watched:.2f}"
        print(f"| {name} | {depth} | {seconds} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
