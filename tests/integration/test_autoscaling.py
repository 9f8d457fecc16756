"""On a cluster without nodes, with Ray's own autoscaler: a single run and a family ask for nodes,
get them, and they are given back. Its nodes are processes on this machine that claim a GPU each.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
from submitting import environment, running_head

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

NODES = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
VARIABLES = {
    "RAY_enable_autoscaler_v2": "1",
    "RAY_FAKE_CLUSTER": "1",
    "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
}
WORK = """
import json, sys, threading, time
from pathlib import Path
import ray
from fusegpt_ray.distributed import autoscaler, sets
from fusegpt_ray.family.members import Members
from fusegpt_ray.family.run import compress_family
from fusegpt_ray.pipeline import compress
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.terminal.display import Display
from ray._raylet import GcsClient
from ray.autoscaler.v2.sdk import get_cluster_resource_state
from ray.core.generated.autoscaler_pb2 import NodeStatus

address, single, family = sys.argv[1], *map(json.loads, sys.argv[2:])
client, seen = GcsClient(address=address), []

def look():
    "How many nodes there are, and for how many GPUs or CPUs the autoscaler is asked."
    state = get_cluster_resource_state(client)
    here = (node for node in state.node_states if node.status != NodeStatus.DEAD)
    nodes = sum(node.total_resources.get("GPU", 0) > 0 for node in here)
    wanted = {}
    for one in state.cluster_resource_constraints:
        for request in one.resource_requests:
            (kind,) = request.request.resources_bundle
            wanted[kind] = wanted.get(kind, 0) + request.count
    return [nodes, wanted.get("GPU", 0), wanted.get("CPU", 0)]

def watch():
    while True:
        found = look()
        if not seen or found != seen[-1]:
            seen.append(found)
        time.sleep(0.2)

class Said(Display):
    "The first two members meet: each waits for the other to be at work."
    meeting, left = threading.Barrier(2), 2

    def say(self, text):
        seen.append(text)
        if "] — " in text and self.left:
            self.left -= 1
            self.meeting.wait(300)

def until_none():
    until = time.monotonic() + 60
    while look()[0] and time.monotonic() < until:
        time.sleep(0.2)
    seen.extend([look(), "end"])

threading.Thread(target=watch, daemon=True).start()
compress(Recipe.parse(single), Said())
until_none()
# A replica on a GPU needs CUDA: a set claims a GPU in the room that it is counted with alone.
sets.gpus_of = lambda cluster: 1.0
autoscaler.SURE = 4.0  # Ray's looks every second here
assert compress_family(Members.parse(family), Said())["state"] == "done"
until_none()
print("SEEN", json.dumps(seen))
"""


def autoscaler(file: Path, most: int) -> Callable[[int], Path]:
    """Writes its settings, for a head at this port."""

    def write(port: int) -> Path:
        node = {"resources": {"CPU": 2, "GPU": 1, "object_store_memory": 80_000_000}}
        lists = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray")
        settings = {
            "cluster_name": "made-up",
            "max_workers": most,
            "idle_timeout_minutes": 0.25,
            "provider": {
                "type": "external",
                "module": NODES,
                "gcs_address": f"127.0.0.1:{port}",
                "head_node_id": FAKE_HEAD_NODE_ID,
                "launch_multiple": True,
                "disable_node_updaters": True,
                "disable_launch_config_check": True,
            },
            "head_node_type": "ray.head.default",
            "available_node_types": {
                "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
                "node": node | {"node_config": {}, "min_workers": 0, "max_workers": most},
            },
            **{f"{name}_commands": [] for name in (*lists, "worker_start_ray")},
            "file_mounts": {},
            "cluster_synced_files": [],
        }
        file.write_text(json.dumps(settings))
        return file

    return write


def test_nodes_join_for_those_that_wait_and_are_given_back(
    material: Any, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    """Three members and two nodes that may join."""
    other = shutil.copytree(material.model, tmp_path / "another")
    config = autoscaler(tmp_path / "autoscaler.json", most=2)
    with running_head(free_port, VARIABLES, num_cpus=0, autoscaling_config=config) as head:
        cluster = {"engine": "ray", "address": head.cluster, "gpus_per_replica": 0}
        more = {"sparsity": 0.125, "method": "mi", "cluster": cluster}
        single = material.recipe(tmp_path / "single", **more)
        members = [{"name": "one"}, {"name": "two", "seed": 1}]
        members += [{"name": "three", "model": {"source": str(other)}}]
        family = material.recipe(tmp_path / "family", **more) | {"family": {"members": members}}
        done = subprocess.run(
            [sys.executable, "-c", WORK, head.cluster, json.dumps(single), json.dumps(family)],
            env=environment(), capture_output=True, text=True, timeout=500,
        )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("SEEN ")]
    assert lines, done.stdout + done.stderr
    seen = json.loads(lines[0].removeprefix("SEEN "))
    end = seen.index("end")
    alone, together = seen[:end], seen[end + 1 : -1]
    for part, most, asked in (alone, 1, {(0, 1)}), (together, 2, {(3, 6), (2, 4)}):
        looks = [look for look in part if isinstance(look, list)]
        assert looks[0] == looks[-1] == [0, 0, 0], looks
        assert max(nodes for nodes, *_ in looks) == most, looks
        assert {(gpus, cpus) for _, gpus, cpus in looks} >= asked, looks
    assert "up to 2 runs at once" in together
    begun = [number for number, said in enumerate(together) if "] — " in said]
    later = [look for look in together[begun[2] :] if isinstance(look, list)]
    assert len(begun) == 3 and not any(gpus or cpus for _, gpus, cpus in later), "none waits"
    models = ("single/tiny", "family/tiny-one", "family/tiny-three")
    files = [tmp_path / f"{model}-p12.5/model.safetensors" for model in models]
    assert len({file.read_bytes() for file in files}) == 1
