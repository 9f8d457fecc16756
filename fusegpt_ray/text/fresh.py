"""Windows that share no token, to train on and held out.

Each text is cut into consecutive windows, documents or conversations, of which some are picked at
random. What is held out does not depend on how many windows are trained on, so that its losses can
be compared. It is text of which nothing was seen before, in the calibration, if there is enough:
else its losses would favour the model of before.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import count

import numpy as np

from fusegpt_ray.errors import UserError
from fusegpt_ray.recipe.text_sections import GeneratedText, Texts
from fusegpt_ray.samples import PADDING, Samples, mixed
from fusegpt_ray.text.album import Album
from fusegpt_ray.text.calibration import Stream, blank_windows, counted, fill
from fusegpt_ray.text.documents import put, telling
from fusegpt_ray.text.mixture import Part, apportioned, data_keys, interleaved, seed_of, shares
from fusegpt_ray.text.windows import Drawn, Opened, Windows, of_album

NONE = np.array([], dtype=np.int64)
NOTHING: Mapping[int, np.ndarray] = {}


def fresh_windows(
    opened: Sequence[Opened],
    texts: Texts,
    windows: int,
    held_out: int,
    length: int,
    seed: int,
    repeat: bool,
    bos: int | None,
    key: str,
    fewer: int | None = None,
    pack: bool = True,
    tokens: int | None = None,
    seen: Mapping[int, np.ndarray] = NOTHING,
) -> tuple[Windows, Windows]:
    """(To train on, held out): no token of a text is in two windows, unless `repeat`, which lets
    the windows to train on be cycled through, each time in another order. None that is held out is
    ever trained on.

    A text gets its share of both by weight; where only a few are held out, that may be none of
    them. A text of more than `HELD_TOKENS` tokens is read twice, any other once.

    Args:
        opened: each text, in the order of the recipe.
        length: tokens a window, `bos` among them if there is one.
        key: of the section in which the texts stand; other keys that messages name are of `heal`.
        fewer: where the texts have less, take what they have, in multiples of this, instead of
            refusing them.
        pack: whether a window is so many tokens; else it is a document.
        tokens: `heal.tokens`, as the recipe says it, for messages; None: what the windows have.
        seen: by number of text, where windows of it begin (`Windows.starts_of`) whose tokens are
            held out only where there is too little else.

    Raises:
        UserError: a text has fewer windows than its share, or gets none to train on.
    """
    kept = apportioned(texts.parts, held_out)
    rolls = _rolls(opened, texts, kept, windows, length, seed, bos, pack)
    if fewer and not repeat:
        free = [roll.windows - held for roll, held in zip(rolls, kept, strict=True)]
        windows = _most(texts, windows, free, fewer)
    wanted = shares(texts, windows, key, "heal.tokens")
    train, held = (
        _Sheet(interleaved(counts, seed_of(seed, "order")), length, bos, pack)
        for counts in (wanted, kept)
    )
    trained_on, kept_back = [], []
    for number, name in enumerate(data_keys(texts, key)):
        roll = rolls[number]
        left = roll.windows - kept[number]
        if left < 1 or (left < wanted[number] and not repeat):
            raise _too_short(
                texts, number, tokens or windows * length, length, roll.found, left, key, fewer
            )
        roll.lay(number, train, held, seed_of(seed, number), name, seen.get(number, NONE))
        drawn = roll.drawn(texts.parts[number])
        trained_on.append(replace(drawn, distinct=left))
        kept_back.append(drawn)
    begin = all(roll.begin for roll in rolls)
    return train.windows(begin, trained_on), held.windows(begin, kept_back)


class _Sheet:
    """Windows of several texts, while they are filled in."""

    def __init__(self, text_W: np.ndarray, length: int, bos: int | None, pack: bool) -> None:
        """`text_W`: the number of each window's text."""
        self.text_W = text_W
        self.tokens_WT = (
            blank_windows(len(text_W), length, bos)
            if pack
            else np.full((len(text_W), length), PADDING, dtype=np.int64)
        )
        self.samples: dict[int, Samples] = {}
        """Of the texts of these numbers."""

    def rows(self, number: int) -> list[np.ndarray]:
        """Those of one text, to be written to."""
        return [self.tokens_WT[row] for row in np.flatnonzero(self.text_W == number)]

    def windows(self, begin: bool, texts: Sequence[Drawn]) -> Windows:
        """`begin`: whether each begins with the beginning-of-sequence token."""
        windows = mixed(self.tokens_WT, self.text_W, self.samples)
        return Windows(windows, begin, tuple(texts), self.text_W)


class _Roll(ABC):
    """One text, to be cut into windows."""

    windows: int
    """How many there are."""
    found: str
    """The same, for messages."""
    begin: bool
    """Whether each begins with the beginning-of-sequence token."""

    @abstractmethod
    def lay(
        self, number: int, train: _Sheet, held: _Sheet, seed: int, key: str, seen: np.ndarray
    ) -> None:
        """Fill in the windows of this text, whose number is given. `seen`: see `fresh_windows`."""

    @abstractmethod
    def drawn(self, part: Part) -> Drawn:
        """What they came from."""


def _rolls(
    opened: Sequence[Opened],
    texts: Texts,
    kept: Sequence[int],
    windows: int,
    length: int,
    seed: int,
    bos: int | None,
    pack: bool,
) -> list[_Roll]:
    cut, asked = _Packed if pack else _Documents, apportioned(texts.parts, windows)
    draw = seed_of(seed, "healing")  # else the conversations would be those of the calibration
    # One more of each: where fewer windows are taken in all, the share of a text may be larger.
    more = len(opened) > 1
    return [
        _Conversations(each, part, held + share + more, seed_of(draw, number))
        if isinstance(each, Album)
        else cut(each, length, bos)
        for number, (each, part, held, share) in enumerate(
            zip(opened, texts.parts, kept, asked, strict=True)
        )
    ]


