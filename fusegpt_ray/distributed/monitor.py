"""A run in Ray's own metrics, which Prometheus reads from every node: `ray_fusegpt_round` and the
like, told by the driver. `cluster/grafana.json` is a dashboard of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from ray.util import metrics

from fusegpt_ray.terminal.display import Listener
from fusegpt_ray.tracking.values import METRICS, measured

PREFIX = "fusegpt_"


def listener(run: str) -> Listener:
    """Tells Ray of the run of this name."""

    def hear(event: str, values: Mapping[str, Any]) -> None:
        for item in measured(event, values):
            metric, tags = _metric(item.name), {"run": run, **item.labels}
            if isinstance(metric, metrics.Gauge):
                metric.set(item.value, tags=tags)
            elif item.value > 0:
                metric.inc(item.value, tags=tags)

    return hear


@cache
def _metric(name: str) -> Any:
    """One object for a process: Ray knows a metric by its name."""
    known = METRICS[name]
    kind = metrics.Gauge if known.kind == "gauge" else metrics.Counter
    return kind(PREFIX + name, known.description, tag_keys=("run", *known.labels))
