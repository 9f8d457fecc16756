"""What `fusegpt plan` tells of a run: its work, how long that takes, and whether it fits. All is
known from the recipe and the headers of the model's files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from fusegpt_ray.cost.footprint import (
    activation_bytes,
    elements,
    gating_bytes,
    healing_bytes,
    healing_shortage,
    replica_bytes,
    search_shortage,
    shortage,
    training_bytes,
    trial_bytes,
    waiting_bytes,
)
from fusegpt_ray.cost.rates import GPUS, RATES, known_gpu
from fusegpt_ray.model.device import pick_device, pick_dtype
from fusegpt_ray.model.memory import device_bytes
from fusegpt_ray.model.weights import RESIDENT_SHARE
from fusegpt_ray.plan import Plan
from fusegpt_ray.recipe.cluster_section import Cluster
from fusegpt_ray.workers.room import Held


@dataclass(frozen=True)
class Device:
    """What each process computes on."""

    name: str
    """As `rates.GPUS` has it, or what torch says."""
    kind: str
    """What torch calls it: "cuda" or "cpu"."""
    memory: int
    """Bytes."""

    @classmethod
    def here(cls) -> Device:
        """This machine's."""
        device = pick_device()
        said = torch.cuda.get_device_name(device) if device.type == "cuda" else "this machine's CPU"
        return cls(known_gpu(said) or said, device.type, device_bytes(device))

    @classmethod
    def named(cls, gpu: str) -> Device:
        """One of `rates.GPUS`."""
        return cls(gpu, "cuda", GPUS[gpu].memory)


def outlook(
    plan: Plan, device: Device, gpus: float, measured: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """{"model", "blocks", "parameters", "targets": [{"name", "removes", "adds", "blocks", "width",
    "bytes"} …], "source_bytes", "device", "gpus", "stages": [{"stage", "block_forwards", "flops",
    "seconds", "price"} …], "flops", "seconds", "price", "budget": [{"key", "limit", "needs",
    "enough"} …], "probed", "memory": [{"what", "bytes", "room",
    "fits", "advice"} …], "traffic": [{"stage", "read", "written"} …] in bytes, "storage":
    [{"what", "bytes"} …]}.

    "width" is the hidden size where that becomes smaller, else None. "seconds" are those of
    computing alone, and None where the device's rates are not known. "price" is that of all GPUs
    for so long, by `cluster.gpu_hour_price`, and None where that or the time is not known, or there
    is no GPU.

    Args:
        gpus: that all processes hold together.
        measured: the device's rates, where they were probed; None: what `rates.py` has.
    """
    recipe, dense, cost = plan.recipe, plan.model.stack, plan.cost
    rates = measured or RATES.get(device.name)
    held = replace(Held.alone(recipe.cluster, recipe.trains), gpus=gpus)
    stages = cost.rows(rates, held)
    seconds = sum(row["seconds"] for row in stages) if rates else None
    hourly = recipe.cluster.gpu_hour_price if device.kind == "cuda" else None
    for row in stages:
        row["price"] = _price(row["seconds"], gpus, hourly)
    price = _price(seconds, gpus, hourly)
    targets = [
        {
            "name": target.name,
            "removes": target.remove,
            "adds": target.add,
            "blocks": len(dense) - target.fewer,
            "width": target.width.kept if target.width else None,
            "bytes": cost.published_bytes[target.name],
        }
        for target in plan.targets
    ]
    return {
        "model": plan.model.source.name,
        "method": recipe.method,
        "blocks": len(dense),
        "parameters": cost.parameters,
        "source_bytes": cost.source_bytes,
        "targets": targets,
        "device": device.name,
        "gpus": gpus,
        "stages": stages,
        "flops": cost.flops,
        "seconds": seconds,
        "price": price,
        "budget": [*_budget(recipe.cluster, seconds, price)],
        "probed": measured is not None,
        "memory": [*_memory(plan, device)],
        "traffic": [*map(asdict, plan.traffic_of(plan.targets, held, _streams(plan, device)))],
        "storage": [*_storage(plan, device)],
    }


def _price(seconds: float | None, gpus: float, hourly: float | None) -> float | None:
    return None if seconds is None or hourly is None else seconds / 3600 * gpus * hourly


def _budget(
    cluster: Cluster, seconds: float | None, price: float | None
) -> Iterator[dict[str, Any]]:
    """What is limited, and whether the computing alone keeps to it, where that is known."""
    hours = None if seconds is None else seconds / 3600
    for key, needed in (("max_hours", hours), ("max_cost", price)):
        if (limit := getattr(cluster, key)) is not None:
            enough = None if needed is None else needed <= limit
            yield {"key": f"cluster.{key}", "limit": limit, "needs": needed, "enough": enough}


def _streams(plan: Plan, device: Device) -> bool:
    """Whether replicas read the weights for every walk; `auto` is decided by all of the memory."""
    if (asked := plan.recipe.cluster.weights) != "auto":
        return asked == "streamed"
    dense = plan.model.stack
    dtype = pick_dtype(plan.recipe.model.dtype, dense, torch.device(device.kind))
    held = sum(elements(block.weights) for block in dense.blocks) * dtype.itemsize
    return held > RESIDENT_SHARE * device.memory


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


def _storage(plan: Plan, device: Device) -> Iterator[dict[str, Any]]:
    """What is read before the work, and what waits for it."""
    recipe, dense = plan.recipe, plan.model.stack
    dtype = pick_dtype(recipe.model.dtype, dense, torch.device(device.kind))
    yield {"what": "read first, by each process", "bytes": plan.cost.source_bytes}
    if waiting := waiting_bytes(recipe, dense, dtype):
        what = "states on each worker's node, in its memory or in TMPDIR"
        yield {"what": what, "bytes": waiting}


def _memory(plan: Plan, device: Device) -> Iterator[dict[str, Any]]:
    """By the formulas of `footprint.py`, for each kind of process."""
    recipe, dense, room = plan.recipe, plan.model.stack, device.memory
    dtype = pick_dtype(recipe.model.dtype, dense, torch.device(device.kind))
    most, least = (len(dense) - target.fewer for target in (plan.targets[0], plan.targets[-1]))

    def row(what: str, needed: int, advice: str) -> dict[str, Any]:
        fits = needed <= room
        return {
            "what": what,
            "bytes": needed,
            "room": room,
            "fits": fits,
            "advice": "" if fits else advice,
        }

    windows, length = recipe.importance.batch, recipe.calibration.length
    scored = replica_bytes(dense, dtype, windows, length)
    what = "each replica" if recipe.spec.choice == "none" else "scoring, each replica"
    yield row(what, scored, "a lower importance.batch needs less")
    if recipe.spec.choice == "gates":
        needed, advice = gating_bytes(recipe, dense, dtype), "method: mi needs no gradients"
        yield row("training the gates, one replica", needed, advice)
    if recipe.spec.trains:
        needed = training_bytes(recipe, dense, dtype, plan.rounds)
        needed += activation_bytes(recipe, dense, dtype)
        advice = shortage(recipe, dense, dtype, plan.rounds, room)
        yield row("fine-tuning, each worker", needed, advice)
    if recipe.heal:
        needed = healing_bytes(recipe, dense, dtype, most)
        advice = healing_shortage(recipe, dense, dtype, most, room)
        yield row("healing, each worker", needed, advice)
    if recipe.search:
        needed = trial_bytes(recipe, dense, dtype, least)
        yield row(
            "search, each replica", needed, search_shortage(recipe, dense, dtype, least, room)
        )
