"""Windows that are more than rows of tokens of one length: padded ones, and those with images.

A window that is text alone is a row of an array. A shorter one ends in `PADDING`: behind the text,
where no causal block looks at it, so that it changes nothing and only has to be left out of every
mean. Windows with images are `Samples`, which can be taken and cut as such an array can. Their
pixels may lie elsewhere (`Inputs`), so that to hand samples on is not to copy these.

Shapes: W windows, T tokens. No torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Protocol

import numpy as np

from fusegpt_ray.recipe.specs import Counting

PADDING = -1
"""In place of a token, behind the last one of a window."""


class Inputs(Protocol):
    """What else than tokens the model is called with for one sample alone, by name: pixels, their
    grids, the kinds of its tokens; without any padding.
    """

    @property
    def digest(self) -> bytes:
        """SHA-256 of all of it; known without `load`."""

    def load(self) -> Mapping[str, np.ndarray]:
        """The arrays, from wherever they lie."""


@dataclass(frozen=True, eq=False)
class InMemoryInputs:
    """Inputs that lie in this process."""

    arrays: Mapping[str, np.ndarray]

    @cached_property
    def digest(self) -> bytes:
        """See `Inputs`."""
        found = hashlib.sha256()
        for name, array in sorted(self.arrays.items()):
            found.update(f"{name} {array.dtype} {array.shape}".encode())
            found.update(_bytes(array))
        return found.digest()

    def load(self) -> Mapping[str, np.ndarray]:
        """See `Inputs`."""
        return self.arrays


@dataclass(frozen=True, eq=False)
class Samples:
    """Conversations with images, tokenised and processed; windows of text may be among them, which
    need no inputs."""

    tokens_WT: np.ndarray
    """int64 [W, T], an image's placeholders among them."""
    targets_WT: np.ndarray
    """bool [W, T]: the tokens of answers, and all of a text, whose perplexity is measured."""
    images_WT: np.ndarray
    """bool [W, T]: the placeholders that an image's embeddings replace."""
    inputs: tuple[Inputs, ...]
    """Of each sample."""

    @property
    def shape(self) -> tuple[int, int]:
        windows, length = self.tokens_WT.shape
        return windows, length

    def numel(self) -> int:
        """Tokens, padding among them."""
        return int(self.tokens_WT.size)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, rows: slice | np.ndarray) -> Samples:
        numbers = range(len(self))[rows] if isinstance(rows, slice) else rows.tolist()
        arrays = (self.tokens_WT[rows], self.targets_WT[rows], self.images_WT[rows])
        return Samples(*arrays, tuple(self.inputs[number] for number in numbers))

    def split(self, size: int) -> list[Samples]:
        """Consecutive parts of `size` samples; the last may be smaller."""
        return cut(self, range(size, len(self), size))  # type: ignore[return-value]


Batch = np.ndarray | Samples
"""Windows: int64 [W, T], or samples with images."""


def mixed(windows_WT: np.ndarray, text_W: np.ndarray, samples: Mapping[int, Samples]) -> Batch:
    """Windows of several texts, some of which are samples.

    Args:
        windows_WT: where the places of samples may hold anything. It may be written to.
        text_W: the number of each window's text.
        samples: of the texts of these numbers, in order.
    """
    if not samples:
        return windows_WT
    images_WT = np.zeros(windows_WT.shape, dtype=bool)
    targets_WT = np.ones(windows_WT.shape, dtype=bool)
    inputs: list[Inputs] = [InMemoryInputs({})] * len(windows_WT)
    for number, found in samples.items():
        places = np.flatnonzero(text_W == number)
        windows_WT[places] = found.tokens_WT
        targets_WT[places] = found.targets_WT
        images_WT[places] = found.images_WT
        for place, own in zip(places.tolist(), found.inputs, strict=True):
            inputs[place] = own
    targets_WT &= windows_WT != PADDING
    return Samples(windows_WT, targets_WT, images_WT, tuple(inputs))


def with_an_image(windows: Batch, count: int) -> Batch:
    """The first `count` windows; the first that has an image in place of the last of them, where
    none of them has one.
    """
    if isinstance(windows, Samples):
        seeing = np.flatnonzero(windows.images_WT.any(axis=1))
        if len(seeing) and seeing[0] >= count:
            return windows[np.array([*range(count - 1), seeing[0]])]
    return windows[:count]


def tokens_of(windows: Batch) -> np.ndarray:
    """int64 [W, T]."""
    return windows.tokens_WT if isinstance(windows, Samples) else windows


def fingerprint(windows: Batch) -> str:
    """SHA-256 of the windows' bytes, in hex: equal for the same text, tokenizer, length and
    seed; of samples with images also for the same pixels.
    """
    found = hashlib.sha256()
    for part in _parts(windows):
        found.update(part)
    return found.hexdigest()


def _parts(windows: Batch) -> Iterator[memoryview | bytes]:
    if isinstance(windows, Samples):
        yield from map(_bytes, (windows.tokens_WT, windows.targets_WT, windows.images_WT))
        yield from (inputs.digest for inputs in windows.inputs)
    else:
        yield _bytes(windows)


def _bytes(array: np.ndarray) -> memoryview:
    """Those of the array; a copy only where they do not lie in a row."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def cut(windows: Batch, ends: Iterable[int]) -> list[Batch]:
    """Consecutive parts that end before each of these windows, and the rest."""
    return [windows[a:b] for a, b in pairwise([0, *ends, len(windows)])]


def counting(windows: Batch, which: Counting = "all", targets: bool = False) -> np.ndarray | None:
    """Which tokens count in a mean over tokens, bool [W, T]; None: all of them.

    `targets`: of samples, those alone that are to be predicted: no question, and no placeholder.
    """
    counted_WT = tokens_of(windows) != PADDING
    if targets and isinstance(windows, Samples):
        counted_WT &= windows.targets_WT
    if which != "all":
        no_image_WT = np.zeros_like(counted_WT)
        image_WT = windows.images_WT if isinstance(windows, Samples) else no_image_WT
        counted_WT &= image_WT if which == "image" else ~image_WT
    return None if counted_WT.all() else counted_WT


def predicted(windows: Batch) -> np.ndarray | None:
    """Which of tokens 1 … T−1 are targets, bool [W, T − 1]; None: all of them."""
    if isinstance(windows, Samples):
        return windows.targets_WT[:, 1:]
    counted_WT = counting(windows)
    return None if counted_WT is None else counted_WT[:, 1:]


def lengths(
    windows: Batch, which: Counting = "all", skipped: int = 0, targets: bool = False
) -> list[int]:
    """Tokens of each window that count (see `counting`), without the first `skipped` places."""
    counted_WT = counting(windows, which, targets)
    if counted_WT is None:
        return [tokens_of(windows).shape[1] - skipped] * len(windows)
    return [int(number) for number in counted_WT[:, skipped:].sum(axis=1)]
