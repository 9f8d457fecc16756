"""Mistakes of the user in many runs: the first one ends it, or each is told once. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

from fusegpt_ray.errors import UserError

P = ParamSpec("P")
R = TypeVar("R")
SHOWN = 3
"""Runs of one mistake that a message names."""


@dataclass
class Mistakes:
    """Hears of them."""

    stops: bool = True
    """Whether the first one ends it."""
    _found: dict[str, tuple[UserError, list[str]]] = field(default_factory=dict)
    """Each one, and in which runs it is."""

    def note(self, found: Iterable[UserError], where: str = "") -> None:
        """
        Args:
            where: which run it is, for messages; nothing: it is not that of a single one.

        Raises:
            UserError: the first one, if that ends it.
        """
        for error in found:
            if self.stops:
                raise _of(error, where) from error
            _, places = self._found.setdefault(str(error), (error, []))
            if where not in places:
                places.append(where)

    def check(self, check: Callable[P, R], *args: P.args, **options: P.kwargs) -> R | None:
        """What the check returns, or None if it finds a mistake.

        Raises:
            UserError: see `note`.
        """
        try:
            return check(*args, **options)
        except UserError as error:
            self.note([error])
            return None

    @property
    def told(self) -> list[UserError]:
        """All of them; what is wrong in several runs once, with the names of some."""
        return [_of(error, _in_words(places)) for error, places in self._found.values()]


def _of(error: UserError, where: str) -> UserError:
    problem = f"{error.problem} ({where})" if where else error.problem
    return UserError(error.key, error.value, problem, error.fix)


def _in_words(places: list[str]) -> str:
    more = f", and {len(places) - SHOWN} more" if len(places) > SHOWN else ""
    return "; ".join(places[:SHOWN]) + more
