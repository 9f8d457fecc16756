"""Replicas, training workers and tasks run only on nodes that have the recipe's labels: on a real
cluster of two nodes with other labels, of which the one that is not asked for has more room.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

LOOK = """
import json, sys, time
from pathlib import Path
import ray
from ray.cluster_utils import Cluster as Nodes
from models import open_stack
from fusegpt_ray.recipe.cluster_section import Cluster
from fusegpt_ray.distributed.apiece import apiece
from fusegpt_ray.distributed.cluster import RayWorkers
from fusegpt_ray.distributed.sets import joined
from fusegpt_ray.errors import UserError
from fusegpt_ray.model.source import Source
from fusegpt_ray.recipe.sections import Importance
from fusegpt_ray.workers.base import Setup

model, out = sys.argv[1:]
room = {"object_store_memory": 100_000_000}
nodes = Nodes(initialize_head=True, head_node_args=room | {"num_cpus": 8, "num_gpus": 8})
labelled = {"labels": {"pool": "train", "zone": "b"}}
asked = nodes.add_node(num_cpus=5, num_gpus=3, **labelled, **room)  # which nobody uses
pair = [nodes.add_node(num_cpus=2, labels={"pair": "yes"}, **room) for _ in range(2)]

def here(*_):
    return ray.get_runtime_context().get_node_id()

def stay(*_):
    time.sleep(1)  # the next task goes to another one
    return here()

def workers(**keys):
    asked = {"replicas": 2, "workers": 2, "gpus_per_replica": 0} | keys
    cluster = Cluster(address=nodes.address, **asked)
    source, more = Source.find(model, None), {"trains": True, "output_uri": out}
    parts = (cluster, "float32", Importance(batch=2))
    stack = open_stack(Path(model))
    return RayWorkers(Setup(source, stack, *parts, **more, run_folder=out + "/run"))

found = {"asked": asked.node_id}
with workers(labels={"pool": "train"}) as opened:
    found["replicas"] = [node for _, node in opened.map(here, [()] * 8, 2)]
    found["workers"] = opened.spmd(here, news=print)
with workers(labels={"pair": "yes"}, replicas=4, workers=1) as opened:
    found["pair"] = [node.node_id for node in pair]
    found["of many"] = [node for _, node in opened.map(stay, [()] * 4, 2)]
    found["of two"] = [[node for _, node in opened.map(stay, [()] * 2, 2)] for _ in range(4)]
cluster = Cluster(address=nodes.address, labels={"zone": "b"}, gpus_per_replica=0)
found["tasks"] = [node for _, node in apiece(here, [(n,) for n in range(3)], cluster)]
for pools in (["train"], ["train", None]):
    where = [{"pool": pool} if pool else {} for pool in pools]
    clusters = [Cluster(address=nodes.address, labels=labels) for labels in where]
    with joined([Setup(None, None, one) for one in clusters], None, None, "at_once") as place:
        total = place.now().total
        found[f"free for {len(pools)}"] = total.gpus, total.cpus
for labels in ({"pool": "train", "zone": "c"}, {"pool": "none"}):
    try:
        with workers(labels=labels, wait_minutes=0.02):
            found["refused"] = "opened"
    except UserError as error:
        found["refused"] = str(error)
print("FOUND", json.dumps(found))
nodes.shutdown()
"""


def test_processes_run_on_nodes_with_the_labels_alone(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment["RAY_AUTH_MODE"] = "disabled"
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-c", LOOK, str(checkpoint("llama")), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, done.stdout + done.stderr
    found = json.loads(lines[0].removeprefix("FOUND "))
    for what, number in (("replicas", 8), ("workers", 2), ("tasks", 3)):
        assert found[what] == [found["asked"]] * number, what
    # Two processes of a node never share two tasks while the other node has none.
    assert sorted(found["of many"]) == sorted(found["pair"] * 2)
    assert [sorted(nodes) for nodes in found["of two"]] == [sorted(found["pair"])] * 4
    assert (found["free for 1"], found["free for 2"]) == ([3, 5], [11, 17])
    assert found["refused"] == (
        "cluster.labels = {'pool': 'none'}: 2 CPUs are needed, the nodes with these labels have 0"
        " after 0.02 minutes. Fix: check the nodes' labels (`ray list nodes --detail`), or lower"
        " cluster.replicas or cluster.workers."
    )
