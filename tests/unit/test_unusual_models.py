"""Configurations that keep a block's settings in unusual ways are published right.

Compared with the real dense model, in which the blocks that went return what they are given.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from desk import Desk
from models import DEPTH, GROUPED, VOCAB, randomize, token_windows
from safetensors.torch import load_file
from torch import nn

from fusegpt_ray.cli import main

IDS = token_windows(2, 12)
GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": DEPTH, "n_head": 4, "n_positions": 64}
KINDS = ["sliding_attention", "full_attention"]


@torch.no_grad()
def published_equals_dense(dense: Path, published: Path) -> None:
    """The same logits, with the cache and without; the config loads as often as it is saved."""
    kept = json.loads((published / "fusegpt.json").read_text())["kept"]
    assert kept != list(range(len(kept))), "blocks behind the removed ones have moved"
    auto = auto_class(dense)
    model = auto.from_pretrained(dense, dtype=torch.float32).eval()
    lists = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == DEPTH and "encoder" not in name
    ]
    for number in {*range(DEPTH)} - {*kept}:
        lists[0][number].register_forward_hook(_nothing_done, with_kwargs=True)
    short, report = auto.from_pretrained(published, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    found, wanted = (each(input_ids=IDS, use_cache=False).logits for each in (short.eval(), model))
    # The same operations in float32; a kernel may be chosen by where a mask lies in memory.
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    with_cache = short(input_ids=IDS, use_cache=True).logits
    torch.testing.assert_close(with_cache, wanted, rtol=1e-4, atol=1e-4)


def _nothing_done(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    states = args[0] if args else kwargs["hidden_states"]
    return (states, *out[1:]) if isinstance(out, tuple) else states


def auto_class(model: Path) -> Any:
    sees = "vision_config" in json.loads((model / "config.json").read_text())
    return tf.AutoModelForImageTextToText if sees else tf.AutoModelForCausalLM


def compress(desk: Desk, config: tf.PretrainedConfig, **edits: Any) -> Path:
    """The published model of a random one whose blocks 1 and 2 do next to nothing.

    `edits`: to its config.json; what is None is taken out.
    """
    (desk.model / "model.safetensors").unlink()
    auto = tf.AutoModelForCausalLM
    if hasattr(config, "vision_config"):
        auto = tf.AutoModelForImageTextToText
    model = auto.from_config(config, dtype=torch.float32)
    randomize(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and any(f".{number}." in name for number in (1, 2)):
                parameter.mul_(0.02)
    model.save_pretrained(desk.model)
    file = desk.model / "config.json"
    edited = json.loads(file.read_text()) | edits
    file.write_text(json.dumps({key: value for key, value in edited.items() if value is not None}))
    assert main(["compress", desk.write(method="mi")]) == 0
    return desk.out / "demo-p40"


def _gpt_neo() -> tf.PretrainedConfig:
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_layers": DEPTH, "num_heads": 4}
    runs = [[["global", "local"], 2], [["local"], 1]]
    return tf.GPTNeoConfig(**sizes, attention_types=runs, window_size=4, max_position_embeddings=64)


def _bart() -> tf.PretrainedConfig:
    """A decoder whose depth the class calls by the encoder's name; both are equally deep."""
    layers = {"encoder_layers": DEPTH, "decoder_layers": DEPTH}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 4}
    sizes = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    text = {"vocab_size": VOCAB, "max_position_embeddings": 64, "is_decoder": True}
    return tf.BartConfig(**layers, **heads, **sizes, **text, is_encoder_decoder=False)


def _smollm3() -> tf.PretrainedConfig:
    """A list with one entry a block says where positions are used."""
    return tf.SmolLM3Config(**GROUPED, no_rope_layers=[1, 1, 0, 1, 0])


def _gpt_oss() -> tf.PretrainedConfig:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return tf.GptOssConfig(**GROUPED, **experts, head_dim=8, sliding_window=4)


def _lfm2() -> tf.PretrainedConfig:
    numbers = {"full_attn_idxs": [1, 4], "block_auto_adjust_ff_dim": False}
    return tf.Lfm2Config(**GROUPED, **numbers, tie_word_embeddings=False)


def _qwen2_vl() -> tf.PretrainedConfig:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    sees = {"depth": 2, "embed_dim": 16, "num_heads": 2, "hidden_size": 32, "patch_size": 4}
    return tf.Qwen2VLConfig(text_config=GROUPED | {"rope_parameters": rope}, vision_config=sees)


def _flat() -> dict[str, Any]:
    """The text model's settings among the others, as files of earlier years have them."""
    text = _qwen2_vl().text_config.to_dict()
    return {key: text[key] for key in (*GROUPED, "rope_parameters")} | {"text_config": None}


CASES: dict[str, tuple[Callable[[], tf.PretrainedConfig], dict[str, Any]]] = {
    "two-names": (lambda: tf.GPT2Config(**GPT2), {"num_hidden_layers": DEPTH}),
    "run-lengths": (_gpt_neo, {}),
    "the-encoder's-name": (_bart, {}),
    "a-list": (_smollm3, {}),
    "bfloat16-kernels-only": (_gpt_oss, {}),
    "numbers-of-blocks": (_lfm2, {"layer_types": None}),
    "flat": (_qwen2_vl, _flat()),
    "by-number": (
        lambda: tf.LlamaConfig(**GROUPED),
        {"layer_notes": {str(number): f"once {number}" for number in range(DEPTH)}},
    ),
    "other-names-in-the-file": (lambda: tf.ExaoneConfig(**GROUPED), {}),
    "tokens": (lambda: tf.LlamaConfig(**GROUPED), {"eos_token_id": [2, 3, 4, 5, 6]}),
}


@pytest.mark.parametrize("name", CASES)
def test_published_is_the_dense_model_without_the_blocks(name: str, desk: Desk) -> None:
    make, edits = CASES[name]
    published = compress(desk, make(), **edits)
    published_equals_dense(desk.model, published)
    config = json.loads((published / "config.json").read_text())
    for key in ("n_layer", "num_hidden_layers", "num_layers", "decoder_layers"):
        assert config.get(key, 3) == 3, "every name of the depth says the same"
    if name == "run-lengths":
        assert sum(len(kinds) * times for kinds, times in config["attention_types"]) == 3
    if name == "numbers-of-blocks":
        kept = json.loads((published / "fusegpt.json").read_text())["kept"]
        assert config["full_attn_idxs"] == [n for n, old in enumerate(kept) if old in (1, 4)]
    if name == "other-names-in-the-file":
        stored = load_file(published / "model.safetensors")
        assert "transformer.h.2.attn.attention.k_proj.weight" in stored
    if name == "by-number":
        kept = json.loads((published / "fusegpt.json").read_text())["kept"]
        assert config["layer_notes"] == {str(n): f"once {old}" for n, old in enumerate(kept)}
    if name == "tokens":
        assert config["eos_token_id"] == [2, 3, 4, 5, 6]
