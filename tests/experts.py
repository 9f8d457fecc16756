"""Tiny random mixtures of experts, one of each way in which checkpoints keep them.

Nothing here uses the package under test.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from models import DEPTH, GROUPED, SLIDING, randomize
from safetensors.torch import save_file

ALL: dict[str, Any] = GROUPED | {"tie_word_embeddings": False}
ROUTED: dict[str, Any] = ALL | {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT: dict[str, Any] = {
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
"""As in DeepSeek: the first block dense, latent attention, one shared expert."""

EXPERTS: dict[str, Callable[[], tf.PretrainedConfig]] = {
    "mixtral": lambda: tf.MixtralConfig(**ALL, num_local_experts=4),
    "qwen2_moe": lambda: tf.Qwen2MoeConfig(
        **ROUTED, num_experts=4, shared_expert_intermediate_size=16
    ),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(**ROUTED, num_experts=4, head_dim=8),
    "qwen3_next": lambda: tf.Qwen3NextConfig(
        **ROUTED,
        num_experts=4,
        head_dim=8,
        shared_expert_intermediate_size=16,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
    "phimoe": lambda: tf.PhimoeConfig(**ALL, num_local_experts=4),
    "olmoe": lambda: tf.OlmoeConfig(**ALL, num_experts=4, num_experts_per_tok=2),
    "flex_olmo": lambda: tf.FlexOlmoConfig(**ALL, num_experts=4, num_experts_per_tok=2),
    "granitemoe": lambda: tf.GraniteMoeConfig(**ALL, num_local_experts=4, num_experts_per_tok=2),
    "granitemoeshared": lambda: tf.GraniteMoeSharedConfig(
        **ALL, num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=16
    ),
    "granitemoehybrid": lambda: tf.GraniteMoeHybridConfig(
        **ALL,
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=16,
        layer_types=["attention" if i % 2 else "mamba" for i in range(DEPTH)],
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_n_groups=1,
    ),
    "deepseek_v2": lambda: tf.DeepseekV2Config(
        **ROUTED | {"num_key_value_heads": 4}, **LATENT, topk_method="greedy"
    ),
    "deepseek_v3": lambda: tf.DeepseekV3Config(**ROUTED | {"num_key_value_heads": 4}, **LATENT),
    "glm4_moe": lambda: tf.Glm4MoeConfig(
        **ROUTED,
        head_dim=8,
        n_routed_experts=4,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
    ),
    "ernie4_5_moe": lambda: tf.Ernie4_5_MoeConfig(
        **ALL,
        moe_num_experts=4,
        moe_k=2,
        moe_num_shared_experts=1,
        moe_intermediate_size=16,
        moe_layer_start_index=1,
        moe_layer_end_index=DEPTH - 1,
    ),
    "dots1": lambda: tf.Dots1Config(
        **ROUTED,
        head_dim=8,
        n_routed_experts=4,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
    ),
    "minimax": lambda: tf.MiniMaxConfig(
        **ALL,
        num_local_experts=4,
        num_experts_per_tok=2,
        head_dim=8,
        block_size=8,
        layer_types=["full_attention" if i % 2 else "linear_attention" for i in range(DEPTH)],
    ),
    "hunyuan_v1_moe": lambda: tf.HunYuanMoEV1Config(
        **ALL, num_experts=4, moe_topk=[2] * DEPTH, head_dim=8
    ),
    "exaone_moe": lambda: tf.ExaoneMoeConfig(
        **ROUTED,
        num_experts=4,
        num_shared_experts=1,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        sliding_window=SLIDING,
        head_dim=8,
        layer_types=["full_attention" if i % 2 else "sliding_attention" for i in range(DEPTH)],
    ),
    "afmoe": lambda: tf.AfmoeConfig(
        **ROUTED,
        num_experts=4,
        num_shared_experts=1,
        num_dense_layers=1,
        head_dim=8,
        sliding_window=SLIDING,
        layer_types=["full_attention" if i % 2 else "sliding_attention" for i in range(DEPTH)],
    ),
    "jamba": lambda: tf.JambaConfig(
        **ALL,
        num_experts=4,
        num_experts_per_tok=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=8,
    ),
    "cohere2_moe": lambda: tf.Cohere2MoeConfig(
        **GROUPED,
        num_experts=4,
        num_experts_per_tok=2,
        head_dim=8,
        sliding_window=SLIDING,
        layer_types=["full_attention" if i % 2 else "sliding_attention" for i in range(DEPTH)],
    ),
    "gpt_oss": lambda: tf.GptOssConfig(
        **ALL,
        num_local_experts=4,
        num_experts_per_tok=2,
        head_dim=8,
        sliding_window=SLIDING,
        layer_types=["full_attention" if i % 2 else "sliding_attention" for i in range(DEPTH)],
    ),
}


WEAK = (1, 2)
"""Blocks that do next to nothing."""


def build(name: str, dtype: torch.dtype = torch.float32) -> tf.PreTrainedModel:
    """The model with random weights; of five blocks, two matter little."""
    torch.manual_seed(len(name))
    model = tf.AutoModelForCausalLM.from_config(EXPERTS[name](), dtype=torch.float32)
    randomize(model)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.dim() > 1 and any(f".{number}." in path for number in WEAK):
                parameter.mul_(0.02)
    return model.to(dtype).eval()


def save_split(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """As transformers writes it: most of them with a tensor for each expert."""
    build(name, dtype).save_pretrained(folder)
    return folder


def save_merged(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The tensors as the class has them."""
    model = build(name, dtype)
    model.config.save_pretrained(folder)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    tied = set(model.all_tied_weights_keys)
    tensors = {k: v.contiguous() for k, v in model.state_dict().items() if k not in tied}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
