"""Conversations with images into samples, by the model's own processor and chat template.

Notable:
- special tokens are those of the chat template, and else those that the tokenizer puts there;
- the answers' tokens are found by what the processor makes of the conversation up to an answer and
  to its end: they stand between the places where these part from the whole;
- images are opened in the driver, one conversation at a time.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from fusegpt_ray.errors import UserError, reading_users_file
from fusegpt_ray.samples import PADDING, Samples
from fusegpt_ray.store import storage
from fusegpt_ray.text.conversations import Conversation, Image

_MOST = 100_000_000
"""Bytes of the largest image file."""
_NOT_GIVEN = ("input_ids", "attention_mask")
"""What the processor makes, and a walk of a single sample needs no more."""


class Sample(NamedTuple):
    """One conversation."""

    tokens_n: np.ndarray
    """int64 [n]."""
    targets_n: np.ndarray
    """bool [n]: the tokens of answers."""
    inputs: Mapping[str, np.ndarray]
    """See `Samples.inputs`."""


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
        self.processor, self.image_token = processor, image_token
        self.length, self.key, self.length_key = length, key, length_key
        self.left_out = 0
        """Conversations so far that are longer than `length` tokens."""

    def samples(self, found: Sequence[Conversation], limit: int | None) -> Samples:
        """The first `limit` conversations (None: all) that are no longer than `length`, padded to
        it.

        Raises:
            UserError: all are longer, or one cannot be processed.
        """
        fitting = (sample for one in found if (sample := self.sample(one)) is not None)
        made = list(islice(fitting, limit))
        if not made:
            problem = f"all {len(found)} conversations are longer than {self.length} tokens"
            fix = "raise the length, or give shorter conversations or smaller images"
            raise UserError(self.length_key, self.length, problem, fix)
        tokens_WT = np.full((len(made), self.length), PADDING, dtype=np.int64)
        targets_WT = np.zeros(tokens_WT.shape, dtype=bool)
        for row, sample in enumerate(made):
            tokens_WT[row, : len(sample.tokens_n)] = sample.tokens_n
            targets_WT[row, : len(sample.targets_n)] = sample.targets_n
        images_WT = tokens_WT == self.image_token
        return Samples(tokens_WT, targets_WT, images_WT, tuple(sample.inputs for sample in made))

    def sample(self, conversation: Conversation) -> Sample | None:
        """None, and counted, if it is longer than `length`.

        Raises:
            UserError: an image is missing or none, or the processor refuses the conversation.
        """
        messages = conversation.messages
        images = [self._opened(image, conversation.where) for image in conversation.images]
        whole = self._processed(conversation, messages, images)
        tokens_n = whole["input_ids"][0].astype(np.int64)
        if len(tokens_n) > self.length:
            self.left_out += 1
            return None
        targets_n = np.zeros(len(tokens_n), dtype=bool)
        for number, turn in enumerate(messages):
            if turn["role"] == "assistant":
                begin = self._upto(tokens_n, conversation, messages[:number], images, True)
                end = self._upto(tokens_n, conversation, messages[: number + 1], images, False)
                targets_n[begin:end] = True
        targets_n &= tokens_n != self.image_token
        inputs = {name: np.asarray(value) for name, value in whole.items()}
        return Sample(
            tokens_n,
            targets_n,
            {name: value for name, value in inputs.items() if name not in _NOT_GIVEN},
        )

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

    def _opened(self, image: Image, where: str) -> Any:
        from PIL import Image as Pillow

        name = image if isinstance(image, str) else "bytes"
        problem = f"an image of {where} cannot be read"
        with reading_users_file(self.key, name, problem, "check the path and the file"):
            data = storage.read(image, _MOST) if isinstance(image, str) else image
            return Pillow.open(io.BytesIO(data)).convert("RGB")
