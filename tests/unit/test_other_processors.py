"""Whole runs on images with the real processors of more classes: tiles of one picture (LLaVA-NeXT,
LLaVA-OneVision, Idefics3), marks around it (Gemma 3, InternVL), and a prefix that attends in both
directions (PaliGemma).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from albums import PLACE, TEMPLATE, _tokenizer, album
from models import DEPTH, GROUPED, SLIDING, VOCAB, randomize
from pictures import IMAGE, load_seeing
from PIL import Image
from test_runs_on_images import asked

from fusegpt_ray.model.processors import load_processor
from fusegpt_ray.pipeline import compress
from fusegpt_ray.recipe.recipe import Recipe

LENGTH = 120
TILES = [[8, 16], [16, 8], [16, 16]]
SQUARE = {"height": 8, "width": 8}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
Made = tuple[tf.PretrainedConfig, Any, dict[str, Any], str]
"""Configuration, image processor, what else stands in processor_config.json, chat template."""


def _clip(patch_size: int) -> tf.CLIPVisionConfig:
    return tf.CLIPVisionConfig(**VISION, image_size=8, patch_size=patch_size)


def _siglip(patch_size: int) -> tf.SiglipVisionConfig:
    return tf.SiglipVisionConfig(**VISION, image_size=8, patch_size=patch_size)


def llava_next() -> Made:
    text = tf.LlamaConfig(**GROUPED)
    config = tf.LlavaNextConfig(
        vision_config=_clip(4),
        text_config=text,
        image_token_index=IMAGE,
        image_grid_pinpoints=TILES,
    )
    images = tf.LlavaNextImageProcessorPil(
        size={"shortest_edge": 8}, crop_size=SQUARE, image_grid_pinpoints=TILES
    )
    more = {"patch_size": 4, "vision_feature_select_strategy": "default"}
    return config, images, more | {"num_additional_image_tokens": 1}, TEMPLATE


def llava_onevision() -> Made:
    config = tf.LlavaOnevisionConfig(
        vision_config=_siglip(4),
        text_config=tf.Qwen2Config(**GROUPED),
        image_token_index=IMAGE,
        video_token_index=IMAGE - 3,
        image_grid_pinpoints=TILES,
        vision_feature_layer=-1,
    )
    images = tf.LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=TILES)
    more = {"num_image_tokens": 4, "vision_feature_select_strategy": "full"}
    return config, images, more, TEMPLATE


def idefics3() -> Made:
    """Its processor adds words to the tokenizer."""
    config = tf.Idefics3Config(
        vision_config={**VISION, "image_size": 8, "patch_size": 2},
        text_config=tf.LlamaConfig(**GROUPED | {"vocab_size": VOCAB + 8}),
        image_token_id=IMAGE,
        scale_factor=2,
    )
    images = tf.Idefics3ImageProcessorPil(
        size={"longest_edge": 16}, max_image_size={"longest_edge": 8}
    )
    return config, images, {"image_seq_len": 4}, TEMPLATE


def gemma3() -> Made:
    kinds = [("full" if i % 2 else "sliding") + "_attention" for i in range(DEPTH)]
    text = tf.Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=SLIDING, layer_types=kinds)
    config = tf.Gemma3Config(
        text_config=text,
        vision_config=_siglip(2),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=IMAGE - 1,
        eoi_token_index=IMAGE - 2,
    )
    images = tf.Gemma3ImageProcessorPil(size=SQUARE)
    return config, images, {"image_seq_length": 4}, TEMPLATE.replace("<image>", MARKS["boi_token"])


def internvl() -> Made:
    config = tf.InternVLConfig(
        vision_config={**VISION, "image_size": [8, 8], "patch_size": [2, 2]},
        text_config=tf.Qwen2Config(**GROUPED),
        image_token_id=IMAGE,
        downsample_ratio=0.5,
    )
    images = tf.GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=False)
    return config, images, {"image_seq_length": 4}, TEMPLATE


def paligemma() -> Made:
    config = tf.PaliGemmaConfig(
        text_config=tf.GemmaConfig(**GROUPED, head_dim=8),
        vision_config=_siglip(4),
        image_token_index=IMAGE,
        projection_dim=32,
    )
    images = tf.SiglipImageProcessorPil(size=SQUARE, image_seq_length=4)
    return config, images, {}, TEMPLATE


MARKS = {
    "boi_token": "w20",
    "eoi_token": "w21",
    "start_image_token": "w20",
    "end_image_token": "w21",
    "fake_image_token": "w20",
    "global_image_token": "w22",
    "image_boundary_token": "w20",
    "video_token": "w23",
}
"""What other processors put around an image's places, all of them words that are there."""
MODELS: dict[str, tuple[Callable[[], Made], str]] = {
    "llava_next": (llava_next, "LlavaNextProcessor"),
    "llava_onevision": (llava_onevision, "LlavaOnevisionProcessor"),
    "idefics3": (idefics3, "Idefics3Processor"),
    "gemma3": (gemma3, "Gemma3Processor"),
    "internvl": (internvl, "InternVLProcessor"),
    "paligemma": (paligemma, "PaliGemmaProcessor"),
}