class _Tokens(_Roll):
    """One of tokens."""

    tokens: int
    width: int
    """Places from where a window begins to where the next one does."""

    @abstractmethod
    def fill(self, rows: Sequence[np.ndarray], numbers: Sequence[int], key: str) -> None:
        """Write the windows of these numbers into the rows."""

    def lay(
        self, number: int, train: _Sheet, held: _Sheet, seed: int, key: str, seen: np.ndarray
    ) -> None:
        rows, kept = train.rows(number), held.rows(number)
        ends = (seen, seen + self.width - 1)  # a window that was seen lies in two of these at most
        touched = {int(place) // self.width for end in ends for place in end}
        self.fill(rows + kept, _picked(self.windows, len(rows), len(kept), seed, touched), key)

    def drawn(self, part: Part) -> Drawn:
        return Drawn.of(part, self.tokens)


class _Packed(_Tokens):
    """Consecutive windows."""

    def __init__(self, stream: Stream, length: int, bos: int | None) -> None:
        self.begin = bos is not None
        self.tokens, self.again = counted(stream)
        self.width = length - self.begin
        self.windows = self.tokens // self.width
        self.found = f"has {self.tokens} tokens, which are {self.windows} windows of {length}"

    def fill(self, rows: Sequence[np.ndarray], numbers: Sequence[int], key: str) -> None:
        starts = [number * self.width for number in numbers]
        fill([row[-self.width :] for row in rows], starts, self.again, self.tokens, key)


class _Documents(_Tokens):
    """Documents, each a window."""

    def __init__(self, stream: Stream, length: int, bos: int | None) -> None:
        self.bos, self.begin, self.width = bos, bos is not None, length
        numbers = count()
        self.tokens, self.again = counted(
            lambda: (tokens for tokens, _ in zip(telling(stream), numbers, strict=False))
        )
        self.windows = next(numbers)
        self.found = f"has {self.windows} documents of two tokens or more"

    def fill(self, rows: Sequence[np.ndarray], numbers: Sequence[int], key: str) -> None:
        places: dict[int, list[np.ndarray]] = {}
        for row, number in zip(rows, numbers, strict=True):
            places.setdefault(number, []).append(row)
        for number, tokens in enumerate(self.again()):
            for row in places.get(number, ()):
                put(tokens, row, self.bos)


class _Conversations(_Roll):
    """Conversations with images, in an order of chance: those that are held out come first."""

    def __init__(self, album: Album, part: Part, limit: int, seed: int) -> None:
        """`limit`: no more are needed."""
        there = of_album(album, part, limit, seed)
        assert isinstance(there.tokens_WT, Samples)
        self.samples, self.begin, (self.source,) = there.tokens_WT, there.bos, there.texts
        self.windows = len(self.samples)
        self.found = self.source.fitting(self.windows)

    def lay(
        self, number: int, train: _Sheet, held: _Sheet, seed: int, key: str, seen: np.ndarray
    ) -> None:
        share, kept = len(train.rows(number)), len(held.rows(number))
        held.samples[number] = self.samples[:kept]
        train.samples[number] = self.samples[kept + np.arange(share) % (self.windows - kept)]

    def drawn(self, part: Part) -> Drawn:
        return self.source


def _most(texts: Texts, windows: int, free: Sequence[int], step: int) -> int:
    """The largest multiple of `step` up to `windows` of which each text has its share; `step`, if
    there is none.
    """
    for fewer in range(windows // step * step, step, -step):
        counts = apportioned(texts.parts, fewer)
        if all(count <= there for count, there in zip(counts, free, strict=True)):
            return fewer
    return step


def _picked(there: int, wanted: int, kept: int, seed: int, seen: Collection[int]) -> list[int]:
    """Numbers of consecutive windows: so many to train on, then those that are held out, which are
    none of those `seen`, if there are enough others.
    """
    draw = random.Random(seed)
    order = list(range(there))
    draw.shuffle(order)
    held = sorted(order, key=seen.__contains__)[:kept]
    out = set(held)
    rest = [number for number in order if number not in out]
    chosen = rest[:wanted]
    while len(chosen) < wanted:
        draw.shuffle(rest)
        chosen += rest
    return chosen[:wanted] + held


def _too_short(
    texts: Texts,
    number: int,
    tokens: int,
    length: int,
    found: str,
    free: int,
    key: str,
    fewer: int | None,
) -> UserError:
    """`free`: how many windows of the text are not held out."""
    name, part = data_keys(texts, key)[number], texts.parts[number]
    more = f"give more text in {name}"
    if isinstance(part, GeneratedText):
        more = f"raise the tokens of the {part.label}"
    if free < 1:
        problem = f"the text {found}, and none of them is left to train on beside those held out"
        return UserError(name, part.label, problem, f"{more}, or lower heal.held_out")
    total = sum(Fraction(each.weight) for each in texts.parts)
    if fewer:
        problem = f"the text of {name} {found}; its share of {fewer} is more"
        fix = f"{more}, or lower heal.held_out or heal.batch"
        return UserError("heal.tokens", None, problem, fix)
    most = int(free * total / Fraction(part.weight)) * length
    problem = f"the text of {name} {found}; its share is more, and no window is taken twice"
    fix = f"lower it to at most {most}, {more}, or set heal.repeat: true"
    return UserError("heal.tokens", tokens, problem, fix)
