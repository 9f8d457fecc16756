"""What `fusegpt plan` tells of many runs: each of them, what they share, and when it works on the
given GPUs. All is known from the recipe and the headers of the models' files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, inf
from typing import Any

from fusegpt_ray.cost.cost import Cost
from fusegpt_ray.cost.rates import RATES
from fusegpt_ray.planning.outlook import Device, outlook
from fusegpt_ray.planning.plan import Plan
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.scheduling.schedule import Schedule, Span, Work, schedule
from fusegpt_ray.scheduling.sharing import shared
from fusegpt_ray.scheduling.slots import same_workers
from fusegpt_ray.scheduling.waiting import Entry
from fusegpt_ray.workers.room import Allocation, Need, Room

ROUND_SECONDS = 10.0
"""Of a round, which no GPU shortens."""
START_SECONDS = 20.0
"""Until the processes of a set of workers are there."""
PUBLISHED_A_SECOND = 1e9
"""Bytes of a model, written and read back."""
Rates = Mapping[str, float]


@dataclass(frozen=True)
class PlannedRun:
    """One of many runs."""

    name: str
    """Each has another."""
    plan: Plan
    priority: int = 0

    @property
    def place(self) -> tuple[str, str | None]:
        """Those in one place share it; places follow one another."""
        cluster = self.plan.recipe.cluster
        return cluster.engine, cluster.address


@dataclass(frozen=True)
class Premises:
    """On what they work, and how."""

    device: Device
    gpus: int
    """That there are."""
    at_once: int | None = None
    quota: float | None = None
    """GPUs that all of them together may take."""

    def gpu(self, recipe: Recipe) -> float:
        """GPUs of a replica."""
        cluster = recipe.cluster
        if self.device.kind != "cuda":
            return 0.0
        given = None if cluster.engine == "local" else cluster.gpus_per_replica
        return 1.0 if given is None else given

    def need(self, recipe: Recipe, at_once: bool = False) -> Need:
        if recipe.cluster.engine == "local":
            return Need(self.gpu(recipe))
        return Need.of(recipe.cluster, recipe.trains, self.gpu(recipe), at_once)

    def room(self, recipes: Sequence[Recipe]) -> Room:
        """For the sets of workers of these, which are in one place."""
        if recipes[0].cluster.engine == "local":
            return Room([self.need(one) for one in recipes])
        needs, both = ([self.need(one, way) for one in recipes] for way in (False, True))
        publishers = [Need(self.gpu(one), 2) for one in recipes]
        there = Need(self.gpus, inf)
        if self.device.kind != "cuda":  # sets would share its cores
            return Room.of(needs, both, publishers, None, None, there, there)
        quota = min(self.quota or inf, self.gpus)
        return Room.of(needs, both, publishers, self.at_once, quota, there, there)


def gpus_needed(planned: Sequence[PlannedRun], device: Device) -> int:
    """So many that the largest set of workers finds its own."""
    asked = Premises(device, 0)
    return ceil(max(1.0, *(asked.need(one.plan.recipe).gpus for one in planned)))


def forecast(
    planned: Sequence[PlannedRun],
    asked: Premises,
    probe: Callable[[Plan], Rates] | None = None,
) -> dict[str, Any]:
    """{"device", "gpus", "runs": [see `outlook`; beside that "run", "needs_gpus", "begins",
    "leaves", "ends" and "gpu_hours", which are None where the rates are not known] …, "shared":
    [{"what", "runs", "flops"} …], "flops", "seconds", "gpu_hours", "price", "most_gpus",
    "published_bytes", "lacking": [{"run", "gpus"} …]}.

    "begins", "leaves" and "ends" are seconds since the beginning of all; between the last two a run
    publishes on other workers than its own. Beside computing they have `ROUND_SECONDS`,
    `START_SECONDS` and `PUBLISHED_A_SECOND`, which are assumed. "flops" are those of all runs, what
    is shared counted once.

    Args:
        probe: measures rates for a plan, once for those of the same workers.
    """
    order = sorted(planned, key=lambda one: -one.priority)
    costs, common = shared({one.name: one.plan for one in order})
    rates = {one.name: found for one, found in _rates(planned, asked.device, probe)}
    known = all(rates.values())
    times = _times(planned, costs, asked, rates) if known else Schedule({}, 0.0, 0.0)
    rows = []
    for one in planned:
        count = max(1, ceil(asked.need(one.plan.recipe).gpus)) if asked.gpus > 1 else 1
        measured = rates[one.name] if probe else None
        told = outlook(one.plan, asked.device, min(count, asked.gpus), measured)
        span, needed = times.spans.get(one.name), asked.need(one.plan.recipe).gpus
        rows.append({"run": one.name, "needs_gpus": needed, **told, **_span(span)})
    prices = [asked.device.price(one.plan.recipe.cluster) for one in planned]
    hours = [row["gpu_hours"] for row in rows]
    priced = known and all(prices)
    return {
        "device": asked.device.name,
        "gpus": asked.gpus,
        "probed": probe is not None,
        "runs": rows,
        "shared": common,
        "flops": sum(cost.flops for cost in costs.values()),
        "seconds": times.seconds if known else None,
        "gpu_hours": sum(hours) if known else None,
        "price": sum(h * (p or 0) for h, p in zip(hours, prices, strict=True)) if priced else None,
        "most_gpus": times.most_gpus if known else None,
        "published_bytes": sum(sum(cost.published_bytes.values()) for cost in costs.values()),
        "lacking": [
            {"run": row["run"], "gpus": row["needs_gpus"]}
            for row in rows
            if row["needs_gpus"] > asked.gpus
        ],
    }


def beside_computing(recipe: Recipe, cost: Cost, rounds: int) -> dict[str, float]:
    """Seconds that are assumed for the start of workers, for what no GPU shortens of rounds, and
    for publishing.
    """
    return {
        "starting": START_SECONDS if recipe.cluster.engine == "ray" else 0.0,
        "rounds": rounds * ROUND_SECONDS,
        "publishing": sum(cost.published_bytes.values()) / PUBLISHED_A_SECOND,
    }


def work(name: str, recipe: Recipe, cost: Cost, rounds: int, rates: Rates, gpus: int) -> Work:
    """The seconds of a run.

    Args:
        cost: of what it computes itself.
        gpus: that there are for its processes.
    """
    held = replace(Allocation.of(recipe.cluster, 1.0, recipe.trains, "turns"), gpus=gpus)
    seconds = cost.seconds(rates, held)
    beside = beside_computing(recipe, cost, rounds)
    start, written = beside["starting"], beside["publishing"]
    measuring = seconds.pop("evaluation", 0.0)
    alone = sum(s.flops for s in cost.stages if s.name == "evaluation") / rates["evaluation"]
    # Where models are healed, each is published before the next one is.
    late = 1 / len(cost.published_bytes) if recipe.heal else 1.0
    kept = start + beside["rounds"] + sum(seconds.values())
    kept += (1 - late) * (measuring + written)
    trained = rounds * recipe.trains_groups + len(cost.published_bytes) * (recipe.heal is not None)
    turns = kept + 2 * trained * start
    return Work(name, kept, turns, late * (measuring + written), start + late * (alone + written))


def _times(
    planned: Sequence[PlannedRun],
    costs: Mapping[str, Cost],
    asked: Premises,
    rates: Mapping[str, Rates | None],
) -> Schedule:
    spans, seconds, most = dict[str, Span](), 0.0, 0.0
    for place in dict.fromkeys(one.place for one in planned):
        there = [one for one in planned if one.place == place]
        room = asked.room([one.plan.recipe for one in there])
        groups = [same_workers(one.plan) for one in there]
        entries = []
        for one, need, publisher in zip(there, room.needs, room.publishers, strict=True):
            recipe, cost, found = one.plan.recipe, costs[one.name], rates[one.name]
            assert found is not None
            group = groups.index(same_workers(one.plan))
            job = work(one.name, recipe, cost, one.plan.rounds, found, asked.gpus)
            entries.append(Entry(job, group, need, one.priority, publisher))
        done = schedule(entries, room)
        for name, span in done.spans.items():
            spans[name] = span.later(seconds)
        seconds, most = seconds + done.seconds, max(most, done.most_gpus)
    return Schedule(spans, seconds, most)


def _rates(
    planned: Sequence[PlannedRun], device: Device, probe: Callable[[Plan], Rates] | None
) -> Iterator[tuple[PlannedRun, Rates | None]]:
    measured = dict[str, Rates]()
    for one in planned:
        if probe is None:
            yield one, RATES.get(device.name)
            continue
        alike = same_workers(one.plan)
        if alike not in measured:
            measured[alike] = probe(one.plan)
        yield one, measured[alike]


def _span(span: Span | None) -> dict[str, float | None]:
    if span is None:
        return dict.fromkeys(("begins", "leaves", "ends", "gpu_hours"))
    hours = span.gpu_seconds / 3600
    return {"begins": span.begins, "leaves": span.leaves, "ends": span.ends, "gpu_hours": hours}
