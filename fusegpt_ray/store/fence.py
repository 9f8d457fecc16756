"""What is called before every write, so that of several runs of one name only its owner writes."""

from __future__ import annotations

from collections.abc import Callable

Fence = Callable[[], None]
"""Called in the process that writes: it raises if another run writes there."""


def nobody_else() -> None:
    """The fence where no other run writes."""
