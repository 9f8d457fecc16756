"""Questions about an image, which two models answer, and the image as a report shows it."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from fusegpt_ray.recipe.output_section import ImagePrompt
from fusegpt_ray.recipe.text_sections import Text
from fusegpt_ray.samples import Inputs
from fusegpt_ray.text.conversations import (
    Conversation,
    Image,
    conversation_sources,
    conversations,
)
from fusegpt_ray.text.images import Processing, opened

SIDE = 256
"""Pixels of a thumbnail's longer side, at most."""
_BYTES = 15_000
"""Of a thumbnail's file, at most: in base64, a third more."""
_LOOKED_AT = 100
"""Conversations of a text among which one that begins with a question about one image is found."""


@dataclass(frozen=True)
class Picture:
    """An image in a manifest: small, and without the place where it lies."""

    name: str
    sha256: str
    """Of its file."""
    thumbnail: str
    """A data URI."""


@dataclass(frozen=True)
class Question:
    """A prompt about an image, as the model's processor makes it, up to where an answer begins."""

    prompt: str
    picture: Picture
    tokens: list[int]
    inputs: Inputs

    def told(self) -> dict[str, Any]:
        """For the manifest."""
        return {"prompt": self.prompt, "image": asdict(self.picture)}


def asked_about(sample: ImagePrompt, processing: Processing) -> Question:
    """What a recipe asks.

    Raises:
        UserError: see `Processing.question`.
    """
    content = [{"type": "image"}, {"type": "text", "text": sample.prompt}]
    turns = [{"role": "user", "content": content}]
    return _question(Conversation(sample.image, turns, (sample.image,)), processing)


def found_in(text: Text, processing: Processing, count: int) -> list[Question]:
    """The first questions of a text that are about one image each.

    Raises:
        UserError: the text cannot be read, or its images cannot; see `Processing.question`.
    """
    sources = conversation_sources(text, processing.key)
    every = (found for source in sources for found in conversations(source))
    asking = (begin for found in islice(every, _LOOKED_AT) if (begin := _beginning(found)))
    return [_question(begin, processing) for begin in islice(asking, count)]


def _beginning(found: Conversation) -> Conversation | None:
    """A conversation up to its first answer, if one image and some text stand there."""
    roles = [turn["role"] for turn in found.messages]
    turns = found.messages[: roles.index("assistant")]
    images = sum(part["type"] == "image" for turn in turns for part in turn["content"])
    if images != 1 or not _prompt(turns):
        return None
    return Conversation(found.where, turns, found.images[:1])


def _prompt(turns: list[dict[str, Any]]) -> str:
    """What the user says."""
    parts = (part for turn in turns if turn["role"] == "user" for part in turn["content"])
    return "\n".join(part["text"] for part in parts if part["type"] == "text").strip()


def _question(asking: Conversation, processing: Processing) -> Question:
    (image,) = asking.images
    data, pixels = opened(image, asking.where, processing.key)
    sample = processing.question(asking)
    name = _name(image, asking.where)
    picture = Picture(name, hashlib.sha256(data).hexdigest(), thumbnail(pixels))
    return Question(_prompt(asking.messages), picture, sample.tokens_n.tolist(), sample.inputs)


def _name(image: Image, where: str) -> str:
    """A file's own name, without its folders; of bytes, the row that holds them."""
    if isinstance(image, str):
        path = re.split(r"[?#]", image)[0] if "://" in image else image
        return path.rstrip("/").rpartition("/")[2][-100:]
    row, _, uri = where.partition(" of ")
    return f"{row} of {uri.rpartition('/')[2]}"[:100]


def thumbnail(pixels: Any) -> str:
    """A small image as a data URI: PNG if its file is small, else JPEG, as good as is small."""
    small = pixels.copy()
    small.thumbnail((SIDE, SIDE))
    kind, data = next(file for file in _files(small) if len(file[1]) <= _BYTES)
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _files(small: Any) -> Iterator[tuple[str, bytes]]:
    """Ever smaller ones."""
    yield "png", _saved(small, "PNG", optimize=True)
    while True:
        for quality in (85, 70, 50, 30):
            yield "jpeg", _saved(small, "JPEG", quality=quality)
        small = small.reduce(2)


def _saved(small: Any, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    small.save(file, kind, **options)
    return file.getvalue()
