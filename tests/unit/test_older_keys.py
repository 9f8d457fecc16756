"""A config.json may say twice what a block is: in the words of its class, and in older ones, which
other programs read. Publishing keeps both in step.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import transformers as tf
from models import DEPTH, GROUPED

from fusegpt_ray.model.stack import Block, Stack
from fusegpt_ray.publishing.shrink import shrink_config

GONE = (1, 3)
CASES: dict[str, tuple[Any, Any]] = {
    "hybrid_override_pattern": ("M-*ME", "M*E"),
    "moe_layers_enum": ("2,3,4", "1,2"),
    "dense_mlp_idx": (2, 1),
    "moe_layer_start_index": ([1, 2], [1, 1]),
    "moe_layer_end_index": ([6, 3], [2, 1]),  # of several modalities, and maybe beyond the last
    "moe_layer_freq": ([0, 1, 1, 1, 1], [0, 1, 1]),
    "linear_attn_config": (
        {"kda_layers": [1, 2, 3, 5], "full_attn_layers": [4], "num_heads": 5},  # from one on
        {"kda_layers": [1, 2, 3], "full_attn_layers": [], "num_heads": 5},
    ),
    "sparse_attention_config": (
        {"sparse_attention_freq": [0, 0, 1, 1, 1], "sparse_init_blocks": 1},
        {"sparse_attention_freq": [0, 1, 1], "sparse_init_blocks": 1},
    ),
    # What only looks alike:
    "word_pattern": ("two words", "two words"),
    "version": ("1,2,3", "1,2,3"),
    "rope_tables": ({"short_factor": [1, 2, 3, 4, 5]}, {"short_factor": [1, 2, 3, 4, 5]}),
    "attention_notes": ({"kernels": ["fast"]}, {"kernels": ["fast"]}),
}


@pytest.mark.parametrize("key", CASES)
def test_what_older_words_say_of_blocks_goes_with_them(key: str) -> None:
    before, after = CASES[key]
    config = tf.LlamaConfig(**GROUPED).to_dict() | {"architectures": ["LlamaForCausalLM"]}
    raw = json.loads(json.dumps(config)) | {key: before}
    dense = Stack(raw, "", {}, tuple(Block(number, {}) for number in range(DEPTH)))
    assert shrink_config(dense.drop(*GONE))[key] == after
