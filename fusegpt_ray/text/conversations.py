"""Conversations with images, as files have them, in one form: that of `messages`, each image named
by an absolute URI or held as bytes.

Two layouts are read, row by row: `messages` with parts of content, and LLaVA's `conversations` of
"human" and "gpt" (or "user" and "assistant"), in whose text `<image>` stands for an image.
"""

from __future__ import annotations

import base64
import os
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from fusegpt_ray.errors import UserError
from fusegpt_ray.recipe.text_sections import Text
from fusegpt_ray.store import storage
from fusegpt_ray.text.corpus import explained, sources
from fusegpt_ray.text.formats import Source
from fusegpt_ray.text.rows import objects

Image = str | bytes
"""A URI, or the bytes of a file."""
_PLACEHOLDER = "<image>"
_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_ROLES |= {role: role for role in _ROLES.values()}
_NAMES = ("image", "path", "url", "bytes")
"""Where a part of content may hold its image."""


@dataclass(frozen=True)
class Conversation:
    """Messages, whose images stand apart."""

    where: str
    """For messages, such as "line 5 of chats.jsonl"."""
    messages: list[dict[str, Any]]
    """Each {"role", "content"}, the latter a list of {"type": "text", "text"} and
    {"type": "image"}."""
    images: tuple[Image, ...]
    """In the order of their places."""


def conversation_sources(text: Text, key: str) -> list[Source]:
    """The files or the dataset that hold them.

    Raises:
        UserError: see `corpus.sources`; or the first row holds none.
    """
    if text.image_folder:  # other processes work in other folders
        text = text.model_copy(update={"image_folder": storage.absolute(text.image_folder)})
    return sources(text, key, _looked_at, column=False)


def conversations(source: Source) -> Iterator[Conversation]:
    """Of one source, in order; images are not opened.

    Raises:
        UserError: a row holds none.
    """
    folder = _folder(source)
    with explained(source.key, source.uri):
        for row, record in objects(source):
            where = f"{row} of {source.uri}"
            try:
                messages, images = _read(record)
                placed = tuple(_placed(image, folder) for image in images)
            except (KeyError, TypeError, ValueError) as error:
                columns = ", ".join(str(name)[:60] for name in islice(record, 20))
                problem = f"{where} is no conversation with images ({_said(error)}; its columns:"
                problem += f" {columns})"
                fix = (
                    "give rows of {image, conversations: [{from, value}]} or of {messages: [{role,"
                    " content: [{type: image, path}, {type: text, text}]}]}"
                )
                raise UserError(source.key, source.uri, problem, fix) from error
            yield Conversation(where, messages, placed)


def _folder(source: Source) -> str:
    """Where relative paths of images begin: that of the recipe; else a local folder that `datasets`
    reads, or that of the file. Nothing of a dataset of a hub.
    """
    if source.text.image_folder:
        return source.text.image_folder
    if source.format == "datasets":
        return source.uri if os.path.isdir(source.uri) else ""
    return source.uri.rpartition("/")[0]


def _looked_at(source: Source, _: int) -> Iterator[str]:
    return (item.where for item in conversations(source))


def picked(found: Iterable[Conversation], places: Sequence[int]) -> Iterator[Conversation]:
    """Those at these places, which ascend; no more is read than up to the last."""
    wanted, last = set(places), max(places, default=-1)
    for place, conversation in enumerate(islice(found, last + 1)):
        if place in wanted:
            yield conversation


def shuffled(there: int, seed: int) -> list[int]:
    """So many places in an order that follows from the seed and each place alone."""
    keys = [random.Random(f"{seed} {place}").random() for place in range(there)]
    return sorted(range(there), key=keys.__getitem__)


def _said(error: Exception) -> str:
    return f"it lacks {error}" if isinstance(error, KeyError) else str(error)


def _read(record: dict[str, Any]) -> tuple[list[dict[str, Any]], list[Any]]:
    """Messages and the images in them, of either layout."""
    beside = record.get("images") or record.get("image") or []
    beside = list(beside) if isinstance(beside, list) else [beside]
    turns = record.get("messages")
    if turns is None:
        turns = [
            {"role": _role(turn["from"]), "content": turn["value"]}
            for turn in record["conversations"]
        ]
    messages, images = [], []
    for turn in turns:
        parts, named = _parts(turn["content"], beside)
        messages.append({"role": turn["role"], "content": parts})
        images += named
    if beside:
        raise ValueError(f"{len(beside)} of its images have no place in its text")
    if not any(turn["role"] == "assistant" for turn in messages):
        raise ValueError("nobody answers in it")
    return messages, images


def _parts(content: Any, beside: list[Any]) -> tuple[list[dict[str, Any]], list[Any]]:
    """Parts of one message, and its images; those that it does not name are taken from
    `beside`.
    """
    if isinstance(content, str):
        pieces = re.split(rf"({_PLACEHOLDER})\n?", content)
        content = [
            {"type": "image"} if piece == _PLACEHOLDER else {"type": "text", "text": piece}
            for piece in pieces
            if piece.strip()
        ]
    parts, images = [], []
    for part in content:
        if part["type"] == "text":
            parts.append({"type": "text", "text": part["text"]})
            continue
        if part["type"] not in ("image", "image_url"):
            raise ValueError(f"a part of the type {part['type']!r} is neither text nor image")
        named = [part[name] for name in (*_NAMES, "image_url") if part.get(name)]
        if not named and not beside:
            raise ValueError("a place for an image is left without one")
        images.append(named[0] if named else beside.pop(0))
        parts.append({"type": "image"})
    return parts, images


def _placed(image: Any, folder: str) -> Image:
    """An image's bytes or absolute URI; `datasets` writes {"bytes", "path"}, others {"url"}."""
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path") or image["url"]
    if isinstance(image, bytes):
        return image
    if not isinstance(image, str):
        raise ValueError(f"an image is {image!r}, and neither a path nor bytes")
    if image.startswith("data:"):
        return base64.b64decode(image.partition(",")[2], validate=True)
    if "://" in image or image.startswith("/"):
        return image
    if not folder:
        raise ValueError(
            f"its image {image!r} is a path, of which a dataset does not say where it"
            " begins; image_folder may"
        )
    return storage.join(folder, image)


def _role(name: str) -> str:
    if name not in _ROLES:
        raise ValueError(f"it has a turn from {name!r}, which is none of {', '.join(_ROLES)}")
    return _ROLES[name]
