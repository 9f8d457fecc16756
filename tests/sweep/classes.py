"""A tiny random checkpoint of any causal or image-text-to-text class of transformers, made from its
configuration class alone.

The usual fields of configurations get small values by their names (`SIZES`); what a single class
needs besides stands in `OWN`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from models import randomize
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from torch import nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

VOCAB, DEPTH = 290, 6
QUIET = (1, 3)
"""Two blocks that a removal takes, where others can go on without them."""
SPECIAL = ("<pad>", "<s>", "</s>")
FIRST_SPECIAL = 260
"""Tokens of a text lie below it; images and the like have those from here on."""

SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), VOCAB),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("embed_dim", "embedding_size", "lru_width", "emb_dim", "model_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "ffn_hidden_size"), 16),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), DEPTH),
    **dict.fromkeys(("decoder_layers", "encoder_layers", "depth", "layers"), DEPTH),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "global_head_dim", "d_kv", "attention_head_dim"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_num_experts", "num_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("sliding_window", "attention_window_size", "local_attention"), 8),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("linear_num_key_heads", "mamba_n_groups", "n_groups", "mamba_ngroups"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_expand", "expand"), 2),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 8),
    **dict.fromkeys(("mamba_dt_rank", "time_step_rank", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("image_size", "patch_size", "spatial_patch_size"), 8),
    **dict.fromkeys(
        ("projection_dim", "out_hidden_size", "text_hidden_size", "adapter_in_dim"), 32
    ),
    **dict.fromkeys(("initializer_range",), 0.02),
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
    "tie_word_embeddings": None,
}
"""By name of the field; None where the class's own value stays."""

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MROPE = {"mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}
"""Rotary embeddings of three axes, for heads of 8."""
_WITH_MROPE = {"rope_parameters": _ROPE | MROPE}
_WITH_ERNIE = {"rope_parameters": _ROPE | {"mrope_section": [1, 1, 2]}}
_WAVES = {"codebook_dim": 32, "codebook_size": 8}
_SIGLIP = {"model_type": "siglip_vision_model", "hidden_size": 64, "intermediate_size": 48}
_SIGLIP |= {"num_hidden_layers": 6, "num_attention_heads": 4, "image_size": 8, "patch_size": 8}
OWN: dict[str, dict[str, Any]] = {
    "BambaConfig": {"attn_layer_indices": [1, 4]},
    "CodeGenConfig": {"rotary_dim": 4},
    "Gemma3nTextConfig": {"layer_types": ["sliding_attention", "full_attention"] * 3}
    | {"num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.0] * DEPTH},
    "GPTJConfig": {"rotary_dim": 4},
    "DeepseekV2Config": {"first_k_dense_replace": 1},
    "DeepseekV3Config": {"first_k_dense_replace": 1, "n_group": 2},
    "FalconConfig": {"ffn_hidden_size": None},
    "FalconH1Config": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8},
    "Emu3TextConfig": {"pad_token_id": 0},
    "Glm4MoeConfig": {"first_k_dense_replace": 1},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], DEPTH // 2]], "window_size": 8},
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "GraniteMoeHybridConfig": {"layer_types": ["mamba", "attention"] * 3},
    "Mamba2Config": {"num_heads": 8},
    "Dots1Config": {"first_k_dense_replace": 1},
    "ReformerConfig": {
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
        "is_decoder": True,
        "attn_layers": ["local", "lsh"] * 3,
    },
    "Lfm2Config": {"layer_types": ["conv", "full_attention"] * 3},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"] * 3, "num_dense_layers": 1},
    "Llama4TextConfig": {"num_experts_per_tok": 1, "interleave_moe_layer_step": 2},
    **dict.fromkeys(("Glm4vTextConfig", "Glm4vMoeTextConfig", "GlmOcrTextConfig"), _WITH_MROPE),
    **dict.fromkeys(("PaddleOCRTextConfig", "HunYuanVLTextConfig"), _WITH_MROPE),
    **dict.fromkeys(("Qwen2VLTextConfig", "Qwen2_5_VLTextConfig"), _WITH_MROPE),
    "Qwen2_5OmniTextConfig": _WITH_MROPE,
    "Apertus1p5Config": {"image_token_offset": 270, "audio_token_offset": 278},
    "Apertus1p5VisionTokenizerConfig": {"codebook_size": 8},
    **dict.fromkeys(("WavTokenizerConfig", "WavTokenizerEncoderConfig"), _WAVES),
    "BailingHybridConfig": {"n_group": 1, "topk_group": 1},
    "BltConfig": {"encoder_hash_byte_group_vocab": 50},
    "BltLocalEncoderConfig": {"hidden_size_global": 32},
    "BltLocalDecoderConfig": {"hidden_size_global": 32},
    "ChameleonConfig": {"vocabulary_map": {"<image>": 270}},
    "ChameleonVQVAEConfig": {"base_channels": 32, "num_embeddings": 8, "latent_channels": 32},
    "CohereCompassTextConfig": {
        "rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), _ROPE)
    },
    "DbrxConfig": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 16, "moe_top_k": 2},
    },
    "DeepseekOcr2SamVisionConfig": {"downsample_channels": [16, 32], "output_channels": 16}
    | {"global_attn_indexes": [2, 5], "window_size": 2},
    "DeepseekOcr2TextConfig": {"mlp_layer_types": ["dense"] + ["sparse"] * (DEPTH - 1)},
    "DiffusionGemmaTextConfig": {"top_k_experts": 2},
    "Dots3NoteAudioConfig": {"adapter_input_size": 32, "adapter_out_dim": 32},
    "Dots3NoteVisionConfig": {"adapter_out_dim": 32},
    "Dots3NoteTextConfig": {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4}
    | {"swa_q_lora_rank": 8, "swa_kv_lora_rank": 8, "swa_head_dim": 16}
    | {"swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8}
    | {"index_topk": 4, "index_head_dim": 8, "index_n_heads": 4},
    "Emu3Config": {"vocabulary_map": {"<image>": 270}},
    "Emu3VQVAEConfig": {"base_channels": 32, "codebook_size": 8, "embed_dim": 4},
    "Ernie4_5_VLMoeTextConfig": {"moe_intermediate_size": [16, 16]} | _WITH_ERNIE,
    "Florence2VisionConfig": {"depths": (1, 1, 1, 1), "embed_dim": (8, 8, 16, 32)}
    | {"num_heads": (2, 2, 2, 2), "num_groups": (2, 2, 2, 2)},
    "Glm5NextTextConfig": {"qk_rope_head_dim": 0, "index_topk": 4, "index_kpool": 2}
    | {"index_head_dim": 8, "index_n_heads": 4},
    "Granite4VisionConfig": {"deepstack_layer_map": [[-2, 0], [-1, 2]], "downsample_rate": "1/2"}
    | {"spatial_target_layers": [3], "vision_config": _SIGLIP},
    "JanusVQVAEConfig": {"base_channels": 32, "num_embeddings": 8, "latent_channels": 32},
    "Mistral4Config": {"head_dim": 16},
    "Molmo2AdapterConfig": {"vision_feature_layer": [5, 3]},
    "MuseSparkAudioConfig": {"num_hidden_layers": 4, "hidden_sizes": [8, 8, 16, 32]},
    "NemotronHConfig": {
        "layers_block_type": [
            *("linear_attention", "moe", "full_attention", "mlp"),
            *("linear_attention", "full_attention"),
        ]
    },
    "MusicgenDecoderConfig": {"num_codebooks": 1},
    "MusicgenMelodyDecoderConfig": {"num_codebooks": 1},
    "Qwen4ExpTextConfig": {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8}
    | {"indexer_budget": 8, "indexer_compress_ratio": 2, "ngram_vocab_size_base": 300}
    | {"split_ngram_parts": 1, "hc_lowrank": 8},
    "RadioConfig": {"video_temporal_patch_size": 2},
    "XmodConfig": {"default_language": "en_XX"},
    "ZayaConfig": {"num_experts_per_tok": 1},
    "Zamba2Config": {"layers_block_type": ["linear_attention", "hybrid"] * 3},
    "ZambaConfig": {"layers_block_type": ["mamba", "hybrid", "mamba"] * 2},
}
"""What single configuration classes need."""