def save(name: str, folder: Path) -> Path:
    """With the processor's files as published checkpoints have them."""
    make, processor_class = MODELS[name]
    config, images, more, template = make()
    config.text_config.max_position_embeddings = 2 * LENGTH
    torch.manual_seed(1)
    model = tf.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    randomize(model)
    model.save_pretrained(folder)
    marks = MARKS | {"image_token": PLACE, "context_image_token": PLACE}
    tokenizer = _tokenizer(extra_special_tokens=marks)
    assert len(tokenizer) <= VOCAB
    tokenizer.save_pretrained(folder)
    images.save_pretrained(folder)
    more = more | {"processor_class": processor_class}
    (folder / "processor_config.json").write_text(json.dumps(more))
    (folder / "chat_template.jinja").write_text(template)
    return folder


@torch.no_grad()
def answers_perplexity(model: Path, folder: Path) -> float:
    """Of the words behind each "assistant :" up to the end of the sentence, by plain transformers
    and the model's own processor."""
    plain, total, count = load_seeing(model), 0.0, 0
    processor = load_processor(str(model), local_files_only=True)
    roles = {"human": "user", "gpt": "assistant"}
    for row in album(folder, 5, seed=1):
        turns = [
            {
                "role": roles[turn["from"]],
                "content": [{"type": "image"}] * ("<image>" in turn["value"])
                + [{"type": "text", "text": turn["value"].removeprefix("<image>\n")}],
            }
            for turn in row["conversations"]
        ]
        text = processor.apply_chat_template(turns, tokenize=False)
        image = Image.open(folder / row["image"]).convert("RGB")
        given = {"return_tensors": "pt", "add_special_tokens": False}
        made = dict(processor(text=[text], images=[image], **given))
        made.pop("labels", None)
        log_p = plain(**made).logits[0].double().log_softmax(-1)
        ids = made["input_ids"][0]
        said = processor.tokenizer.convert_ids_to_tokens(ids)
        for begin in (i + 2 for i in range(len(said)) if said[i : i + 2] == ["assistant", ":"]):
            for place in range(begin, said.index("</s>", begin) + 1):
                total -= log_p[place - 1, ids[place]].item()
                count += 1
    return math.exp(total / count)


@pytest.mark.parametrize("name", MODELS)
def test_a_run_on_images(name: str, tmp_path: Path) -> None:
    """The perplexities of the dense and of the published model are those of plain transformers."""
    model = save(name, tmp_path / "model")
    given = asked(model, tmp_path, sparsity=0.4)
    given["calibration"]["length"] = LENGTH
    (published,) = compress(Recipe.parse(given))
    row = published.manifest["perplexity"]["chats"]
    held = tmp_path / "held"
    assert row["dense"] == pytest.approx(answers_perplexity(model, held), rel=1e-4)
    found = answers_perplexity(Path(published.uri), held)
    assert row["dropped"] == pytest.approx(found, rel=1e-4)
    assert row["dropped"] != pytest.approx(row["dense"], rel=1e-2)
