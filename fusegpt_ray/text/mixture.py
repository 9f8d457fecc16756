"""Windows of several texts, mixed by weight; a single text is a mixture of one.

Notable:
- every text has windows of its own, drawn by a seed of its own; the first one's is the recipe's, so
  that a single text's windows are what they would be alone;
- windows are interleaved, so that the first ones, and every loss batch, see the mixture.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np

from fusegpt_ray.errors import UserError
from fusegpt_ray.recipe.sections import Calibration
from fusegpt_ray.recipe.text_sections import GeneratedText, Texts, WeightedText
from fusegpt_ray.samples import Samples, mixed
from fusegpt_ray.text.calibration import Stream
from fusegpt_ray.text.windows import FARTHEST, Drawn, Opened, Windows, random_windows


def data_keys(texts: Texts, key: str) -> list[str]:
    """The recipe key of each text of the section `key`: ["calibration.data"] of a single one, else
    ["calibration.data.0", …].
    """
    if isinstance(texts.data, str):
        return [f"{key}.data"]
    return [f"{key}.data.{number}" for number in range(len(texts.parts))]


Part = WeightedText | GeneratedText


def opened(
    read: Callable[[WeightedText, str], Opened],
    texts: Texts,
    key: str,
    generated: Callable[[GeneratedText, str], Stream] | None = None,
) -> list[Opened]:
    """Each text of the section `key`, to draw windows from.

    Args:
        read: opens one, given its recipe key.
        generated: as this, for texts that the dense model writes.

    Raises:
        UserError: see `corpus.sources`.
    """
    found: list[Opened] = []
    for part, name in zip(texts.parts, data_keys(texts, key), strict=True):
        if isinstance(part, GeneratedText):
            assert generated, "the dense model is at hand"
            found.append(generated(part, name))
        else:
            found.append(read(part, name))
    return found


def apportioned(parts: Sequence[Part], windows: int) -> list[int]:
    """How many of the windows each text gets, by weight and largest remainder."""
    total = sum(Fraction(part.weight) for part in parts)
    quotas = [windows * Fraction(part.weight) / total for part in parts]
    counts = [math.floor(quota) for quota in quotas]
    nearest_next = sorted(range(len(parts)), key=lambda number: counts[number] - quotas[number])
    for number in nearest_next[: windows - sum(counts)]:
        counts[number] += 1
    return counts


def shares(texts: Texts, windows: int, key: str, amount: str) -> list[int]:
    """As `apportioned`, for the texts of the section `key`. The recipe's key `amount` tells how
    many windows there are.

    Raises:
        UserError: a text gets none.
    """
    counts = apportioned(texts.parts, windows)
    for number, count in enumerate(counts):
        if not count:
            raise UserError(
                f"{key}.data.{number}.weight",
                texts.parts[number].weight,
                f"the text's share of {windows} windows rounds to none",
                f"raise it, or {amount}, or leave the text out",
            )
    return counts


def generated_tokens(texts: Texts, length: int, *windows: int) -> dict[GeneratedText, int]:
    """How many tokens the dense model writes of each of the texts that it writes, where sets of so
    many windows of `length` tokens are drawn from the mixture: what the recipe says, else what its
    share of all of them takes and one window more.
    """
    sets = [apportioned(texts.parts, each) for each in windows]
    return {
        part: part.tokens or (sum(counts[number] for counts in sets) + 1) * length
        for number, part in enumerate(texts.parts)
        if isinstance(part, GeneratedText)
    }


def seed_of(seed: int, purpose: int | str) -> int:
    """A seed for the text of that number, or for another purpose. That for text 0 is `seed`."""
    if purpose == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed} {purpose}".encode()).digest()[:8], "big")


def interleaved(counts: Sequence[int], seed: int) -> np.ndarray:
    """The number of each window's text, int64 [sum of counts].

    The k-th of a text's n windows lies at a random place in the k-th n-th of the whole: any
    stretch has each text's share, but for less than a window for each text there is.
    """
    draw = random.Random(seed)
    places = [
        ((k + draw.random()) / count, number)
        for number, count in enumerate(counts)
        for k in range(count)
    ]
    return np.array([number for _, number in sorted(places)], dtype=np.int64)


def calibration_windows(
    texts: Sequence[Opened], text: Calibration, bos: int | None, key: str
) -> Windows:
    """Random ones of each text, interleaved.

    Args:
        texts: in the order of the recipe.
        key: of the section.

    Raises:
        UserError: a text gets none, or has too few; see `random_windows`.
    """
    counts = shares(text, text.windows, key, f"{key}.windows")
    text_W = interleaved(counts, seed_of(text.seed, "order"))
    tokens_WT = np.empty((text.windows, text.length), dtype=np.int64)
    start_W = np.empty(text.windows, dtype=np.int64)
    samples: dict[int, Samples] = {}
    drawn: list[Drawn] = []
    begin = True
    for number, (opened, name) in enumerate(zip(texts, data_keys(text, key), strict=True)):
        part, seed = text.parts[number], seed_of(text.seed, number)
        count = counts[number]
        windows = random_windows(opened, part, count, text.length, seed, bos, name, text.pack)
        if isinstance(windows.tokens_WT, Samples):
            if (there := len(windows.tokens_WT)) < count:
                problem = f"the text of {name} {windows.texts[0].fitting(there)}; wanted: {count}"
                fix = "ask for fewer windows, give more conversations, or raise the length"
                raise UserError(f"{key}.windows", text.windows, problem, fix)
            samples[number] = windows.tokens_WT
        else:
            tokens_WT[text_W == number] = windows.tokens_WT
        start_W[text_W == number] = number * FARTHEST + windows.starts_W
        drawn += windows.texts
        begin &= windows.bos
    return Windows(mixed(tokens_WT, text_W, samples), begin, tuple(drawn), text_W, start_W)
