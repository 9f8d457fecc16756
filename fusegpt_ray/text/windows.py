"""Windows of text, and the protocol that made them: it stands beside every number they gave."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from fusegpt_ray.recipe.sections import Evaluation
from fusegpt_ray.recipe.text_sections import GeneratedText, Text
from fusegpt_ray.samples import PADDING, Batch, lengths, tokens_of
from fusegpt_ray.text import documents
from fusegpt_ray.text.album import Album
from fusegpt_ray.text.calibration import (
    Stream,
    consecutive_windows,
    sample_windows,
    window_starts,
)

FARTHEST = 1 << 40
"""No text has so many tokens: places in a text of another number are farther away."""
OFTEN = 2.0
"""So often a token may be seen on average before a warning says that the text is short."""


@dataclass(frozen=True)
class Drawn:
    """What windows came from."""

    data: str
    """What the recipe calls the text."""
    text_tokens: int | None = None
    """Of the whole text, where windows were drawn from it at random and may overlap."""
    distinct: int | None = None
    """How many different windows there are, where they are cycled through."""
    documents: int | None = None
    """Of the whole text, where each window is one of them."""
    conversations: int | None = None
    """Of the whole text, where each window is one of them, with its images."""
    left_out: int = 0
    """Of the conversations looked at, those that are longer than a window."""
    cut: int = 0
    """Of the documents taken, those that were longer than a window."""
    generated: Mapping[str, Any] | None = None
    """Of a text that the dense model wrote: from which prompts, how, and how much."""
    bos_once: bool = False
    """Whether the beginning-of-sequence token stands before the whole text."""
    licence: str | None = None
    """See `text/licence.py`; None: nobody has looked."""

    @classmethod
    def of(cls, text: Text | GeneratedText, n_tokens: int, **facts: Any) -> Self:
        """`n_tokens`: of the whole text."""
        if isinstance(text, Text):
            return cls(text.label, **facts)
        prompts = text.prompts
        how = {
            "prompts": prompts.label if prompts else None,
            "tokens": n_tokens,
            "temperature": text.temperature,
            "top_p": text.top_p,
        }
        return cls(text.label, generated=how, **facts)

    def fitting(self, windows: int) -> str:
        """What a text has of which only so many windows could be drawn."""
        return (
            f"has {windows} conversations that fit, and {self.left_out} that are longer than a"
            " window"
        )

    def facts(self, windows: int, length: int, bos: bool) -> dict[str, Any]:
        """For the protocol of so many windows: "text_tokens", "times_seen" and, if need be,
        "warning"; or "repeated"; or "documents" and "cut"; also "generated", "bos_once" and
        "licence", if it is.
        """
        origin: dict[str, Any] = {"generated": dict(self.generated)} if self.generated else {}
        if self.bos_once:
            origin["bos_once"] = True
        if self.licence is not None:
            origin["licence"] = self.licence
        return origin | self._amounts(windows, length, bos)

    def _amounts(self, windows: int, length: int, bos: bool) -> dict[str, Any]:
        if self.documents is not None:
            return {"documents": self.documents, "cut": self.cut}
        facts: dict[str, Any] = {}
        if self.conversations is not None:
            facts = {"conversations": self.conversations, "left_out": self.left_out}
        if self.distinct is not None and windows > self.distinct:
            return facts | {"repeated": round(windows / self.distinct, 3)}
        if self.text_tokens is None:
            return facts
        seen = windows * (length - bos) / self.text_tokens
        facts |= {"text_tokens": self.text_tokens, "times_seen": round(seen, 3)}
        if seen <= OFTEN:
            return facts
        what = f"{windows} windows of {length} tokens from a text of {self.text_tokens} tokens"
        warning = f"{what}: each token is seen about {seen:.0f} times; use a longer text"
        return facts | {"warning": warning}


@dataclass(frozen=True)
class Windows:
    """Windows of one text, or of a mixture of several."""

    tokens_WT: Batch
    """int64 [windows, length], or samples with images; each with the beginning-of-sequence token in
    it, if there is one."""
    bos: bool
    """Whether each begins with the beginning-of-sequence token."""
    texts: tuple[Drawn, ...]
    """What they came from, in the recipe's order."""
    text_W: np.ndarray
    """int64 [windows]: the number of each one's text."""
    start_W: np.ndarray | None = None
    """int64 [windows]: the place of each one's first token among those of all texts (see
    `FARTHEST`); None: no token is in two windows."""

    @classmethod
    def of(
        cls, tokens_WT: Batch, bos: bool, text: Drawn, start_W: np.ndarray | None = None
    ) -> Self:
        """Windows of a single text."""
        return cls(tokens_WT, bos, (text,), np.zeros(len(tokens_WT), dtype=np.int64), start_W)

    def first(self, windows: int) -> Windows:
        """The first so many of them."""
        starts = None if self.start_W is None else self.start_W[:windows]
        return Windows(
            self.tokens_WT[:windows], self.bos, self.texts, self.text_W[:windows], starts
        )

    @property
    def starts_W(self) -> np.ndarray:
        """`start_W`, or such places for windows that have no token in common."""
        if self.start_W is not None:
            return self.start_W
        return np.arange(len(self.tokens_WT)) * self.tokens_WT.shape[1]

    def starts_of(self, number: int) -> np.ndarray:
        """The places in that text at which its windows begin; of documents, their numbers times the
        length."""
        return self.starts_W[self.text_W == number] % FARTHEST

    @property
    def place_WT(self) -> np.ndarray:
        """int64 [windows, length]: where each token stands in the texts, so that windows that
        overlap have equal places; below 0 for what stands in none, padding and the
        beginning-of-sequence token.
        """
        place_WT = self.starts_W[:, None] + np.arange(self.tokens_WT.shape[1]) - self.bos
        place_WT[tokens_of(self.tokens_WT) == PADDING] = -1
        if self.bos:
            place_WT[:, 0] = -1
        return place_WT

    @property
    def tokens(self) -> int:
        """Of all windows, without padding."""
        return sum(lengths(self.tokens_WT))

    @property
    def protocol(self) -> dict[str, Any]:
        """For manifests and `--json`: {"data", "windows", "length", "bos"}; of random windows also
        "text_tokens", "times_seen" (how often each token is, on average) and, if need be,
        "warning"; of windows that were cycled through, "repeated" (how often each is there, on
        average); of padded ones "tokens"; of documents "documents" (how many the text has) and
        "cut" (how many of those taken are longer than a window); of a published text
        "bos_once" where the token stands before the whole of it alone; "licence", where that has
        been looked for; of conversations with images
        "conversations" (how many the text has) and "left_out" (how many of those looked at are
        longer than a window); of a text that the dense model
        wrote "generated": {"prompts" (None: without), "tokens" (of the whole text), "temperature",
        "top_p"}.

        Of a mixture, these further ones stand in "parts", with the "data" and "windows" of each.
        """
        windows, length = map(int, self.tokens_WT.shape)
        data = " + ".join(text.data for text in self.texts)
        about = {"data": data, "windows": windows, "length": length, "bos": self.bos}
        if (tokens := self.tokens) < windows * length:
            about["tokens"] = tokens
        counts = np.bincount(self.text_W, minlength=len(self.texts)).tolist()
        parts = [
            {"data": text.data, "windows": count, **text.facts(count, length, self.bos)}
            for text, count in zip(self.texts, counts, strict=True)
        ]
        return about | (parts[0] if len(parts) == 1 else {"parts": parts})


