"""What a run has spent, and what it may spend. Light: no torch.

The clock of a run goes while one of its processes has workers: from their start until the run ends,
over all processes that have worked under its name. Each sign of life (`heartbeat.json`) tells how
much that is by now, and the next process goes on counting from there; so a SIGKILL costs the count
at most the time between two signs.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from time import monotonic
from typing import Any

from fusegpt_ray.errors import BudgetSpent
from fusegpt_ray.recipe.cluster_section import Cluster
from fusegpt_ray.run.lease import read_sign
from fusegpt_ray.store import storage
from fusegpt_ray.store.records import DamagedRecord, opened

CHECKPOINT = "checkpoint.json"
"""The record of a training checkpoint; see `training/checkpoints.py`."""
SPENT = "spent"
"""Its key in a sign of life and in a manifest."""


@dataclass
class Budget:
    """Of one run."""

    cluster: Cluster
    folder: str
    """Of the run."""
    gpus: float = 0.0
    """That the workers of this process hold together."""
    began: float | None = field(default_factory=lambda: monotonic())
    """When they were there; None: this process has none."""

    @cached_property
    def before(self) -> tuple[float, float]:
        """Seconds, and GPU-seconds, of the processes before this one; to be asked for before this
        one gives a sign of life.
        """
        told = read_sign(self.folder).get(SPENT)
        keys = ("seconds", "gpu_seconds")
        seconds, gpu_seconds = (told.get(key) if isinstance(told, dict) else None for key in keys)
        return (_amount(seconds), _amount(gpu_seconds))

    def forget(self) -> None:
        """The run begins anew."""
        self.before = (0.0, 0.0)
        self.began = self.began and monotonic()

    @property
    def spent(self) -> dict[str, float]:
        """{"seconds", "gpu_seconds"} until now."""
        now = 0.0 if self.began is None else monotonic() - self.began
        seconds, gpu_seconds = self.before
        told = {"seconds": seconds + now, "gpu_seconds": gpu_seconds + now * self.gpus}
        return {key: round(value, 3) for key, value in told.items()}

    @property
    def told(self) -> dict[str, float]:
        """{"hours", "gpu_hours", "money"} until now; the last one only where a price is given."""
        spent, price = self.spent, self.cluster.gpu_hour_price
        gpu_hours = spent["gpu_seconds"] / 3600
        money = {} if price is None else {"money": gpu_hours * price}
        return {"hours": spent["seconds"] / 3600, "gpu_hours": gpu_hours, **money}

    def check(self) -> None:
        """
        Raises:
            BudgetSpent: nothing is left.
        """
        if told := self.over:
            raise BudgetSpent(told)

    def check_training(self, folder: str, part: int) -> None:
        """As `check`, after a part of a training, if its last training checkpoint, in `folder`, has
        that part.
        """
        record = storage.join(folder, CHECKPOINT)
        if self.over and storage.exists(record):
            with suppress(DamagedRecord):
                if len(opened(storage.read(record))["losses"]) == part:
                    self.check()

    @property
    def over(self) -> str:
        """What to say where nothing is left, else nothing."""
        told = self.told
        for key, limit, so_far, unit in (
            ("max_hours", self.cluster.max_hours, told["hours"], " hours"),
            ("max_cost", self.cluster.max_cost, told.get("money", 0.0), ""),
        ):
            if limit is not None and so_far >= limit:
                what = f"cluster.{key} = {limit:.9g} is spent: {so_far:,.2f}{unit} by now"
                where = f"what is saved stays in {self.folder}, and the same command goes on"
                return f"{what}; {where} from there with a larger cluster.{key}"
        return ""


def _amount(value: Any) -> float:
    """What can be read of it: anything may stand in a file."""
    sound = type(value) in (int, float) and math.isfinite(value) and value >= 0
    return float(value) if sound else 0.0
