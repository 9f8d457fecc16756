"""On a cluster of several nodes, local paths must mean the same files everywhere: looked at before any work is given out."""

from __future__ import annotations

import tempfile
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fusegpt_ray.errors import UserError
from fusegpt_ray.model.source import Source
from fusegpt_ray.store import storage
from fusegpt_ray.workers.base import Setup


def check_paths(setup: Setup) -> None:
    """A hub model is downloaded to every node; any other local path must be in a folder that all nodes share.

    Raises:
        UserError: a node does not see the model's files, or what is written to `output.uri`.
    """
    if len(alive_nodes()) < 2:
        return
    source, dense = setup.source, setup.dense
    refs = [
        *dense.trunk.values(),
        *(ref for block in dense.blocks for ref in block.weights.values()),
    ]
    files = sorted({ref.file for ref in refs if "://" not in ref.file})
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


def alive_nodes() -> set[str]:
    """The ids of the nodes that are there."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def nodes_without(files: list[str], hub: Source | None = None) -> list[str]:
    """Addresses of the nodes that lack one of the files, after a download to each of them where they come from the hub."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    tasks = []
    for node in nodes:
        here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        tasks.append(_sees.options(num_cpus=0, scheduling_strategy=here).remote(files, hub))
    return [
        node["NodeManagerAddress"]
        for node, sees in zip(nodes, ray.get(tasks), strict=True)
        if not sees
    ]


@ray.remote
def _sees(files: list[str], hub: Source | None) -> bool:
    if hub is not None:
        hub.fetch()
    return all(Path(file).exists() for file in files)