Opened = Stream | Album
"""A text to draw windows from."""


def random_windows(
    opened: Opened,
    text: Text | GeneratedText,
    windows: int,
    length: int,
    seed: int,
    bos: int | None,
    key: str,
    pack: bool = True,
) -> Windows:
    """At random places of one text, so that they may overlap; without `pack` so many documents; of
    an album so many conversations, if there are as many.

    Raises:
        UserError: see `sample_windows`, `Album.drawn`; or there are fewer documents.
    """
    if isinstance(opened, Album):
        return of_album(opened, text, windows, seed)
    if not pack:
        found, numbers, there = documents.drawn(opened, windows, seed)
        documents.enough(found, windows, key)
        tokens_WT, cut = documents.as_windows(found, length, bos)
        source = Drawn(text.label, documents=there, cut=cut)
        start_W = np.array(numbers, dtype=np.int64) * length
        return Windows.of(tokens_WT, bos is not None, source, start_W)
    n_tokens = 0

    def watched() -> Iterator[np.ndarray]:
        nonlocal n_tokens
        n_tokens = 0  # a long text is read twice
        for tokens in opened():
            n_tokens += len(tokens)
            yield tokens

    tokens_WT = sample_windows(watched, windows, length, seed, key, bos)
    drawn = Drawn.of(text, n_tokens, text_tokens=n_tokens)
    start_W = np.array(window_starts(n_tokens, windows, length, seed), dtype=np.int64)
    return Windows.of(tokens_WT, bos is not None, drawn, start_W)


def of_album(
    album: Album, text: Text | GeneratedText, limit: int | None, seed: int | None = None
) -> Windows:
    """At most `limit` conversations (None: all) as samples, in an order of chance if there is a
    `seed`.

    Raises:
        UserError: see `Album.drawn`.
    """
    samples, left_out = album.drawn(limit, seed)
    drawn = Drawn(text.label, conversations=album.there, left_out=left_out)
    return Windows.of(samples, album.begins(samples), drawn)


def evaluation_windows(
    opened: Opened,
    text: Evaluation,
    length: int,
    bos: int | None,
    key: str,
    pack: bool = True,
) -> Windows:
    """Consecutive ones; without `pack` the first documents; of an album the first conversations.

    Raises:
        UserError: see `consecutive_windows`, `Album.drawn`; or there is no document.
    """
    if isinstance(opened, Album):
        return of_album(opened, text, text.windows)
    if not pack:
        found = documents.first(opened, text.windows, key)
        tokens_WT, cut = documents.as_windows(found, length, bos)
        source = Drawn(text.label, documents=len(found), cut=cut)
        return Windows.of(tokens_WT, bos is not None, source)
    tokens_WT = consecutive_windows(opened, length, text.windows, key, bos)
    return Windows.of(tokens_WT, bos is not None, Drawn(text.label))
