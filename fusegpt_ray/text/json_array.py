"""The items of one JSON array, one by one, however many it has: only one is held."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

CHUNK = 1 << 20
"""Characters that are read at once, at least."""
_BLANK = re.compile(r"[ \t\r\n]*")
_ENDS = {" ", "\t", "\r", "\n", ",", "]"}
"""What may follow an item."""


def array_items(begun: str, read: Callable[[int], str], most: int) -> Iterator[Any]:
    """
    Args:
        begun: what has been read of the text, whose first character is the bracket.
        read: gives so many more characters; fewer, or none, at the end.
        most: characters of the longest item.

    Raises:
        ValueError: it is no JSON array, or an item is longer.
        RecursionError: an item is nested too deeply.
    """
    text, number = _Text(begun, read), 0
    text.at = 1
    if text.next_character() != "]":
        while True:
            number += 1
            yield text.value(f"item {number}", most)
            if text.next_character() != ",":
                break
            text.at += 1
    if (end := text.next_character()) != "]":
        after = f"item {number} is followed by {end!r}" if end else "its end is missing"
        raise ValueError(f"{after}; a comma or ] was expected")
    text.at += 1
    if text.next_character():
        raise ValueError("there is more behind its ]")


class _Text:
    """What has been read and not yet passed."""

    def __init__(self, held: str, read: Callable[[int], str]) -> None:
        self.held, self.at, self.read = held, 0, read
        self.decode = json.JSONDecoder().raw_decode

    def next_character(self) -> str:
        """The first that is no white space, which is passed; nothing at the end."""
        while True:
            blank = _BLANK.match(self.held, self.at)
            assert blank, "the pattern matches nothing, too"
            self.at = blank.end()
            if self.at < len(self.held):
                return self.held[self.at]
            self.held, self.at = self.read(CHUNK), 0
            if not self.held:
                return ""

    def value(self, name: str, most: int) -> Any:
        """The next one. What is held is doubled until it is whole, so that a long one is looked at
        a few times only."""
        self.next_character()
        while True:
            try:
                value, end = self.decode(self.held, self.at)
            except ValueError as error:
                problem = str(error)  # the error itself holds all that it was raised for
            else:
                # What follows must end it: else it may be the beginning of a number.
                if end - self.at <= most and self.held[end : end + 1] in _ENDS:
                    self.at = end
                    return value
                problem = "it does not end there"
            left = self.held[self.at :]
            more = "" if len(left) > most else self.read(max(CHUNK, len(left)))
            if not more:
                longer = f", or has more than {most} characters" if len(left) > most else ""
                raise ValueError(f"{name} is not JSON{longer}: {problem}")
            self.held, self.at = left + more, 0
