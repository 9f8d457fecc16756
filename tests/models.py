"""Tiny random models as ordinary Hugging Face checkpoints, and what tests ask of the real model for
comparison.

Nothing here uses the package under test, except `open_stack`, which only saves typing.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import nn

from fusegpt_ray.model.architecture import dense_stack
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.store.checkpoint import read_index

VOCAB = 101
DEPTH = 5
SLIDING = 4
"""Shorter than the tests' windows, so that a sliding layer differs from a full one."""

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED: dict[str, Any] = COMMON | {"intermediate_size": 48, "num_key_value_heads": 2}


def llava() -> tf.LlavaConfig:
    vision = tf.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        # as deep as the language model: depth alone must not tell them apart
        num_hidden_layers=DEPTH,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        projection_dim=16,
    )
    return tf.LlavaConfig(
        vision_config=vision, text_config=tf.LlamaConfig(**GROUPED), image_token_index=VOCAB - 1
    )


def _qwen2() -> tf.Qwen2Config:
    return tf.Qwen2Config(
        **GROUPED, use_sliding_window=True, sliding_window=SLIDING, max_window_layers=2
    )


def _gemma3() -> tf.Gemma3TextConfig:
    kinds = [("full" if i % 2 else "sliding") + "_attention" for i in range(DEPTH)]
    return tf.Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=SLIDING, layer_types=kinds)


def _gpt2() -> tf.GPT2Config:
    return tf.GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=DEPTH,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    )


def _lfm2() -> tf.Lfm2Config:
    """A hybrid: attention in two blocks, a short convolution with other linear layers in the
    others.
    """
    return tf.Lfm2Config(
        **GROUPED, full_attn_idxs=[1, 2], block_auto_adjust_ff_dim=False, tie_word_embeddings=False
    )


@dataclass(frozen=True)
class Tiny:
    config: Callable[[], tf.PretrainedConfig]
    blocks: str
    """Where the decoder blocks are in the model that from_pretrained builds."""
    norm: str
    """The final norm (in OPT: what follows the last block)."""
    prefix: str
    """What stands before a block's number on disk."""


LLAMA_LIKE = ("model.layers", "model.norm", "model.layers.")
MODELS: dict[str, Tiny] = {
    "llama": Tiny(lambda: tf.LlamaConfig(**GROUPED, tie_word_embeddings=False), *LLAMA_LIKE),
    "llama-tied": Tiny(lambda: tf.LlamaConfig(**GROUPED, tie_word_embeddings=True), *LLAMA_LIKE),
    "llama-sharded": Tiny(
        lambda: tf.LlamaConfig(**GROUPED, tie_word_embeddings=False), *LLAMA_LIKE
    ),
    "llava": Tiny(
        llava,
        "model.language_model.layers",
        "model.language_model.norm",
        "language_model.model.layers.",
    ),
    "gpt2": Tiny(_gpt2, "transformer.h", "transformer.ln_f", "transformer.h."),
    "gemma3": Tiny(_gemma3, *LLAMA_LIKE),
    "qwen2": Tiny(_qwen2, *LLAMA_LIKE),
    "qwen3": Tiny(lambda: tf.Qwen3Config(**GROUPED, head_dim=8), *LLAMA_LIKE),
    "mistral": Tiny(lambda: tf.MistralConfig(**GROUPED, sliding_window=SLIDING), *LLAMA_LIKE),
    "phi3": Tiny(lambda: tf.Phi3Config(**GROUPED), *LLAMA_LIKE),
    "opt": Tiny(
        lambda: tf.OPTConfig(**COMMON, ffn_dim=48, word_embed_proj_dim=32),
        "model.decoder.layers",
        "model.decoder.final_layer_norm",
        "model.decoder.layers.",
    ),
    "gpt_neox": Tiny(
        lambda: tf.GPTNeoXConfig(**COMMON, intermediate_size=48),
        "gpt_neox.layers",
        "gpt_neox.final_layer_norm",
        "gpt_neox.layers.",
    ),
    "lfm2": Tiny(_lfm2, "model.layers", "model.embedding_norm", "model.layers."),
    "falcon": Tiny(
        lambda: tf.FalconConfig(**COMMON, alibi=False),
        "transformer.h",
        "transformer.ln_f",
        "transformer.h.",
    ),
}
SUPPORTED = [name for name in MODELS if name not in ("llama-tied", "llama-sharded")]
"""One of each architecture."""


