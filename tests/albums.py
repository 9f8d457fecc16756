"""Tiny models that see, with real processors and chat templates beside them, and conversations
about real image files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import transformers as tf
from models import VOCAB
from pictures import IMAGE, save_seeing
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPImageProcessorPil, LlavaProcessor

WORDS = ["user", ":", "assistant", "what", "is", "this", "red", "green", "blue", "big", "small"]
BOS, EOS, PLACE = "<s>", "</s>", "<image>"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.role }} :"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %} <image>{% else %} {{ part.text }}{% endif %}"
    "{% endfor %}"
    "{% if message.role == 'assistant' %} {{ eos_token }}{% endif %} "
    "{% endfor %}{% if add_generation_prompt %}assistant :{% endif %}"
)


def _tokenizer(**more: Any) -> tf.PreTrainedTokenizerFast:
    filled = [f"w{number}" for number in range(VOCAB - 4 - len(WORDS))]
    names = ["<unk>", BOS, EOS, *WORDS, *filled, PLACE]
    assert names.index(PLACE) == IMAGE
    ids = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    special = {"unk_token": "<unk>", "bos_token": BOS, "eos_token": EOS, "pad_token": EOS}
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=[PLACE], **special, **more
    )


def save_llava(folder: Path) -> Path:
    """With the processor's files."""
    save_seeing("llava", folder)
    size = {"height": 8, "width": 8}
    images = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size=size)
    processor = LlavaProcessor(
        images,
        _tokenizer(),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    processor.save_pretrained(folder)
    return folder


QWEN = {
    "qwen2_vl": "Qwen2VLProcessor",
    "qwen2_5_vl": "Qwen2_5_VLProcessor",
    "qwen3_vl": "Qwen3VLProcessor",
}


def save_qwen(name: str, folder: Path) -> Path:
    """With the processor's files as published checkpoints have them."""
    save_seeing(name, folder)
    _tokenizer(extra_special_tokens={"image_token": PLACE}).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    size = {"shortest_edge": 16, "longest_edge": 144}
    sizes = {"patch_size": 2, "merge_size": 2, "temporal_patch_size": 1, "size": size}
    names = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": QWEN[name]}
    (folder / "preprocessor_config.json").write_text(json.dumps(sizes | names))
    return folder


def paint(folder: Path, count: int, seed: int = 0) -> list[str]:
    """Image files of chance, of several sizes; their names."""
    draw = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{number}.png" for number in range(count)]
    for number, name in enumerate(names):
        pixels = draw.integers(0, 256, (9 + number % 3, 10, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return names


def album(folder: Path, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows in LLaVA's layout, of one or two answers, about images that are painted there."""
    draw = np.random.default_rng(seed)
    rows = []
    for name in paint(folder / "images", count, seed):
        answers = [" ".join(draw.choice(WORDS[6:], draw.integers(2, 5))) for _ in range(2)]
        turns = [
            {"from": "human", "value": "<image>\nwhat is this"},
            {"from": "gpt", "value": answers[0]},
            {"from": "human", "value": "is this big"},
            {"from": "gpt", "value": answers[1]},
        ]
        rows.append({"image": f"images/{name}", "conversations": turns[: draw.choice([2, 4])]})
    return rows


def write_lines(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
