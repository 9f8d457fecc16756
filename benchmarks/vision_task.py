"""A task that asks for seeing: pictures of one to four equal shapes of a colour, and questions
about them. With a tokenizer and processors for a LLaVA and a Qwen2-VL that learn it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import transformers as tf
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPImageProcessorPil, LlavaProcessor

from fusegpt_ray.model.processors import load_processor

SIDE, CELL, PATCH = 32, 16, 8
"""Pixels of a picture, of a shape's place in it, and of what the vision tower cuts."""
COLOURS = {"red": (220, 40, 40), "green": (40, 190, 60), "blue": (50, 80, 230), "grey": (120,) * 3}
FORMS = ("circle", "square", "triangle", "bar")
NUMBERS = ("one", "two", "three", "four")
QUESTIONS = {"colour": "what colour", "form": "what form", "number": "how many"}
BOS, EOS, PLACE = "<s>", "</s>", "<image>"
VOCABULARY = [
    *("<unk>", BOS, EOS, PLACE, "user", "assistant", ":"),
    *sorted({word for question in QUESTIONS.values() for word in question.split()}),
    *(*COLOURS, *FORMS, *NUMBERS),
]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %} {{ message.role }} :"
    "{% if message.content is string %} {{ message.content }}{% else %}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %} <image>{% else %} {{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message.role == 'assistant' %} {{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} assistant :{% endif %}"
)


def _tokenizer(**more: Any) -> tf.PreTrainedTokenizerFast:
    """Words are tokens."""
    ids = {name: number for number, name in enumerate(VOCABULARY)}
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.decoder = decoders.Fuse()
    special = {"unk_token": "<unk>", "bos_token": BOS, "eos_token": EOS, "pad_token": EOS}
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=words, additional_special_tokens=[PLACE], **special, **more
    )


def llava_processor() -> LlavaProcessor:
    """A picture is as many tokens as it has patches."""
    size = {"height": SIDE, "width": SIDE}
    return LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size),
        _tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def qwen2_vl_processor() -> Any:
    """As many tokens a picture as LLaVA's: of four patches, each half as wide, one is made."""
    size = {"shortest_edge": SIDE**2, "longest_edge": SIDE**2}
    patches = {"patch_size": PATCH // 2, "merge_size": 2, "temporal_patch_size": 1, "size": size}
    names = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor"}
    with tempfile.TemporaryDirectory() as folder:
        _tokenizer(extra_special_tokens={"image_token": PLACE}).save_pretrained(folder)
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(patches | names))
        (Path(folder) / "chat_template.jinja").write_text(TEMPLATE)
        return load_processor(folder, local_files_only=True)


def samples(count: int, seed: int) -> list[tuple[Image.Image, list[tuple[str, str]]]]:
    """Pictures with all questions about them, in an order of chance, and their answers."""
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        colour, form = draw.choice([*COLOURS]), draw.choice(FORMS)
        number = int(draw.integers(1, len(NUMBERS) + 1))
        answers = {"colour": str(colour), "form": str(form), "number": NUMBERS[number - 1]}
        turns = [(QUESTIONS[about], answers[about]) for about in draw.permutation([*QUESTIONS])]
        places = [int(place) for place in draw.permutation(4)[:number]]
        found.append((_picture(str(form), COLOURS[str(colour)], places, draw), turns))
    return found


def _picture(
    form: str, colour: Sequence[int], places: Sequence[int], draw: np.random.Generator
) -> Image.Image:
    shade = tuple(int(value) for value in draw.integers(225, 256, 3))
    picture = Image.new("RGB", (SIDE, SIDE), shade)
    pen = ImageDraw.Draw(picture)
    for place in places:
        x, y = CELL * (place % 2) + draw.integers(1, 4), CELL * (place // 2) + 2
        wide = int(draw.integers(8, 12))
        box = [int(x), int(y), int(x) + wide, int(y) + wide]
        fill = tuple(colour)
        if form == "circle":
            pen.ellipse(box, fill)
        elif form == "square":
            pen.rectangle(box, fill)
        elif form == "bar":
            pen.rectangle([box[0], box[1] + wide // 2 - 2, box[2], box[1] + wide // 2 + 1], fill)
        else:
            pen.polygon(
                [(box[0], box[3]), (box[2], box[3]), ((box[0] + box[2]) // 2, box[1])], fill
            )
    return picture


def messages(turns: Sequence[tuple[str, str]], seen: bool) -> list[dict[str, Any]]:
    """A conversation in transformers' layout; the first question comes with the picture."""
    told: list[dict[str, Any]] = []
    for number, (question, answer) in enumerate(turns):
        image = [{"type": "image"}] if seen and number == 0 else []
        told.append({"role": "user", "content": [*image, {"type": "text", "text": question}]})
        told.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return told


def write(folder: Path, count: int, seed: int) -> tuple[Path, Path]:
    """Conversations with pictures, and the same without them."""
    folder.mkdir(parents=True)
    seen, told = folder / "seen.jsonl", folder / "told.jsonl"
    with seen.open("w") as with_pictures, told.open("w") as without:
        for number, (picture, turns) in enumerate(samples(count, seed)):
            picture.save(folder / f"{number}.png")
            row = {"messages": messages(turns, seen=True), "images": [f"{number}.png"]}
            with_pictures.write(json.dumps(row) + "\n")
            plain = [
                {"role": role, "content": text}
                for question, answer in turns
                for role, text in (("user", question), ("assistant", answer))
            ]
            without.write(json.dumps({"messages": plain}) + "\n")
    return seen, told
