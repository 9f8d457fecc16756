"""No two training workers come to one GPU, on real clusters that claim GPUs: where there are more
GPUs than replicas, and where replicas are lost while others train.

Ray, its placement, Ray Train and the run's own job are real. There are no GPUs: so workers talk by
gloo and compute on CPUs, and replicas, which only have a place here, compute nothing.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

LOOK = """
import json, os, signal, sys
from pathlib import Path
import ray
from ray.cluster_utils import Cluster as Nodes
from models import open_stack
from fusegpt_ray.distributed import cluster as module
from fusegpt_ray.distributed.cluster import RayWorkers
from fusegpt_ray.model.source import Source
from fusegpt_ray.recipe.cluster_section import Cluster
from fusegpt_ray.recipe.sections import Importance
from fusegpt_ray.workers.base import Setup

model, out, cases = sys.argv[1:]

def without_gpus():
    import torch, torch.distributed, ray.train.torch
    begin = torch.distributed.init_process_group
    def by_gloo(backend, **rest):
        begin("gloo", **rest)
    torch.distributed.init_process_group = by_gloo
    ray.train.torch.get_device = lambda: torch.device("cpu")

def gpu():
    context = ray.get_runtime_context()
    return context.get_node_id()[-6:] + "/" + ",".join(context.get_accelerator_ids()["GPU"])

def place(worker):
    return gpu()

def die_once(worker, mark):
    if worker.rank == 0 and not Path(mark).exists():
        Path(mark).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    worker.meet(0)
    return gpu()

room = {"object_store_memory": 80_000_000}
head = {"num_cpus": 2} if cases == "lost" else {"num_cpus": 6, "num_gpus": 2}
nodes = Nodes(initialize_head=True, head_node_args=room | head)
nodes.add_node(num_cpus=6, num_gpus=2, labels={"zone": "a"}, **room)
ray.init(nodes.address, log_to_driver=False,
         runtime_env={"worker_process_setup_hook": without_gpus})

module.check_paths = lambda setup: None  # on one machine all see the same files
module.PLACED_SECONDS = 2

def workers(**keys):
    cluster = Cluster(address=nodes.address, replicas=2, workers=2, **keys)
    source, more = Source.find(model, None), {"trains": True, "output_uri": out}
    parts = (cluster, "float32", Importance(batch=2))
    stack = open_stack(Path(model))
    return RayWorkers(Setup(source, stack, *parts, **more, run_folder=out + "/run"))

found = {}
if cases == "lost":
    with workers(labels={"zone": "a"}) as opened:
        found["at most"] = opened._runner_config(2, "auto", 1.0).processes
        opened.prepare_training()
        opened._pool.offload()
        replicas = opened._pool._idle
        found["replicas"] = ray.get([one.__ray_call__.remote(lambda _: gpu()) for one in replicas])
        found["shared"] = opened.spmd(place, news=print), opened.way, opened.gpus_held
        for replica in replicas:
            ray.kill(replica)
        opened._pool.offload = lambda: None  # nobody has noticed yet
        found["lost"] = opened.spmd(die_once, out + "/mark", news=print), opened.way
        found["held"] = opened.gpus_held
else:
    with workers() as opened:  # both replicas come to the same node
        opened.prepare_training()
        found["more"] = opened.spmd(place, news=print), opened.way
        found["held"] = opened.gpus_held
print("FOUND", json.dumps(found))
ray.shutdown()
nodes.shutdown()
"""


MEET = """
import json, sys
import ray
from torch.distributed import TCPStore
from fusegpt_ray.distributed.meeting import Meeting
from fusegpt_ray.distributed.serve import OneGpuError, _check_own_gpu

@ray.remote(num_cpus=1)
class Worker:
    def meet(self, port, rank):
        try:
            with Meeting(TCPStore("127.0.0.1", port), rank, 2, 60) as meeting:
                _check_own_gpu(meeting)
        except OneGpuError as error:
            return str(error)
        return ""

room = {"num_cpus": 4, "num_gpus": 2, "object_store_memory": 80_000_000}
ray.init("local", log_to_driver=False, **room)
found = {}
for gpus in (0, 0.4, 1):
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    workers = [Worker.options(num_gpus=gpus).remote() for _ in range(2)]
    found[gpus] = ray.get([one.meet.remote(store.port, n) for n, one in enumerate(workers)])
    for worker in workers:
        ray.kill(worker)
found["node"] = ray.get_runtime_context().get_node_id()
print("FOUND", json.dumps(found))
"""


def look(out: Path, script: str, *arguments: str) -> dict[str, list[object]]:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=out)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, done.stdout + done.stderr
    found: dict[str, list[object]] = json.loads(lines[0].removeprefix("FOUND "))
    return found


def test_workers_tell_each_other_where_they_are(tmp_path: Path) -> None:
    """Parts of a GPU are put on the same one."""
    found = look(tmp_path, MEET)
    assert found["0"] == found["1"] == ["", ""]
    one, other = found["0.4"]
    said = f"training workers 0 and 1 were given GPU [01] of node {found['node']}, and each needs"
    assert one == other and re.match(said, str(one))


def test_workers_that_lose_their_replicas_are_told_apart_again(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """They begin beside replicas. When these are lost, Ray Train's next ones meet on one GPU."""
    found = look(tmp_path, LOOK, str(checkpoint("llama")), str(tmp_path), "lost")
    assert found["at most"] == 2
    shared, way, held = found["shared"]
    assert sorted(shared) == sorted(found["replicas"]) and (way, held) == ("shared", 2)  # type: ignore[call-overload]
    again, way = found["lost"]
    assert sorted(again) == sorted(shared) and (way, found["held"]) == ("turns", 2)  # type: ignore[call-overload]


def test_where_other_nodes_have_gpus_workers_have_whole_ones(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Ray would put both on one GPU of the node that no replica is on."""
    found = look(tmp_path, LOOK, str(checkpoint("llama")), str(tmp_path), "more")
    places, way = found["more"]
    assert len(set(places)) == 2 and (way, found["held"]) == ("turns", 2)  # type: ignore[call-overload]
