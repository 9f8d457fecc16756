"""Workers in this process whose tasks end in the opposite order, as those of replicas may."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fusegpt_ray.workers.local import LocalWorkers


class Backwards(LocalWorkers):
    """Three replicas, as far as whoever cuts the tasks can tell."""

    replicas = 3  # type: ignore[assignment]

    def map(
        self,
        function: Callable[..., Any],
        tasks: Sequence[tuple[Any, ...]],
        batch_size: int,
        costs: Sequence[float] | None = None,
    ) -> Iterator[tuple[int, Any]]:
        yield from reversed(list(super().map(function, tasks, batch_size, costs)))
