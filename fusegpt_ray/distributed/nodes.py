"""What a cluster must have before work is given out: enough GPUs and CPUs, and on several nodes the
same files at the same paths.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray.exceptions import TaskUnschedulableError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fusegpt_ray.distributed.autoscaler import asking, bundles
from fusegpt_ray.distributed.silence import SilentError, answer
from fusegpt_ray.errors import UserError
from fusegpt_ray.model.source import Source
from fusegpt_ray.recipe.cluster_section import Cluster
from fusegpt_ray.store import storage
from fusegpt_ray.workers.base import Setup
from fusegpt_ray.workers.room import Need

_LOG = logging.getLogger(__name__)
KNOWN_SECONDS = 30.0
"""In which all nodes know of one that joins. Until then Ray refuses tasks for it."""


def wait_for_resources(gpus: float, processes: int, cluster: Cluster, grows: bool) -> None:
    """Ask an autoscaler for the GPUs and CPUs that the cluster lacks, and wait for them.

    Args:
        processes: how many run at the same time, each on a CPU of its own.
        grows: whether nodes may join. A Ray that was started here has all it will ever have.

    Raises:
        UserError: they are not there after `cluster.wait_minutes`.
    """
    wanted = {"GPU": gpus, "CPU": float(processes)}

    def lacking() -> list[str]:
        total = resources(cluster)
        return [kind for kind, number in wanted.items() if number > total.get(kind, 0)]

    if lacking() and grows and cluster.wait_minutes:
        until = time.monotonic() + 60 * cluster.wait_minutes
        with asking() as ask:
            while lacking() and time.monotonic() < until:
                ask([bundles(gpus, processes, cluster)])
                time.sleep(1)
    if not (kinds := lacking()):
        return
    kind, there = kinds[0], resources(cluster).get(kinds[0], 0)
    waited = f" after {cluster.wait_minutes:g} minutes" if grows and cluster.wait_minutes else ""
    problem = f"{wanted[kind]:g} {kind}s are needed, the cluster has {there:g}{waited}"
    if cluster.labels:
        problem = problem.replace("the cluster has", "the nodes with these labels have")
        fix = "check the nodes' labels (`ray list nodes --detail`), or lower cluster.replicas"
        raise UserError("cluster.labels", cluster.labels, problem, f"{fix} or cluster.workers")
    if kind == "GPU":
        fix = "lower it, cluster.replicas or cluster.workers"
        raise UserError("cluster.gpus_per_replica", cluster.gpus_per_replica, problem, fix)
    fix = "lower cluster.replicas and cluster.workers"
    raise UserError("cluster.replicas", cluster.replicas, problem, fix)


def check_paths(setup: Setup) -> None:
    """Check that every node sees the model's files and the output. A hub model is downloaded to
    every node. Any other local path must be in a folder that all nodes share.

    Raises:
        UserError: a node does not see the model's files, or what is written to `output.uri`.
    """
    if len(alive_nodes()) < 2:
        return
    source, dense = setup.source, setup.dense
    files = sorted({ref.file for ref in dense.refs if "://" not in ref.file})
    fix = "use object storage, or a folder that all nodes share"
    if blind := nodes_without(files, source if source.on_hub else None):
        problem = f"node {blind[0]} has no {files[0]}"
        raise UserError("model.source", source.name, problem, f"{fix} (for hub models: HF_HOME)")
    if setup.output_uri is None:
        return
    output = storage.absolute(setup.output_uri)
    if "://" not in output:
        there = next(folder for folder in (Path(output), *Path(output).parents) if folder.exists())
        with tempfile.NamedTemporaryFile(dir=there, prefix=".shared-") as probe:
            if blind := nodes_without([probe.name]):
                raise UserError(
                    "output.uri",
                    setup.output_uri,
                    f"node {blind[0]} does not see this folder",
                    fix,
                )


def alive_nodes(labels: Mapping[str, str] | None = None) -> set[str]:
    """The ids of the nodes that are alive and have these labels."""
    return {node["NodeID"] for node in _labelled(labels or {})}


def resources(cluster: Cluster) -> dict[str, float]:
    """What there is, free or not, where `cluster.labels` lets processes run."""
    if not cluster.labels:
        found: dict[str, float] = ray.cluster_resources()
        return found
    total: Counter[str] = Counter()
    for node in _labelled(cluster.labels):
        total.update(node["Resources"])
    return dict(total)


def gpus_of_nodes(labels: Mapping[str, str]) -> list[float]:
    """How many GPUs each node with these labels has, of those that have any."""
    found = [node["Resources"].get("GPU", 0.0) for node in _labelled(labels)]
    return [gpus for gpus in found if gpus]


def free_gpus(labels: Mapping[str, str]) -> list[float]:
    """How much of its GPUs nobody holds, of each node with these labels that has any. What was
    given out within the last second may still be counted.
    """
    free = available_resources_per_node()
    nodes = [node for node in _labelled(labels) if node["Resources"].get("GPU")]
    return [free.get(node["NodeID"], node["Resources"]).get("GPU", 0.0) for node in nodes]


def most_on_a_node(labels: Mapping[str, str], gpus: float) -> int:
    """How many processes find room on one node with these labels, each on a CPU and with so much of
    a GPU, or so many: Ray may put all of them there. At least one.
    """

    def room(has: Mapping[str, float]) -> int:
        cpus = int(has.get("CPU", 0))
        if not gpus:
            return cpus
        whole = int(has.get("GPU", 0))
        return min(cpus, whole * int(1 / gpus) if gpus < 1 else int(whole / gpus))

    return max([1, *(room(node["Resources"]) for node in _labelled(labels))])


class Ours:
    """What is there for this process on the nodes that have the labels of one of these clusters:
    all but what others hold. That is what is held at first, before anything of ours is, or what is
    held later where that is less. So a node that joins is ours, one that is lost takes along what
    others held there, and it does not matter what our own processes hold at the moment.
    """

    def __init__(self, clusters: Sequence[Cluster]) -> None:
        self._labels = [cluster.labels.items() for cluster in clusters]
        self._others = {node: held for node, (_, held) in self._look().items()}

    def now(self) -> tuple[Need, Need]:
        """What there is for us, and what others hold."""
        ours, others = Counter[str](), Counter[str]()
        for node, (total, held) in self._look().items():
            # `&` takes the smaller of two, `-` and `+` leave out what is nothing.
            self._others[node] = held & self._others.get(node, Counter())
            ours += total - self._others[node]
            others += self._others[node]
        return Need(ours["GPU"], ours["CPU"]), Need(others["GPU"], others["CPU"])

    def _look(self) -> dict[str, tuple[Counter[str], Counter[str]]]:
        """What each node has, and what of it is held. One that has just joined is all free."""
        free, found = available_resources_per_node(), {}
        for node in _labelled({}):
            if any(labels <= node.get("Labels", {}).items() for labels in self._labels):
                total = Counter[str](node["Resources"])
                found[node["NodeID"]] = total, total - Counter(free.get(node["NodeID"], total))
        return found


def _labelled(labels: Mapping[str, str]) -> list[dict[str, Any]]:
    nodes = (node for node in ray.nodes() if node["Alive"])
    return [node for node in nodes if labels.items() <= node.get("Labels", {}).items()]


def nodes_without(files: list[str], hub: Source | None = None) -> list[str]:
    """Addresses of the nodes that lack one of the files, or do not answer, as where a shared folder
    hangs. The files of a hub model are downloaded first.
    """

    def look(node: str) -> ray.ObjectRef:
        here = NodeAffinitySchedulingStrategy(node, soft=False)
        return _sees.options(num_cpus=0, scheduling_strategy=here).remote(files, hub)

    def sees(node: str, looking: ray.ObjectRef) -> bool:
        until = time.monotonic() + KNOWN_SECONDS
        while True:
            try:
                # A download may take long, and is told of by itself where nothing comes.
                return bool(ray.get(looking) if hub else answer(looking, f"node {node}", advice))
            except SilentError as error:
                _LOG.warning("%s", error)
                return False
            except TaskUnschedulableError:
                if node not in alive_nodes():
                    return True  # it has left, and nothing will be looked for there
                if time.monotonic() > until:
                    raise
            time.sleep(0.1)
            looking = look(node)

    advice = f"see there whether `ls {files[0]}` comes to an end"
    nodes = [(node, look(node["NodeID"])) for node in _labelled({})]
    return [node["NodeManagerAddress"] for node, of in nodes if not sees(node["NodeID"], of)]


@ray.remote
def _sees(files: list[str], hub: Source | None) -> bool:
    if hub is not None:
        hub.fetch()
    return all(Path(file).exists() for file in files)
