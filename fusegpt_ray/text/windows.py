"""A text's windows, and the protocol that made them: it stands beside every number they gave."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusegpt_ray.sections import Calibration, Evaluation, Text
from fusegpt_ray.text.calibration import consecutive_windows, sample_windows

Stream = Callable[[], Iterable[np.ndarray]]
OFTEN = 2.0
"""So often a token may be seen on average before a warning says that the text is short."""


@dataclass(frozen=True)
class Windows:
    """Windows of one text."""

    tokens_WT: np.ndarray
    """int64 [windows, length]; each with the beginning-of-sequence token in it, if there is one."""
    data: str
    """What the recipe calls the text."""
    bos: bool
    """Whether each begins with the beginning-of-sequence token."""
    text_tokens: int | None = None
    """Of the whole text, where windows were drawn from it at random and may overlap."""

    def first(self, windows: int) -> Windows:
        """The first so many of them."""
        return Windows(self.tokens_WT[:windows], self.data, self.bos, self.text_tokens)

    @property
    def protocol(self) -> dict[str, Any]:
        """For manifests and `--json`: {"data", "windows", "length", "bos"}; of random windows also
        "text_tokens", "times_seen" (how often each token is, on average) and, if need be,
        "warning".
        """
        windows, length = map(int, self.tokens_WT.shape)
        about = {"data": self.data, "windows": windows, "length": length, "bos": self.bos}
        if self.text_tokens is None:
            return about
        seen = windows * (length - self.bos) / self.text_tokens
        about |= {"text_tokens": self.text_tokens, "times_seen": round(seen, 3)}
        if seen <= OFTEN:
            return about
        what = f"{windows} windows of {length} tokens from a text of {self.text_tokens} tokens"
        warning = f"{what}: each token is seen about {seen:.0f} times; use a longer text"
        return about | {"warning": warning}


def calibration_windows(stream: Stream, text: Calibration, bos: int | None, key: str) -> Windows:
    """Random ones.

    Raises:
        UserError: see `sample_windows`.
    """
    n_tokens = 0

    def counted() -> Iterator[np.ndarray]:
        nonlocal n_tokens
        n_tokens = 0  # a long text is read twice
        for tokens in stream():
            n_tokens += len(tokens)
            yield tokens

    tokens_WT = sample_windows(counted, text.windows, text.length, text.seed, key, bos)
    return Windows(tokens_WT, _name(text), bos is not None, n_tokens)


def evaluation_windows(
    stream: Stream,
    text: Evaluation,
    length: int,
    bos: int | None,
    key: str,
) -> Windows:
    """Consecutive ones.

    Raises:
        UserError: see `consecutive_windows`.
    """
    tokens_WT = consecutive_windows(stream, length, text.windows, key, bos)
    return Windows(tokens_WT, _name(text), bos is not None)


def _name(text: Text) -> str:
    """A dataset has parts; a file is what it is."""
    return f"{text.data} ({text.config}, {text.split})" if text.config else text.data
