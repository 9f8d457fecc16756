"""Tiny random models that see, and samples with images as their processors would give them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers as tf
from models import DEPTH, GROUPED, SLIDING, VOCAB, llava, randomize

from fusegpt_ray.samples import PADDING, InMemoryInputs, Samples

IMAGE = VOCAB - 1
"""The placeholder; the three tokens before it belong to images, too."""
BLOCKS, NORM = "model.language_model.layers", "model.language_model.norm"
FIRST, PATCHES = 2, 4
"""Where an image's placeholders begin, and how many there are."""
ANSWER = 6
"""Tokens at a sample's end."""
SHORTER = 3
"""By how many tokens a sample is shorter than the one before."""

_TOKENS = {
    "image_token_id": IMAGE,
    "vision_start_token_id": IMAGE - 1,
    "vision_end_token_id": IMAGE - 2,
    "video_token_id": IMAGE - 3,
}


def _qwen2_vl() -> tf.PretrainedConfig:
    vision = {
        "depth": 2,
        "embed_dim": 16,
        "num_heads": 2,
        "hidden_size": 32,
        "patch_size": 2,
        "spatial_merge_size": 2,
        "temporal_patch_size": 1,
        "mlp_ratio": 2,
    }
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    text = tf.Qwen2VLTextConfig(**GROUPED, rope_parameters=rope, tie_word_embeddings=False)
    return tf.Qwen2VLConfig(
        text_config=text.to_dict(),
        vision_config=vision,
        **_TOKENS,
    )


def _qwen2_5_vl() -> tf.PretrainedConfig:
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": 2,
        "spatial_merge_size": 2,
        "temporal_patch_size": 1,
        "window_size": 4,
        "fullatt_block_indexes": [1],
    }
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    text = tf.Qwen2_5_VLTextConfig(**GROUPED, rope_parameters=rope, tie_word_embeddings=False)
    return tf.Qwen2_5_VLConfig(text_config=text.to_dict(), vision_config=vision, **_TOKENS)


def _qwen3_vl() -> tf.PretrainedConfig:
    vision = {
        "depth": 3,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": 2,
        "spatial_merge_size": 2,
        "temporal_patch_size": 1,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    }
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
    text = tf.Qwen3VLTextConfig(
        **GROUPED, head_dim=8, rope_parameters=rope, tie_word_embeddings=False
    )
    return tf.Qwen3VLConfig(text_config=text.to_dict(), vision_config=vision, **_TOKENS)


def _siglip(patch_size: int) -> dict[str, Any]:
    return tf.SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=patch_size,
        projection_dim=32,
    ).to_dict()


def _gemma3() -> tf.PretrainedConfig:
    kinds = [("full" if i % 2 else "sliding") + "_attention" for i in range(DEPTH)]
    text = tf.Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=SLIDING, layer_types=kinds)
    return tf.Gemma3Config(
        text_config=text.to_dict(),
        vision_config=_siglip(2),
        mm_tokens_per_image=PATCHES,
        image_token_index=IMAGE,
        boi_token_index=IMAGE - 1,
        eoi_token_index=IMAGE - 2,
    )


def _paligemma() -> tf.PretrainedConfig:
    text = tf.GemmaConfig(**GROUPED, head_dim=8)
    return tf.PaliGemmaConfig(
        text_config=text.to_dict(),
        vision_config=_siglip(4),
        image_token_index=IMAGE,
        projection_dim=32,
    )


def _square(draw: np.random.Generator, kinds_1n: np.ndarray) -> dict[str, np.ndarray]:
    return {"pixel_values": draw.normal(size=(1, 3, 8, 8)).astype(np.float32)}


def _patches(draw: np.random.Generator, kinds_1n: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "pixel_values": draw.normal(size=(16, 12)).astype(np.float32),
        "image_grid_thw": np.array([[1, 4, 4]]),
        "mm_token_type_ids": kinds_1n,
    }


def _with_kinds(draw: np.random.Generator, kinds_1n: np.ndarray) -> dict[str, np.ndarray]:
    return {**_square(draw, kinds_1n), "token_type_ids": kinds_1n}


def _with_prefix(draw: np.random.Generator, kinds_1n: np.ndarray) -> dict[str, np.ndarray]:
    """All but the answer attends in both directions."""
    suffix_1n = np.arange(kinds_1n.shape[1])[None] >= kinds_1n.shape[1] - ANSWER
    return {**_square(draw, kinds_1n), "token_type_ids": suffix_1n.astype(np.int64)}


class Seeing(NamedTuple):
    config: Callable[[], tf.PretrainedConfig]
    inputs: Callable[[np.random.Generator, np.ndarray], dict[str, np.ndarray]]


SEEING = {
    "llava": Seeing(llava, _square),
    "qwen2_vl": Seeing(_qwen2_vl, _patches),
    "qwen2_5_vl": Seeing(_qwen2_5_vl, _patches),
    "qwen3_vl": Seeing(_qwen3_vl, _patches),
    "gemma3": Seeing(_gemma3, _with_kinds),
    "paligemma": Seeing(_paligemma, _with_prefix),
}

ADDING = {"qwen3_vl": 2}
"""Behind how many of the first blocks, whichever these are, a class adds what it sees."""


def save_seeing(name: str, folder: Path) -> Path:
    torch.manual_seed(len(name))
    config = SEEING[name].config()
    model = tf.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    randomize(model)
    model.save_pretrained(folder)
    return folder


def load_seeing(folder: Path) -> Any:
    """The real model, by from_pretrained."""
    auto = tf.AutoModelForImageTextToText
    return auto.from_pretrained(folder, dtype=torch.float32).eval()


def samples(name: str, count: int = 4, length: int = 22, seed: int = 0) -> Samples:
    """One image each, among random tokens; each shorter than the one before."""
    draw = np.random.default_rng(seed)
    tokens_WT = np.full((count, length), PADDING)
    images_WT, targets_WT = (np.zeros((count, length), dtype=bool) for _ in range(2))
    inputs = []
    for row in range(count):
        n = length - SHORTER * row
        tokens_WT[row, :n] = draw.integers(3, IMAGE - 3, n)
        images_WT[row, FIRST : FIRST + PATCHES] = True
        tokens_WT[row, images_WT[row]] = IMAGE
        targets_WT[row, n - ANSWER : n] = True
        kinds_1n = images_WT[row : row + 1, :n].astype(np.int64)
        inputs.append(InMemoryInputs(SEEING[name].inputs(draw, kinds_1n)))
    return Samples(tokens_WT, targets_WT, images_WT, tuple(inputs))


@torch.no_grad()
def passes(model: Any, given: Samples) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What enters the final norm, [n, D], and the logits, [n, V], of each sample alone."""
    found: list[torch.Tensor] = []

    def keep(_: torch.nn.Module, args: tuple[Any, ...]) -> None:
        found.append(args[0][0])

    hook = model.get_submodule(NORM).register_forward_pre_hook(keep)
    logits = []
    for ids_T, inputs in zip(given.tokens_WT, given.inputs, strict=True):
        ids = torch.tensor(ids_T[ids_T != PADDING])[None]
        tensors = {key: torch.tensor(value) for key, value in inputs.load().items()}
        logits.append(model(input_ids=ids, use_cache=False, **tensors).logits[0])
    hook.remove()
    return list(zip(found, logits, strict=True))
