"""What a run has spent, and what it may spend. Light: no torch.

The clock of a run goes while one of its processes has workers: from their start until the run ends,
over all processes that have worked under its name. Each heartbeat (`heartbeat.json`) tells how
much that is by now, and the next process goes on counting from there; so a SIGKILL costs the count
at most the time between two heartbeats. GPU-seconds are counted by the names of the GPUs, because
a run may go on on others, and a price may change.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from time import monotonic
from typing import Any

from fusegpt_ray.errors import BudgetSpent
from fusegpt_ray.recipe.cluster_section import Cluster
from fusegpt_ray.recipe.gpu_prices import cost, price_of, unpriced
from fusegpt_ray.run.lease import read_heartbeat
from fusegpt_ray.run.notes import CHECKPOINT
from fusegpt_ray.store import storage
from fusegpt_ray.store.records import DamagedRecord, opened

SPENT = "spent"
"""Its key in a heartbeat and in a manifest."""


@dataclass
class Budget:
    """Of one run."""

    cluster: Cluster
    folder: str
    """Of the run."""
    gpus: float = 0.0
    """That the workers of this process hold together."""
    gpu: str = ""
    """What torch calls these."""
    began: float | None = field(default_factory=lambda: monotonic())
    """When they were there; None: this process has none."""

    @cached_property
    def before(self) -> tuple[float, dict[str, float]]:
        """Seconds, and GPU-seconds by the GPU, of the processes before this one; to be asked for
        before this one sends a heartbeat. What earlier versions told of no GPU by name is taken
        to be of those that this process holds.
        """
        told = read_heartbeat(self.folder).get(SPENT)
        told = told if isinstance(told, dict) else {}
        by_gpu, held = told.get("by_gpu"), dict[str, float]()
        if not isinstance(by_gpu, dict):
            by_gpu = {"": told.get("gpu_seconds")}
        for gpu, seconds in by_gpu.items():
            if amount := _amount(seconds):
                held[gpu or self.gpu] = held.get(gpu or self.gpu, 0.0) + amount
        return (_amount(told.get("seconds")), held)

    def forget(self) -> None:
        """The run begins anew."""
        self.before = (0.0, {})
        self.began = self.began and monotonic()

    @property
    def spent(self) -> dict[str, Any]:
        """{"seconds", "gpu_seconds", "by_gpu": these by the GPU, "money"} until now; the last one
        only where all of these GPUs have a price.
        """
        now = 0.0 if self.began is None else monotonic() - self.began
        seconds, held = self.before
        if self.gpus:
            held = held | {self.gpu: held.get(self.gpu, 0.0) + now * self.gpus}
        by_gpu = {gpu: round(amount, 3) for gpu, amount in held.items()}
        told = {"seconds": round(seconds + now, 3), "gpu_seconds": round(sum(by_gpu.values()), 3)}
        money = cost(self.cluster.gpu_hour_price, by_gpu)
        return {**told, "by_gpu": by_gpu, **({} if money is None else {"money": round(money, 6)})}

    @property
    def told(self) -> dict[str, float]:
        """{"hours", "gpu_hours", "money"} until now; the last one as in `spent`."""
        spent = self.spent
        hours = {"hours": spent["seconds"] / 3600, "gpu_hours": spent["gpu_seconds"] / 3600}
        return hours | {key: spent[key] for key in spent.keys() & {"money"}}

    def check_prices(self) -> None:
        """
        Raises:
            UserError: see `refuse_unpriced`; of GPUs that the run holds, or has held.
        """
        refuse_unpriced(self.cluster, self.spent["by_gpu"])

    def check(self) -> None:
        """
        Raises:
            BudgetSpent: nothing is left.
            UserError: see `check_prices`.
        """
        self.check_prices()
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


def refuse_unpriced(cluster: Cluster, gpus: Iterable[str]) -> None:
    """
    Args:
        gpus: their names, as torch gives them; an empty one is of none.

    Raises:
        UserError: one of them has no price, and `cluster.max_cost` is given.
    """
    for gpu in gpus:
        if cluster.max_cost and gpu and price_of(cluster.gpu_hour_price, gpu) is None:
            raise unpriced(cluster.gpu_hour_price, gpu)


def _amount(value: Any) -> float:
    """What can be read of it: anything may stand in a file."""
    sound = type(value) in (int, float) and math.isfinite(value) and value >= 0
    return float(value) if sound else 0.0
