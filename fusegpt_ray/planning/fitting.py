"""Whether a planned run fits where it is to work: its GPUs, memory, disks and Ray's object store,
by the formulas of `cost/footprint.py` and by what is known of the machines.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch

from fusegpt_ray.cost.footprint import (
    activation_bytes,
    checkpoint_bytes,
    elements,
    gating_bytes,
    generating_bytes,
    healing_bytes,
    healing_shortage,
    replica_bytes,
    search_shortage,
    shortage,
    sums_bytes,
    training_bytes,
    trial_bytes,
    waiting_bytes,
)
from fusegpt_ray.cost.rates import GPUS, known_gpu
from fusegpt_ray.model.device import pick_device, pick_dtype
from fusegpt_ray.model.memory import device_bytes, free_bytes
from fusegpt_ray.model.placement import HOST_SHARE
from fusegpt_ray.model.weights import RESIDENT_SHARE
from fusegpt_ray.planning.plan import Plan
from fusegpt_ray.recipe.cluster_section import Cluster
from fusegpt_ray.recipe.gpu_prices import price_of
from fusegpt_ray.store import storage
from fusegpt_ray.workers.room import Allocation, way_alone

OBJECT_STORE_SHARE = 0.3
"""Of the memory, that a local Ray takes for its object store where nobody says how much."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Device:
    """What each process computes on."""

    name: str
    """As `rates.GPUS` has it, or what torch says."""
    kind: str
    """What torch calls it: "cuda" or "cpu"."""
    memory: int
    """Bytes."""
    full_name: str = ""
    """What torch says, where that is more than the name."""

    def price(self, cluster: Cluster) -> float | None:
        """Of one and an hour; None: nobody has said it, or it is no GPU."""
        if self.kind != "cuda":
            return None
        return price_of(cluster.gpu_hour_price, self.full_name or self.name)

    @classmethod
    def here(cls) -> Device:
        """This machine's."""
        device = pick_device()
        said = torch.cuda.get_device_name(device) if device.type == "cuda" else "this machine's CPU"
        return cls(known_gpu(said) or said, device.type, device_bytes(device), said)

    @classmethod
    def named(cls, gpu: str) -> Device:
        """One of `rates.GPUS`."""
        memory = GPUS[gpu].memory
        return cls(gpu, "cuda", memory, f"{gpu} {memory // 10**9}GB")


@dataclass(frozen=True)
class There:
    """What is known of where a run is to work; None: nobody knows."""

    gpus: float | None = None
    cpus: float | None = None
    """That Ray counts, where it gives no more processes than these; a local Ray gives as many as
    are asked for."""
    memory: int | None = None
    """Free bytes of the host's, where all processes are on this machine."""

    @classmethod
    def here(cls) -> Self:
        """All of it is done on this machine."""
        return cls(torch.cuda.device_count(), memory=free_bytes(torch.device("cpu")))