DECODERS = ("is_decoder",)
"""Switches that make a decoder of an encoder's class."""


def all_classes() -> list[str]:
    """The names of all classes that the auto classes for causal language models and for images with
    text know.
    """
    found: set[str] = set()
    for names in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
        for classes in names.values():
            found |= {classes} if isinstance(classes, str) else {*classes}
    return sorted(found)


def tiny_config(
    config_class: type[tf.PretrainedConfig], sizes: Mapping[str, Any] = SIZES
) -> tf.PretrainedConfig:
    """A small configuration of a class."""
    usual = config_class()
    values: dict[str, Any] = {}
    for number, (key, value) in enumerate(usual.to_dict().items()):
        if sizes.get(key) is not None and not isinstance(value, list | dict):
            values[key] = sizes[key]
        elif key.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            values[key] = FIRST_SPECIAL + number % (VOCAB - FIRST_SPECIAL)
        elif key in DECODERS:
            values[key] = True
        elif isinstance(value, dict) and "mrope_section" in value:
            values[key] = value | MROPE
    for key in config_class.sub_configs:
        part = getattr(usual, key, None)
        if isinstance(part, tf.PretrainedConfig):
            values[key] = tiny_config(type(part), sizes).to_dict()
    if "kv_lora_rank" in values:  # heads are made from one latent vector: none is shared
        values["num_key_value_heads"] = values["num_attention_heads"]
    if {"head_dim", "qk_rope_head_dim"} <= values.keys():  # what is rotated, by another name
        values["head_dim"] = values["qk_rope_head_dim"]
    values |= OWN.get(config_class.__name__, {})
    try:
        return config_class(**values)
    except (ValueError, TypeError, KeyError):
        # Its lists of the blocks' kinds do not follow the depth by themselves.
        return config_class(**_cut(usual) | values)


