"""A text of conversations with images, of which samples are drawn.

Which are drawn follows from the seed and their places in the text. Rows are read again for each set
of places, so that only what is drawn is ever held.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from fusegpt_ray.errors import UserError
from fusegpt_ray.recipe.text_sections import Text
from fusegpt_ray.samples import Samples
from fusegpt_ray.text.conversations import (
    conversation_sources,
    conversations,
    picked,
    shuffled,
)
from fusegpt_ray.text.images import Processing, Sample

Make = Callable[[Sequence[int]], Iterator[Sample | None]]
"""Samples of the conversations at these places of the text, which ascend; None: too long."""


@dataclass(frozen=True)
class Album:
    """A text of conversations with images."""

    there: int
    """How many it has."""
    make: Make
    processing: Processing

    def begins(self, samples: Samples) -> bool:
        """Whether each begins with the beginning-of-sequence token."""
        token = self.processing.processor.tokenizer.bos_token_id
        return bool((samples.tokens_WT[:, 0] == token).all())

    def drawn(self, limit: int | None, seed: int | None = None) -> tuple[Samples, int]:
        """The first `limit` conversations (None: all) that are no longer than a window, in an order
        of chance if there is a `seed`; and how many longer ones stand before the last of them.

        Raises:
            UserError: there is no conversation, all are longer, or one cannot be processed.
        """
        if not self.there:
            problem, fix = "there are no rows", "give conversations with images"
            raise UserError(self.processing.key, None, problem, fix)
        order = range(self.there) if seed is None else shuffled(self.there, seed)
        wanted = self.there if limit is None else limit
        taken: list[Sample | None] = []
        fitting = 0
        while fitting < wanted and len(taken) < self.there:
            places = order[len(taken) :][: _asked(wanted - fitting, fitting, len(taken))]
            ascending = sorted(places)
            made = dict(zip(ascending, self.make(ascending), strict=True))
            taken += [made[place] for place in places]
            fitting = sum(sample is not None for sample in taken)
        samples, left_out = _first(taken, wanted)
        if not samples:
            length, key = self.processing.length, self.processing.length_key
            problem = f"all {self.there} conversations are longer than {length} tokens"
            fix = "raise the length, or give shorter conversations or smaller images"
            raise UserError(key, length, problem, fix)
        return self.processing.assembled(samples), left_out


def album(text: Text, processing: Processing) -> Album:
    """Read and processed in this process, one conversation at a time.

    Raises:
        UserError: see `conversations`.
    """
    found = conversation_sources(text, processing.key)

    def make(places: Sequence[int]) -> Iterator[Sample | None]:
        rows = chain.from_iterable(map(conversations, found))
        return map(processing.sample, picked(rows, places))

    return Album(sum(1 for source in found for _ in conversations(source)), make, processing)


def _asked(missing: int, fitting: int, taken: int) -> int:
    """How many more to look at, where so many of those taken fit: about those that will do, and no
    more than there have been.
    """
    return missing if not taken else min(math.ceil(missing * taken / max(1, fitting)), taken)


def _first(taken: Sequence[Sample | None], wanted: int) -> tuple[list[Sample], int]:
    samples: list[Sample] = []
    for number, sample in enumerate(taken):
        if len(samples) == wanted:
            return samples, number - wanted
        if sample is not None:
            samples.append(sample)
    return samples, len(taken) - len(samples)
