"""What it costs to watch an empty model and to rehearse the way to a shallower one, before any
weight is read.

    OMP_NUM_THREADS=1 python benchmarks/rehearsal.py [--shape toy llama2-7b llama2-70b]

Both are made of config.json alone (docs/adr/0016-as-the-library-reads.md): no weights, no GPU.
"""

from __future__ import annotations

import argparse
import sys
import time

import transformers
from shapes import SHAPES

from fusegpt_ray.model.stack import Block, Stack
from fusegpt_ray.model.structure import observe
from fusegpt_ray.publishing.rehearsal import rehearse


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shapes = ["toy", "llama2-7b", "llama2-70b"]
    parser.add_argument("--shape", nargs="*", default=shapes, choices=SHAPES)
    arguments = parser.parse_args()
    print("| shape | blocks | watching s | rehearsing s |\n|---|---|---|---|")
    for name in arguments.shape:
        shape = SHAPES[name]
        config = transformers.LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            num_hidden_layers=shape.blocks,
        )
        raw = config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
        began = time.monotonic()
        structure = observe(raw)
        watched = time.monotonic()
        blocks = tuple(Block(number, {}) for number in range(shape.blocks))
        rehearse(Stack(raw, "model.layers.", {}, blocks), structure, [shape.blocks // 4])
        seconds = f"{watched - began:.2f} | {time.monotonic() - watched:.2f}"
        print(f"| {name} | {shape.blocks} | {seconds} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
