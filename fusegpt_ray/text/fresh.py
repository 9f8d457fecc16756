"""Windows that share no token, to train on and held out.

Each text is cut into consecutive windows, of which some are picked at random. What is held out does
not depend on how many windows are trained on, so that its losses can be compared.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from fusegpt_ray.errors import UserError
from fusegpt_ray.samples import PADDING
from fusegpt_ray.text.calibration import Stream, blank_windows, counted, fill
from fusegpt_ray.text.documents import put, telling
from fusegpt_ray.text.mixture import apportioned, data_keys, interleaved, seed_of, shares
from fusegpt_ray.text.windows import Drawn, Windows
from fusegpt_ray.text_sections import GeneratedText, Texts


def fresh_windows(
    streams: Sequence[Stream],
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
) -> tuple[Windows, Windows]:
    """(To train on, held out): no token of a text is in two windows, unless `repeat`, which lets
    the windows to train on be cycled through, each time in another order. None that is held out is
    ever trained on.

    A text gets its share of both by weight; where only a few are held out, that may be none of
    them. A text of more than `HELD_TOKENS` tokens is read twice, any other once.

    Args:
        streams: of each text, in the order of the recipe.
        length: tokens a window, `bos` among them if there is one.
        key: of the section in which the texts stand; other keys that messages name are of `heal`.
        fewer: where the texts have less, take what they have, in multiples of this, instead of
            refusing them.
        pack: whether a window is so many tokens; else it is a document.

    Raises:
        UserError: a text has fewer windows than its share, or gets none to train on.
    """
    kept = apportioned(texts.parts, held_out)
    cut = _Packed if pack else _Documents
    rolls = [cut(stream, length, bos) for stream in streams]
    if fewer and not repeat:
        free = [roll.windows - held for roll, held in zip(rolls, kept, strict=True)]
        windows = _most(texts, windows, free, fewer)
    wanted = shares(texts, windows, key, "heal.tokens")
    train_W, held_W = (interleaved(counts, seed_of(seed, "order")) for counts in (wanted, kept))
    train_WT, held_WT = (cut.blank(n, length, bos) for n in (windows, held_out))
    trained, held = [], []
    for number, name in enumerate(data_keys(texts, key)):
        roll, share = rolls[number], wanted[number]
        there = roll.windows
        if there <= kept[number] or (there < share + kept[number] and not repeat):
            left = there - kept[number]
            raise _too_short(texts, number, windows, length, roll.found, left, key, fewer)
        picked = _picked(there, share, kept[number], seed_of(seed, number))
        rows = [train_WT[row] for row in np.flatnonzero(train_W == number)]
        rows += [held_WT[row] for row in np.flatnonzero(held_W == number)]
        roll.fill(rows, picked, name)
        part = texts.parts[number]
        trained.append(Drawn.of(part, roll.tokens, distinct=there - kept[number]))
        held.append(Drawn.of(part, roll.tokens))
    begins = bos is not None
    return (
        Windows(train_WT, begins, tuple(trained), train_W),
        Windows(held_WT, begins, tuple(held), held_W),
    )


class _Packed:
    """A text as consecutive windows."""

    blank = staticmethod(blank_windows)

    def __init__(self, stream: Stream, length: int, bos: int | None) -> None:
        self.tokens, self.again = counted(stream)
        self.width = length if bos is None else length - 1
        self.windows = self.tokens // self.width
        self.found = f"has {self.tokens} tokens, which are {self.windows} windows of {length}"

    def fill(self, rows: Sequence[np.ndarray], numbers: Sequence[int], key: str) -> None:
        """Write the windows of these numbers into the rows."""
        starts = [number * self.width for number in numbers]
        fill([row[-self.width :] for row in rows], starts, self.again, self.tokens, key)


class _Documents:
    """A text as documents, each a window."""

    def __init__(self, stream: Stream, length: int, bos: int | None) -> None:
        self.stream, self.bos = stream, bos
        sizes = [len(tokens) for tokens in telling(stream)]
        self.windows, self.tokens = len(sizes), sum(sizes)
        self.found = f"has {self.windows} documents of two tokens or more"

    @staticmethod
    def blank(windows: int, length: int, bos: int | None) -> np.ndarray:
        return np.full((windows, length), PADDING, dtype=np.int64)

    def fill(self, rows: Sequence[np.ndarray], numbers: Sequence[int], key: str) -> None:
        """As `_Packed.fill`; the text is read and tokenised once more."""
        places: dict[int, list[np.ndarray]] = {}
        for row, number in zip(rows, numbers, strict=True):
            places.setdefault(number, []).append(row)
        for number, tokens in enumerate(telling(self.stream)):
            for row in places.get(number, ()):
                put(tokens, row, self.bos)


def _most(texts: Texts, windows: int, free: Sequence[int], step: int) -> int:
    """The largest multiple of `step` up to `windows` of which each text has its share; `step`, if
    there is none.
    """
    for fewer in range(windows // step * step, step, -step):
        counts = apportioned(texts.parts, fewer)
        if all(count <= there for count, there in zip(counts, free, strict=True)):
            return fewer
    return step


def _picked(there: int, wanted: int, kept: int, seed: int) -> list[int]:
    """Numbers of consecutive windows: so many to train on, then those that are held out."""
    draw = random.Random(seed)
    order = list(range(there))
    draw.shuffle(order)
    held, rest = order[:kept], order[kept:]
    chosen = rest[:wanted]
    while len(chosen) < wanted:
        draw.shuffle(rest)
        chosen += rest
    return chosen[:wanted] + held


def _too_short(
    texts: Texts,
    number: int,
    windows: int,
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
    return UserError("heal.tokens", windows * length, problem, fix)
