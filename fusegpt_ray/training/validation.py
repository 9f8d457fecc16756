"""Held-out windows that a training evaluates on its way: what is kept in the end is the state that
was best on them, which may be the one before the first step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from fusegpt_ray.training.batch import LossBatch
from fusegpt_ray.training.stepper import Stepper

_BEST = "best."
RATE_KEY = "heal.learning_rate"
"""What messages name: only healing evaluates held-out windows."""


@dataclass
class Validation:
    """The held-out losses of one training, and the values that gave the lowest."""

    batches: Callable[[], Iterable[LossBatch]]
    """Of the held-out windows, on the device."""
    meet: Callable[[], None] = lambda: None
    """Waits for all workers, one of which may still write a checkpoint."""
    losses: list[float] = field(default_factory=list)
    """At the beginning, and after each part."""
    _best: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def best(self) -> int:
        """The part after which the held-out loss was the lowest."""
        return lowest(self.losses)

    def look(self, stepper: Stepper, where: str = "") -> None:
        """Measure the present state. Called by all workers at once.

        Args:
            where: in the training, for messages: " in part 1 of 8"; nothing before its first step.

        Raises:
            FloatingPointError: the loss is not finite, so that nothing learned can be trusted.
        """
        self.meet()
        loss = stepper.validate(self.batches())
        if not math.isfinite(loss) and not where:
            told = f"the held-out loss is {loss} before the first step: where arithmetic overflows"
            raise FloatingPointError(f"{told}, model.dtype: float32 may help")
        if not math.isfinite(loss):
            raise FloatingPointError(f"the held-out loss became {loss}{where}: lower {RATE_KEY}")
        self.losses.append(loss)
        if self.best == len(self.losses) - 1:
            self._best = {}  # before there is a second copy
            self._best = _values(stepper)

    def state(self, moved: bool = False) -> dict[str, torch.Tensor]:
        """What a training checkpoint keeps of it, unless the present state is the best.

        Args:
            moved: steps have been made since the last look.
        """
        if self.best == len(self.losses) - 1 and not moved:
            return {}
        return {_BEST + name: value for name, value in self._best.items()}

    def load(
        self, losses: list[float], state: Mapping[str, torch.Tensor], stepper: Stepper
    ) -> None:
        """Go on from what `state` gave, with the stepper in the state of the same checkpoint."""
        self.losses = losses
        kept = {
            name.removeprefix(_BEST): value
            for name, value in state.items()
            if name.startswith(_BEST)
        }
        self._best = kept or _values(stepper)

    def end(self, stepper: Stepper) -> None:
        """Go back to the best state. Called by all workers at once."""
        self.meet()
        if self.best < len(self.losses) - 1:
            stepper.load({**stepper.state(), **self._best})


def lowest(losses: Sequence[float]) -> int:
    """The number of the lowest loss, the first of several; one that is not finite is none."""
    finite = [loss if math.isfinite(loss) else math.inf for loss in losses]
    return finite.index(min(finite))


def _values(stepper: Stepper) -> dict[str, torch.Tensor]:
    """Copies on the host of what this worker learns."""
    return {
        name: value.to("cpu", copy=True)
        for name, value in stepper.state().items()
        if name.endswith(".value")
    }