@dataclass(frozen=True)
class Fitting:
    """A plan beside what there is for it."""

    plan: Plan
    device: Device
    there: There = There()

    @cached_property
    def dtype(self) -> torch.dtype:
        dense = self.plan.model.stack
        return pick_dtype(self.plan.recipe.model.dtype, dense, torch.device(self.device.kind))

    @property
    def streams(self) -> bool:
        """Whether replicas read the weights for every walk; `auto` is decided by all of the
        memory.
        """
        if (asked := self.plan.recipe.cluster.weights) != "auto":
            return asked == "streamed"
        dense = self.plan.model.stack
        held = sum(elements(block.weights) for block in dense.blocks) * self.dtype.itemsize
        return held > RESIDENT_SHARE * self.device.memory

    def processes(self) -> Iterator[Row]:
        """{"what", "needs", "there", "enough", "advice"}: the GPUs and CPUs without which the run
        does not begin. The last three are None where nobody knows.
        """
        recipe, there = self.plan.recipe, self.there
        cluster, local = recipe.cluster, recipe.cluster.engine == "local"
        each = _each(cluster, self.device)
        way = way_alone(each)
        least = Allocation.of(
            cluster, each, recipe.trains, "shared" if way == "shared" else "turns"
        )
        if each:
            lower = "cluster.gpus_per_replica, " if cluster.gpus_per_replica else ""
            advice = f"lower {lower}cluster.replicas and cluster.workers"
            yield _enough("GPUs", 1.0 if local else least.gpus, there.gpus, advice)
        if there.cpus is not None and not local:
            advice = "lower cluster.replicas and cluster.workers"
            count = float(max(least.replicas, least.workers))
            yield _enough("CPUs, one for each process", count, there.cpus, advice)

    def memory(self) -> Iterator[Row]:
        """{"what", "bytes", "room", "fits", "advice"} of each kind of process, and of all that
        share a GPU or this machine's memory.
        """
        recipe, dense, room, dtype = (
            self.plan.recipe,
            self.plan.model.stack,
            self.device.memory,
            self.dtype,
        )
        depths = [len(dense) - target.fewer for target in self.plan.targets]
        windows, length = recipe.importance.batch, recipe.calibration.length
        scored = replica_bytes(dense, dtype, windows, length)
        what = "each replica" if recipe.spec.choice == "none" else "scoring, each replica"
        yield from self._apiece(what, scored, "a lower importance.batch needs less")
        if recipe.spec.choice == "gates":
            needed, advice = gating_bytes(recipe, dense, dtype), "method: mi needs no gradients"
            yield _row("training the gates, one replica", needed, room, advice)
        if any(stage.name == "generating" for stage in self.plan.cost.stages):
            needed = generating_bytes(dense, dtype, length)
            advice = "give text that was written elsewhere in data, or use other devices"
            yield from self._apiece("writing text, each replica", needed, advice)
        if recipe.spec.trains:
            needed = training_bytes(recipe, dense, dtype, self.plan.rounds)
            needed += activation_bytes(recipe, dense, dtype)
            advice = shortage(recipe, dense, dtype, self.plan.rounds, room)
            yield from self._apiece("fine-tuning, each worker", needed, advice)
        if recipe.heal:
            needed = healing_bytes(recipe, dense, dtype, depths[0])
            advice = healing_shortage(recipe, dense, dtype, depths[0], room)
            yield from self._apiece("healing, each worker", needed, advice)
        if recipe.search:
            needed = trial_bytes(recipe, dense, dtype, depths[-1])
            advice = search_shortage(recipe, dense, dtype, depths[-1], room)
            yield from self._apiece("search, each replica", needed, advice)

    def _apiece(self, what: str, needed: int, advice: str) -> Iterator[Row]:
        """Of one process, and of as many as share the memory."""
        room, cluster = self.device.memory, self.plan.recipe.cluster
        yield _row(what, needed, room, advice)
        kind = what.rpartition(" ")[2]
        asked = {"replica": "replicas", "worker": "workers"}[kind]
        held = Allocation.alone(cluster, self.plan.recipe.trains)
        count, each = getattr(held, asked), _each(cluster, self.device)
        if cluster.engine == "local":
            return
        if 0 < each < 1 and kind == "replica":
            count, where = min(count, int(1 / each)), "of a GPU"
        elif not each and self.there.memory is not None:
            where = "of this machine"
        else:
            return
        whole, beside = count * needed, ""
        if kind == "worker":  # replicas are there as well, and keep what they hold between walks
            whole, beside = whole + held.replicas * self._kept, f" and {_many(held.replicas)}"
        if count > 1 or beside:
            fewer = "a larger cluster.gpus_per_replica needs" if each else "fewer processes need"
            together = f"{_many(count, kind)}{beside} {where}"
            name = f"{what.rpartition(', ')[0] or 'together'}, {together}"
            yield _row(name, whole, room, f"{name}: {fewer} less")

    @property
    def _kept(self) -> int:
        """By a replica between its walks."""
        dense = self.plan.model.stack
        blocks = [] if self.streams else dense.blocks
        numbers = elements(dense.trunk) + sum(elements(block.weights) for block in blocks)
        return numbers * self.dtype.itemsize

    def storage(self) -> Iterator[Row]:
        """The same of what is read before the work, what waits for it, and what is written;
        "room" and "fits" are None where nobody knows.
        """
        recipe, dense, here = self.plan.recipe, self.plan.model.stack, self.there.memory
        yield _row("read first, by each process", self.plan.cost.source_bytes, None)
        if waiting := waiting_bytes(recipe, dense, self.dtype):
            what, room = "states on each worker's node, in its memory or in TMPDIR", None
            if here is not None:
                waiting *= 1 if recipe.cluster.engine == "local" else recipe.cluster.workers
                what = "states of all workers, in memory or in TMPDIR"
                room = max(int(HOST_SHARE * here), _free_disk(tempfile.gettempdir()))
            yield _row(what, waiting, room, "give TMPDIR a larger disk")
        yield from self._cache()
        yield from self._written()
        if (sums := sums_bytes(recipe, dense)) and recipe.cluster.engine == "ray":
            given = recipe.cluster.object_store_gb
            room = int(given * 1e9) if given and here is not None else None
            if not given and here is not None:
                room = int(OBJECT_STORE_SHARE * here)
            advice = "a larger cluster.object_store_gb holds it; Ray moves the rest to a disk"
            yield _row("sums that replicas send, in the object store", sums, room, advice)

    def _cache(self) -> Iterator[Row]:
        """Of blocks that come from another machine, on the disk of each node."""
        recipe, dense = self.plan.recipe, self.plan.model.stack
        refs = [*dense.refs]
        far = {ref.file for ref in refs if "://" in ref.file and storage.is_remote(ref.file)}
        needed = sum(ref.end - ref.begin for ref in refs if ref.file in far)
        if storage.is_remote(recipe.output.uri):
            needed += self._blocks_written
        limit = recipe.cluster.cache_gb
        if not needed or limit == 0:
            return
        room = None if limit is None else int(limit * 1e9)
        if room is None and self.there.memory is not None:
            room = _free_disk(os.environ.get("FUSEGPT_CACHE") or tempfile.gettempdir()) // 2
        advice = "what does not fit is fetched each time; raise cluster.cache_gb"
        yield _row("blocks kept on each node's disk", needed, room, advice)

    @property
    def _blocks_written(self) -> int:
        """By rounds and healing."""
        recipe = self.plan.recipe
        held = Allocation.alone(recipe.cluster, recipe.trains)
        rows = self.plan.traffic_of(self.plan.targets, held, self.streams)
        return sum(row.written for row in rows if row.stage != "publishing")

    def _written(self) -> Iterator[Row]:
        recipe, dense = self.plan.recipe, self.plan.model.stack
        kept = max(len(dense) - target.fewer for target in self.plan.targets)
        checkpoint = checkpoint_bytes(recipe, dense, self.plan.rounds, kept)
        if checkpoint:
            yield _row("training checkpoints, of which there are two at times", checkpoint, None)
        published = sum(self.plan.cost.published_bytes.values())
        whole = self._blocks_written + checkpoint + published
        room, output = None, storage.absolute(recipe.output.uri)
        if self.there.memory is not None and not storage.is_remote(output):
            room = _free_disk(output.removeprefix("file://"))
        advice = "what is written does not fit: give output.uri a place with more room"
        yield _row("all that is written below output.uri", whole, room, advice)


def _each(cluster: Cluster, device: Device) -> float:
    """GPUs of a replica."""
    if device.kind != "cuda":
        return 0.0
    if cluster.engine == "local" or cluster.gpus_per_replica is None:
        return 1.0
    return cluster.gpus_per_replica


def _enough(what: str, needs: float, there: float | None, advice: str) -> Row:
    enough = None if there is None else needs <= there
    told = "" if enough is not False else advice
    return {"what": what, "needs": needs, "there": there, "enough": enough, "advice": told}


def _row(what: str, needed: int, room: int | None, advice: str = "") -> Row:
    fits = None if room is None else needed <= room
    told = "" if fits is not False else advice
    return {"what": what, "bytes": needed, "room": room, "fits": fits, "advice": told}


def _free_disk(folder: str) -> int:
    """Where that folder is, or will be."""
    path = Path(folder).expanduser().absolute()
    there = next(place for place in (path, *path.parents) if place.exists())
    return shutil.disk_usage(there).free


def _many(count: int, kind: str = "replica") -> str:
    return f"{count} {kind}{'s' * (count != 1)}"
