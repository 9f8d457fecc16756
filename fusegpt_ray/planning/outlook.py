"""What `fusegpt plan` tells of a run: its work, how long that takes, and whether it fits. All is
known from the recipe and the headers of the model's files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

from fusegpt_ray.cost.rates import RATES
from fusegpt_ray.planning.fitting import Device as Device
from fusegpt_ray.planning.fitting import Fitting, There
from fusegpt_ray.planning.plan import Plan
from fusegpt_ray.recipe.cluster_section import Cluster
from fusegpt_ray.workers.room import Allocation

BEFORE, ROUNDS, AFTER = (
    ("generating", "search"),
    ("scoring", "states", "repair", "slicing", "fine-tuning"),
    ("healing", "evaluation"),
)
"""Stages, as `cost.py` names them: what comes before the rounds, what they are, and what each model
that is to be published has after them."""


def outlook(
    plan: Plan,
    device: Device,
    gpus: float,
    measured: Mapping[str, float] | None = None,
    there: There | None = None,
) -> dict[str, Any]:
    """{"model", "blocks", "parameters", "targets": [{"name", "removes", "adds", "blocks", "width",
    "dense_width", "bytes"} …], "source_bytes", "device", "gpus", "stages": [{"stage",
    "block_forwards", "flops", "seconds", "price"} …], "uncounted": see `Cost`, "flops", "seconds",
    "price", "unpriced", "budget": [{"key", "limit", "needs", "enough"} …], "probed", "order": what
    is done, one after another, in words, "processes", "memory" and "storage": see `Fitting`,
    "traffic": [{"stage", "read", "written"} …] in bytes}.

    "width" is the hidden size where that becomes smaller than "dense_width", else both are None.
    "seconds" are those of computing alone, and None where the device's rates are not known. "price"
    is that of all GPUs for so long, by `cluster.gpu_hour_price`, and None where that or the time is
    not known, or there is no GPU. "unpriced" says that this table of prices lacks the GPU, else it
    is None.

    Args:
        gpus: that all processes hold together.
        measured: the device's rates, where they were probed; None: what `rates.py` has.
        there: what is known of where it will work.
    """
    recipe, dense, cost = plan.recipe, plan.model.stack, plan.cost
    rates = measured or RATES.get(device.name)
    fitting = Fitting(plan, device, there or There())
    held = replace(Allocation.alone(recipe.cluster, recipe.trains), gpus=gpus)
    stages = cost.rows(rates, held)
    seconds = sum(row["seconds"] for row in stages) if rates else None
    hourly = device.price(recipe.cluster)
    for row in stages:
        row["price"] = _price(row["seconds"], gpus, hourly)
    price = _price(seconds, gpus, hourly)
    return {
        "model": plan.model.source.name,
        "method": recipe.method,
        "blocks": len(dense),
        "parameters": cost.parameters,
        "source_bytes": cost.source_bytes,
        "targets": _targets(plan),
        "device": device.name,
        "gpus": gpus,
        "stages": stages,
        "uncounted": [*cost.uncounted],
        "flops": cost.flops,
        "seconds": seconds,
        "price": price,
        "unpriced": _unpriced(recipe.cluster, device),
        "budget": [*_budget(recipe.cluster, seconds, price)],
        "probed": measured is not None,
        "order": order(plan),
        "processes": [*fitting.processes()],
        "memory": [*fitting.memory()],
        "traffic": [*map(asdict, plan.traffic_of(plan.targets, held, fitting.streams))],
        "storage": [*fitting.storage()],
    }


def _targets(plan: Plan) -> list[dict[str, Any]]:
    return [
        {
            "name": target.name,
            "removes": target.remove,
            "adds": target.add,
            "blocks": len(plan.model.stack) - target.fewer,
            "width": target.width.kept if target.width else None,
            "dense_width": target.width.dense if target.width else None,
            "bytes": plan.cost.published_bytes[target.name],
        }
        for target in plan.targets
    ]


def order(plan: Plan) -> list[str]:
    """What is done, one after another."""
    stages = [stage.name for stage in plan.cost.stages]
    found = [name for name in BEFORE if name in stages]
    if plan.recipe.evaluation:
        found.append("evaluation of the dense model")
    count, once = plan.rounds, plan.recipe.spec.choice in ("once", "run", "gates")
    of_each = dict.fromkeys(name for name in stages if name in ROUNDS)
    if once and "scoring" in of_each and count > 1:
        del of_each["scoring"]
        found.append("scoring")
    what = ", ".join(of_each) or ("a block less in each" if plan.targets[-1].remove else "")
    rounds = "1 round" if count == 1 else f"{count} rounds"
    found.append(f"{rounds}: {what}" if what else rounds)
    after = [*(name for name in AFTER if name in stages), "publishing"]
    if plan.recipe.evaluation and "evaluation" not in after:
        after.insert(-1, "evaluation")
    found += [f"{target.name}: {', '.join(after)}" for target in plan.targets]
    return found


def _price(seconds: float | None, gpus: float, hourly: float | None) -> float | None:
    return None if seconds is None or hourly is None else seconds / 3600 * gpus * hourly


def _unpriced(cluster: Cluster, device: Device) -> str | None:
    prices = cluster.gpu_hour_price
    if device.kind != "cuda" or not isinstance(prices, dict) or device.price(cluster) is not None:
        return None
    return f"no price of {device.name} in cluster.gpu_hour_price, which has {', '.join(prices)}"


def _budget(
    cluster: Cluster, seconds: float | None, price: float | None
) -> Iterator[dict[str, Any]]:
    """What is limited, and whether the computing alone keeps to it, where that is known."""
    hours = None if seconds is None else seconds / 3600
    for key, needed in (("max_hours", hours), ("max_cost", price)):
        if (limit := getattr(cluster, key)) is not None:
            enough = None if needed is None else needed <= limit
            yield {"key": f"cluster.{key}", "limit": limit, "needs": needed, "enough": enough}


def over_budget(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """What is said of the "budget" of an outlook: limits that are not enough, or of which nobody
    knows whether they are.
    """
    for row in rows:
        limit = f"{row['key']} = {row['limit']:.9g}"
        if row["enough"] is None:
            yield f"whether {limit} is enough, is not known"
        elif not row["enough"]:
            yield f"{limit} is not enough: {row['needs']:,.2f} are needed to compute alone"
