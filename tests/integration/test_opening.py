"""What an error leaves behind that comes while a run's workers are opened on Ray: nothing."""

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
from models import open_stack
from ray._private.state import actors
from fusegpt_ray.distributed.cluster import RayWorkers
from fusegpt_ray.distributed.replicas import Replicas
from fusegpt_ray.errors import UserError
from fusegpt_ray.model.source import Source
from fusegpt_ray.recipe.cluster_section import Cluster
from fusegpt_ray.recipe.sections import Importance
from fusegpt_ray.workers.base import Setup

def workers(**keys):
    cluster, source = Cluster(object_store_gb=0.1, **keys), Source.find(sys.argv[1], None)
    stack = open_stack(Path(sys.argv[1]))
    return RayWorkers(Setup(source, stack, cluster, "float32", Importance(batch=2)))

found = {}
try:
    with workers(gpus_per_replica=1):
        found["refused"] = "opened"
except UserError as error:
    found["refused"] = error.key
found["connected"] = ray.is_initialized()

ray.init("local", num_cpus=4, object_store_memory=100_000_000, log_to_driver=False)  # the caller's
start = Replicas.start
def interrupted(self):
    start(self)
    ray.get([one.offload.remote() for one in self._idle])  # they live
    found["lived"] = [one["State"] for one in actors().values()]
    raise KeyboardInterrupt
Replicas.start = interrupted
try:
    with workers(replicas=2, gpus_per_replica=0):
        found["stopped"] = "opened"
except KeyboardInterrupt:
    found["stopped"] = "told"
found["still connected"] = ray.is_initialized()
until = time.monotonic() + 20
while (left := [one["State"] for one in actors().values()]) != ["DEAD"] * 2:
    if time.monotonic() > until:
        break
    time.sleep(0.1)
found["left"] = left
print("FOUND", json.dumps(found))
"""


def test_an_error_on_the_way_closes_what_was_opened(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """A Ray that was started for the run ends; of one that the caller has, the replicas do."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", LOOK, str(checkpoint("llama"))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, done.stdout + done.stderr
    assert json.loads(lines[0].removeprefix("FOUND ")) == {
        "refused": "cluster.gpus_per_replica",
        "connected": False,
        "lived": ["ALIVE"] * 2,
        "stopped": "told",
        "still connected": True,
        "left": ["DEAD"] * 2,
    }