def save_tiny(name: str, folder: Path) -> Path:
    """Write the checkpoint of a tiny random model as transformers writes it."""
    torch.manual_seed(len(name))
    config = MODELS[name].config()
    auto = tf.AutoModelForImageTextToText if name == "llava" else tf.AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32)
    randomize(model)
    model.save_pretrained(folder, max_shard_size="30KB" if name == "llama-sharded" else "1GB")
    return folder


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Weights large enough that every block matters, norms that are not 1, biases that are not
    0.
    """
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        if parameter.dim() > 1:
            parameter.copy_(noise * (0.5 if "emb" in name or "wte" in name else 0.2))
        elif name.endswith("bias"):
            parameter.copy_(0.1 * noise)
        else:  # a norm's scale: near 1, or near 0 where the architecture adds 1
            parameter.add_(0.2 * noise)


def load_model(folder: Path) -> tf.PreTrainedModel:
    """The real model, by from_pretrained, in float32."""
    config = json.loads((folder / "config.json").read_text())
    auto = (
        tf.AutoModelForImageTextToText
        if config["model_type"] == "llava"
        else tf.AutoModelForCausalLM
    )
    return auto.from_pretrained(folder, dtype=torch.float32).eval()


def token_windows(windows: int, length: int, seed: int = 1) -> torch.Tensor:
    """Random token ids [windows, length] without special ones."""
    return torch.randint(
        3, VOCAB - 1, (windows, length), generator=torch.Generator().manual_seed(seed)
    )


def without_blocks(model: tf.PreTrainedModel, name: str, kept: Sequence[int]) -> tf.PreTrainedModel:
    """A copy of the real model with only these blocks, every per-layer setting in step."""
    short = copy.deepcopy(model)
    blocks = nn.ModuleList([short.get_submodule(MODELS[name].blocks)[i] for i in kept])
    for position, block in enumerate(blocks):
        for module in block.modules():
            if getattr(module, "layer_idx", None) is not None:
                module.layer_idx = position
    short.set_submodule(MODELS[name].blocks, blocks)
    _shorten(short, kept, len(model.get_submodule(MODELS[name].blocks)))
    return short


def _shorten(model: tf.PreTrainedModel, kept: Sequence[int], depth: int) -> None:
    """Every configuration in the model: the depth, and lists with one entry a block."""
    configs = {
        id(config): config
        for m in model.modules()
        if (config := getattr(m, "config", None)) is not None
    }
    for config in configs.values():
        if "Vision" in type(config).__name__:
            continue
        config = config.get_text_config()
        if config.num_hidden_layers != depth:
            continue  # done: several modules share a text configuration
        for key, value in list(vars(config).items()):
            if isinstance(value, list) and len(value) == depth:
                setattr(config, key, [value[i] for i in kept])
        config.num_hidden_layers = len(kept)


@torch.no_grad()
def hidden_states(model: tf.PreTrainedModel, name: str, ids: torch.Tensor) -> list[torch.Tensor]:
    """What enters each block of the real model, and last what enters the final norm: [W, T, D]
    each.
    """
    seen: list[torch.Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    modules = [*model.get_submodule(MODELS[name].blocks), model.get_submodule(MODELS[name].norm)]
    hooks = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in modules]
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def open_stack(folder: Path) -> Stack:
    """The dense stack of a checkpoint in a folder."""
    config = json.loads((folder / "config.json").read_text())
    return dense_stack(config, read_index(str(folder), "model.source"))


def rewrite(
    folder: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> Path:
    """A copy of an unsharded checkpoint with its tensors changed."""
    out.mkdir(exist_ok=True)
    (out / "config.json").write_text((folder / "config.json").read_text())
    tensors = {
        name: value.contiguous()
        for name, value in change(load_file(folder / "model.safetensors")).items()
    }
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out
