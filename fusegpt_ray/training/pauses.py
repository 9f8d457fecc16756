"""When all workers of a training pause to make a training checkpoint: after a part, where the last
one is long enough ago, and after any step, where one of them has been told that it will end soon.

They ask each other a few seconds apart, not after every step, because whoever asks waits for the
device. How many steps these are is agreed on when they ask, since their clocks differ.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from fusegpt_ray.errors import Terminated
from fusegpt_ray.training.checkpoints import Checkpoints
from fusegpt_ray.training.stepper import Stepper
from fusegpt_ray.workers.base import Notices

ASK_SECONDS = 2.0
"""About so many between two questions; at least one step."""


@dataclass
class Pauses:
    """Of one worker. All workers call each of its methods at once."""

    stepper: Stepper
    checkpoints: Checkpoints
    notices: Notices
    ends: bool = False
    """Whether the training is to end, once a checkpoint is made."""
    _kept: float = field(default_factory=lambda: time.monotonic())
    """When the last checkpoint was made, or training began."""
    _asked: float = field(default_factory=lambda: time.monotonic())
    _looked: float = field(default_factory=lambda: time.monotonic())
    """When it was last asked whether a node is leaving."""
    _leaving: bool = False
    _steps: int = 1
    """From one question to the next."""
    _left: int = 1
    """Of these."""

    def after_step(self) -> bool:
        """Whether a checkpoint is to be made now."""
        self._left -= 1
        if self._left:
            return False
        seconds = max(time.monotonic() - self._asked, 1e-6)
        wish = max(1, int(self._steps * ASK_SECONDS / seconds))
        rows = self._ask(min(wish, 8 * self._steps))
        self._steps = self._left = min(steps for steps, *_ in rows)
        return self.ends or self._leaving

    def after_part(self) -> bool:
        """As `after_step`."""
        rows = self._ask(self.checkpoints.due(self._kept))
        self._left = self._steps
        return self.ends or self._leaving or all(due for due, *_ in rows)

    def made(self) -> None:
        """The checkpoint is made.

        Raises:
            Terminated: the training was to end.
        """
        self._kept = time.monotonic()
        if self.ends:
            raise Terminated

    def _ask(self, what: int) -> list[list[int]]:
        """Gather this with what each has been told. Parts may end in quick succession, so that
        whether a node is leaving, which takes longer to ask, is asked less often.
        """
        long_ago = time.monotonic() - self._looked >= ASK_SECONDS
        rows = self.stepper.gather([what, self.notices.ended(), long_ago])
        self.ends = any(ended for _, ended, _ in rows)
        self._leaving = False
        if any(long_ago for *_, long_ago in rows):
            self._leaving = self.notices.leaving()
            self._looked = time.monotonic()
        self._asked = time.monotonic()
        return rows
