"""Conversations with images into samples, by the model's own processor and chat template.

Notable:
- special tokens are those of the chat template, and else those that the tokenizer puts there;
- the answers' tokens are found by what the processor makes of the conversation up to an answer and
  to its end: they stand between the places where these part from the whole. The same images are
  processed once for all of this.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from fusegpt_ray.errors import UserError, reading_users_file
from fusegpt_ray.samples import PADDING, InMemoryInputs, Inputs, Samples
from fusegpt_ray.store import storage
from fusegpt_ray.text.conversations import Conversation, Image

_MOST = 100_000_000
"""Bytes of the largest image file."""
_NOT_GIVEN = ("input_ids", "attention_mask", "labels")
"""What processors make, and a walk of a single sample needs no more."""


class Sample(NamedTuple):
    """One conversation."""

    tokens_n: np.ndarray
    """int64 [n]."""
    targets_n: np.ndarray
    """bool [n]: the tokens of answers."""
    inputs: Inputs


def check_pillow(key: str) -> None:
    """
    Raises:
        UserError: the package that opens images is not installed.
    """
    if find_spec("PIL") is None:
        problem = "images are opened by pillow, which is not installed"
        raise UserError(key, True, problem, "pip install 'fusegpt-ray[vision]'")


class Processing:
    """Makes samples for one model."""

    def __init__(
        self, processor: Any, image_token: int, length: int, key: str, length_key: str
    ) -> None:
        """
        Args:
            key, length_key: of the text's data, and of `length`.
        """
        self.processor, self.image_token = copy.copy(processor), image_token
        self.processor.image_processor = _Once(processor.image_processor)
        self.length, self.key, self.length_key = length, key, length_key

    def assembled(self, made: Sequence[Sample]) -> Samples:
        """Padded to the length."""
        tokens_WT = np.full((len(made), self.length), PADDING, dtype=np.int64)
        targets_WT = np.zeros(tokens_WT.shape, dtype=bool)
        for row, sample in enumerate(made):
            tokens_WT[row, : len(sample.tokens_n)] = sample.tokens_n
            targets_WT[row, : len(sample.targets_n)] = sample.targets_n
        images_WT = tokens_WT == self.image_token
        return Samples(tokens_WT, targets_WT, images_WT, tuple(sample.inputs for sample in made))

    def sample(self, conversation: Conversation) -> Sample | None:
        """None if it is longer than `length`.

        Raises:
            UserError: an image is missing or none, or the processor refuses the conversation.
        """
        messages = conversation.messages
        self.processor.image_processor.forget()
        images = self._opened(conversation)
        whole = self._processed(conversation, messages, images)
        tokens_n = whole["input_ids"][0].astype(np.int64)
        if len(tokens_n) > self.length:
            return None
        targets_n = np.zeros(len(tokens_n), dtype=bool)
        for number, turn in enumerate(messages):
            if turn["role"] == "assistant":
                begin = self._upto(tokens_n, conversation, messages[:number], images, True)
                end = self._upto(tokens_n, conversation, messages[: number + 1], images, False)
                targets_n[begin:end] = True
        targets_n &= tokens_n != self.image_token
        return Sample(tokens_n, targets_n, _inputs(whole))

    def question(self, conversation: Conversation) -> Sample:
        """Of messages that nobody answers: up to where the answer begins.

        Raises:
            UserError: as `sample`; or it is longer than `length`.
        """
        self.processor.image_processor.forget()
        images = self._opened(conversation)
        made = self._processed(conversation, conversation.messages, images, asks=True)
        tokens_n = made["input_ids"][0].astype(np.int64)
        if len(tokens_n) > self.length:
            problem = f"{len(tokens_n)} tokens with its image, of which the model takes"
            problem += f" {self.length} and an answer"
            fix = "use a smaller image or a shorter prompt"
            raise UserError(self.key, conversation.where, problem, fix)
        return Sample(tokens_n, np.zeros(len(tokens_n), dtype=bool), _inputs(made))

    def _upto(
        self,
        tokens_n: np.ndarray,
        conversation: Conversation,
        messages: list[dict[str, Any]],
        images: Sequence[Any],
        asks: bool,
    ) -> int:
        """How many tokens the whole begins with that these first messages have as well."""
        if len(messages) == len(conversation.messages):
            return len(tokens_n)
        places = sum(part["type"] == "image" for turn in messages for part in turn["content"])
        part = self._processed(conversation, messages, images[:places], asks)
        ids = part["input_ids"][0][: len(tokens_n)]
        same = ids == tokens_n[: len(ids)]
        return int(len(same) if same.all() else same.argmin())

    def _processed(
        self,
        conversation: Conversation,
        messages: list[dict[str, Any]],
        images: Sequence[Any],
        asks: bool = False,
    ) -> Mapping[str, np.ndarray]:
        """What the processor makes of them; `asks`: up to where an answer begins."""
        try:
            text = self.processor.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=asks
            )
            bos = self.processor.tokenizer.bos_token
            special = not (bos and text.startswith(bos))
            made: Mapping[str, np.ndarray] = self.processor(
                text=[text],
                images=list(images) or None,
                return_tensors="np",
                add_special_tokens=special,
            )
        except Exception as error:  # whatever a template or a processor raises is its word on this
            problem = f"the model's processor refuses {conversation.where} ({error})"
            fix = "give conversations as the model was trained on, with as many images as it takes"
            raise UserError(self.key, conversation.where, problem, fix) from error
        return made

    def _opened(self, conversation: Conversation) -> list[Any]:
        where, key = conversation.where, self.key
        return [opened(image, where, key)[1] for image in conversation.images]


def opened(image: Image, where: str, key: str) -> tuple[bytes, Any]:
    """An image's file and its pixels, upright as its EXIF data say, as transformers opens it.

    Args:
        where: for messages.

    Raises:
        UserError: it is missing, or none.
    """
    from PIL import Image as Pillow
    from PIL import ImageOps, UnidentifiedImageError

    name = image if isinstance(image, str) else "bytes"
    problem = "it cannot be read" if name == where else f"an image of {where} cannot be read"
    with reading_users_file(key, name, problem, "check the path and the file"):
        data = storage.read(image, _MOST) if isinstance(image, str) else image
        try:
            upright = ImageOps.exif_transpose(Pillow.open(io.BytesIO(data)))
            return data, upright.convert("RGB")
        except UnidentifiedImageError as error:  # which names our copy in memory
            raise ValueError(f"its {len(data)} bytes are no image that pillow knows") from error


def _inputs(made: Mapping[str, np.ndarray]) -> InMemoryInputs:
    return InMemoryInputs(
        {name: np.asarray(value) for name, value in made.items() if name not in _NOT_GIVEN}
    )


class _Once:
    """An image processor that keeps what it has made of a conversation's images, until it is told
    to forget.
    """

    def __init__(self, real: Any) -> None:
        self.real = real
        self.made: dict[tuple[int, ...], tuple[Any, Any]] = {}

    def forget(self) -> None:
        """Before other images."""
        self.made.clear()

    def __call__(self, images: Any, **options: Any) -> Any:
        which = tuple(map(id, _flat(images)))
        if which not in self.made:
            # The images are kept, too: else their numbers could become those of others.
            self.made[which] = (images, self.real(images, **options))
        return copy.copy(self.made[which][1])  # processors take parts out of it

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked for while it is copied or unpickled, without `real`
            raise AttributeError(name)
        return getattr(self.real, name)


def _flat(images: Any) -> Iterator[Any]:
    if isinstance(images, list | tuple):
        for image in images:
            yield from _flat(image)
    else:
        yield images
