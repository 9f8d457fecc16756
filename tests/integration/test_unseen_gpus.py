"""Processes on Ray see the GPUs that they were given, and no others, on a Ray that starts here and
on a cluster that is joined.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import ray

pytestmark = pytest.mark.integration

LOOK = """
import json, os
import ray
from ray.cluster_utils import Cluster as Nodes
from fusegpt_ray.distributed.connection import Connection
from fusegpt_ray.recipe.cluster_section import Cluster

def seen(*_):
    return os.environ.get("CUDA_VISIBLE_DEVICES")

class Looking:
    def seen(self):
        return seen()

address = None
if {joined}:
    head = {{"num_cpus": 4, "num_gpus": 2, "object_store_memory": 100_000_000}}
    nodes = Nodes(initialize_head=True, head_node_args=head)
    address = nodes.address
cluster = Cluster(address=address, gpus_per_replica=0)
Connection.open(cluster)
actor = ray.remote(num_cpus=0)(Looking)
found = {{"actor": [ray.get(actor.remote().seen.remote())]}}
if {libraries}:
    import ray.data
    from fusegpt_ray.distributed.apiece import apiece

    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = ray.data.from_items([0]).map(lambda row: {{"seen": str(seen())}}, num_cpus=1).take_all()
    found["of each"] = [value for _, value in apiece(seen, [(1,)], cluster)]
    found["data"] = [row["seen"] for row in rows]
if {joined}:
    found["with a part of one"] = [ray.get(actor.options(num_gpus=0.4).remote().seen.remote())]
print("FOUND", json.dumps(found))
ray.shutdown()
if {joined}:
    nodes.shutdown()
"""


def test_in_a_run_of_ones_own(ray_session: None) -> None:
    class Looking:
        def seen(self) -> str | None:
            return os.environ.get("CUDA_VISIBLE_DEVICES")

    actor = ray.remote(num_cpus=0)(Looking).remote()
    assert ray.get(actor.seen.remote()) == ""


def look(joined: bool, libraries: bool) -> dict[str, list[str]]:
    """What each kind of process sees, where the node has the GPUs 0 and 1.

    `libraries`: also those that Ray Data and our own tasks run in, which take long to start.
    """
    without = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RAY_ADDRESS", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO")
    }
    done = subprocess.run(
        [sys.executable, "-c", LOOK.format(joined=joined, libraries=libraries)],
        env=without | {"CUDA_VISIBLE_DEVICES": "0,1", "RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    found: dict[str, list[str]] = json.loads(line.removeprefix("FOUND "))
    return found


@pytest.mark.parametrize(
    ("joined", "libraries"),
    [(False, True), (True, True), (True, False)],
    ids=["started here", "joined", "an actor alone"],
)
def test_processes_that_asked_for_no_gpu_see_none(joined: bool, libraries: bool) -> None:
    found = look(joined, libraries)
    given = found.pop("with a part of one", None)
    kinds = ["actor", "of each", "data"] if libraries else ["actor"]
    assert found == {kind: [""] for kind in kinds}
    if joined:
        assert given in (["0"], ["1"])
