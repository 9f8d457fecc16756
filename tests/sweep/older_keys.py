"""What a config.json on the hub says in older words, which vLLM reads and no class of transformers
writes: it reads them once, and has words of its own for them from then on.
"""

from __future__ import annotations

from typing import Any

_FIRST_DENSE = {"first_k_dense_replace": 1, "moe_layer_freq": 1}
OLDER_KEYS: dict[str, dict[str, Any]] = {
    "AXK1ForCausalLM": _FIRST_DENSE,
    "AfmoeForCausalLM": {
        "score_func": "sigmoid",
        "route_norm": True,
        "n_group": 1,
        "topk_group": 1,
    },
    "MiniMaxM2ForCausalLM": {"rotary_dim": 32, "scoring_func": "sigmoid"},
    "DeepseekV3ForCausalLM": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "Glm4MoeForCausalLM": {"head_dim": 32},
    "Glm4MoeLiteForCausalLM": _FIRST_DENSE,
    "HYV3ForCausalLM": _FIRST_DENSE
    | {"expert_hidden_dim": 64, "route_norm": True}
    | {"qk_norm": True},
    "KimiLinearForCausalLM": _FIRST_DENSE
    | {
        "linear_attn_config": {"kda_layers": [1, 2, 3, 4, 6], "full_attn_layers": [5]}
        | {"head_dim": 128, "num_heads": 32, "short_conv_kernel_size": 4}
    },
    "Lfm2ForCausalLM": {"block_dim": 128, "conv_dim": 128},
    "MiMoV2FlashForCausalLM": {"hybrid_layer_pattern": [0, 1, 1, 1, 1, 0]}
    | {"moe_layer_freq": [0, 1, 1, 1, 1, 1], "layernorm_epsilon": 1e-5}
    | {"sliding_window_size": 8, "swa_head_dim": 32, "swa_v_head_dim": 32}
    | {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2}
    | {"add_swa_attention_sink_bias": True, "rope_theta": 5e6, "swa_rope_theta": 1e4}
    | {"partial_rotary_factor": 0.334},
    "NemotronHForCausalLM": {"hybrid_override_pattern": "ME*-M*"},
}
"""By class, for the tiny checkpoints of `classes.py`."""