def _cut(usual: tf.PretrainedConfig) -> dict[str, Any]:
    """The lists that are as long as the usual model is deep, cut to the first kinds."""
    depth = getattr(usual, "num_hidden_layers", None)
    lists = usual.to_dict().items()
    return {
        key: value[:DEPTH]
        for key, value in lists
        if isinstance(value, list) and len(value) == depth and depth > DEPTH
    }


def save_class(name: str, folder: Path, sizes: Mapping[str, Any] = SIZES) -> Path:
    """Write a tiny random checkpoint of the class `name`, with a tokenizer."""
    torch.manual_seed(0)
    config = tiny_config(getattr(tf, name).config_class, sizes)
    model = getattr(tf, name)._from_config(config, dtype=torch.float32)
    if sum(value.numel() for value in model.parameters()) > 50_000_000:
        raise ValueError(f"{sum(v.numel() for v in model.parameters()):,} parameters")
    randomize(model)
    _quieten(model)
    _empty_the_padding(model)
    model.save_pretrained(folder)
    add_tokenizer(folder)
    return folder


def blocks_of(model: nn.Module, depth: int) -> nn.ModuleList:
    """The decoder blocks: the longest list of that depth, by parameters, outside of vision; and
    outside of an encoder, if there is one.
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == depth
        and not any(part in name for part in ("vision", "visual", "audio"))
    }
    others = {name: module for name, module in lists.items() if "encoder" not in name}
    found = (others or lists).values()
    return max(found, key=lambda blocks: sum(value.numel() for value in blocks.parameters()))


@torch.no_grad()
def _quieten(model: nn.Module) -> None:
    """Make the blocks of `QUIET` matter least. Of random blocks the last ones do, and those that
    stay would all keep their numbers.
    """
    blocks = blocks_of(model, DEPTH)
    for number in QUIET:
        for name, value in blocks[number].named_parameters():
            if value.dim() > 1:
                value *= 0.3
            elif "norm" in name and not name.endswith("bias"):
                value -= 0.7  # from 1 to 0.3; or from 0, where the architecture adds 1


@torch.no_grad()
def _empty_the_padding(model: nn.Module) -> None:
    """The padding token's row is zero, as in every trained model: it never learns. Some classes set
    it to zero as they load (Youtu).
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            module.weight[module.padding_idx] = 0


def add_tokenizer(folder: Path) -> None:
    """A tokenizer beside a model: a token a byte, in a form that every tokenizer class reads."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = dict(zip(("pad_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def random_text(letters: int) -> str:
    """Random letters in lines."""
    drawn = torch.randint(
        ord("a"), ord("z"), (letters,), generator=torch.Generator().manual_seed(1)
    )
    text = "".join(map(chr, drawn.tolist()))
    return "\n".join(text[first : first + 30] for first in range(0, letters, 30))
