"""Which blocks of a model may go: the one rule that every way to choose blocks obeys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Removable:
    """Which blocks of a dense model may go."""

    blocks: tuple[int, ...] | None = None
    """Their dense numbers; None: all."""
    from_the_end: bool = False
    """Only the last one that is left, each time."""
    why: str = ""
    """Others may not."""
    one_stays: tuple[int, ...] = ()
    """The last that is left of these is no candidate: attention blocks of a hybrid, one of which
    generation with a cache asks for (see `publishing/rehearsal.py`)."""

    def from_block(self, first: int, depth: int, why: str) -> Removable:
        """The same rule, but the blocks before this one stay.

        Args:
            depth: blocks of the dense model.
            why: those may not go, for `in_words`.
        """
        able = range(depth) if self.blocks is None else self.blocks
        blocks = tuple(number for number in able if number >= first)
        reasons = f"{self.why}; {why}" if self.why else why
        return replace(self, blocks=blocks, why=reasons)

    def among(self, kept: Sequence[int]) -> tuple[int, ...] | None:
        """The candidates of a round, by dense number; None: all of the blocks `kept`."""
        if self.from_the_end:
            last = tuple(kept[-1:])
            return last if self.blocks is None or last[0] in self.blocks else ()
        left = [number for number in kept if number in self.one_stays]
        stays = left if len(left) == 1 else []
        if self.blocks is None and not stays:
            return None
        able = kept if self.blocks is None else self.blocks
        return tuple(number for number in kept if number in able and number not in stays)

    def allows(self, gone: Sequence[int], kept: Sequence[int]) -> bool:
        """Whether these blocks may go out of `kept`, one after another in this order."""
        left = [*kept]
        for number in gone:
            candidates = self.among(left)
            if candidates is not None and number not in candidates:
                return False
            left.remove(number)
        return True

    def in_words(self) -> str:
        """For whoever watches the run; nothing where any blocks can go."""
        rule = ""
        if self.one_stays:
            numbers = ", ".join(map(str, self.one_stays))
            rule = f"one of the attention blocks {numbers} stays, as generation with a cache asks"
        if not self.why:
            return rule
        if self.from_the_end:
            return f"only the last blocks can go, in this order: otherwise {self.why}"
        assert self.blocks is not None
        numbers = ", ".join(map(str, self.blocks))
        found = f"only the blocks {numbers} can go: otherwise {self.why}"
        return f"{found}; {rule}" if rule else found


ANY = Removable()
