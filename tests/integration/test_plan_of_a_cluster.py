"""`fusegpt plan` asks the Ray cluster that the recipe names what it has."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from words import add_tokenizer

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

PLAN = """
import sys
from ray.cluster_utils import Cluster as Nodes
from fusegpt_ray.cli import main

head = {"num_cpus": 4, "num_gpus": 2, "resources": {"accelerator_type:H100": 1}}
nodes = Nodes(
    initialize_head=True, head_node_args=head | {"object_store_memory": 100_000_000}
)
plan = ["plan", sys.argv[1], "--json", "--set", f"cluster.address={nodes.address}"]
assert main(plan) == main([*plan, "--gpus", "8", "--gpu", "A100"]) == 0
nodes.shutdown()
"""


def test_what_is_missing_there_is_told(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """A cluster that says that it has two GPUs of a type."""
    shutil.copytree(checkpoint("llama"), tmp_path / "model")
    add_tokenizer(tmp_path / "model")
    recipe = {
        "model": {"source": str(tmp_path / "model")},
        "method": "mi",
        "calibration": {"data": str(tmp_path / "text.txt"), "windows": 8, "length": 12},
        "importance": {"windows": 4, "batch": 2},
        "cluster": {"replicas": 3},
        "output": {"uri": str(tmp_path / "out"), "name": "demo"},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment["RAY_AUTH_MODE"] = "disabled"
    command = [sys.executable, "-c", PLAN, str(tmp_path / "recipe.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    told, said = map(json.loads, done.stdout.splitlines())
    found = {row["what"]: (row["needs"], row["there"], row["enough"]) for row in told["processes"]}
    assert found == {"GPUs": (3, 2, False), "CPUs, one for each process": (3, 4, True)}
    assert told["device"] == "NVIDIA H100"
    assert all(row["room"] is None for row in told["storage"]), "its nodes' disks are not known"
    (row,) = said["processes"]
    assert (row["there"], row["enough"]) == (8, True), "what the user says counts"
