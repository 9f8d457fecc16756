"""The benchmark of scheduling, at a size that takes a minute: a fake cluster of its own, hence a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import simulator

from fusegpt_ray.distributed import replicas

pytestmark = pytest.mark.integration
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.timeout(900)
def test_work_is_shared_out_and_the_same_bits_come_back(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(BENCHMARKS.parent)}
    command = [sys.executable, BENCHMARKS / "scheduling.py", "--toy", "--shape", "toy", "--json", out]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    one, two, killed, slowed = found["work"]
    assert all(row["same"] for row in found["work"])
    assert one["busiest"] == one["done"]
    assert 0.5 <= two["busiest"] / two["done"] < 0.7
    assert killed["done"] >= two["done"]
    assert slowed["busiest"] <= slowed["done"]
    rows = found["emulated"]["rows"]
    assert {row["removed"] for row in rows} == {rows[0]["removed"]}
    assert [row["done"] for row in rows[:2]] == [row["simulated_done"] for row in rows[:2]]
    assert rows[1]["seconds"] < rows[0]["seconds"]
    ((turn,),) = [run["turns"] for run in found["runs"]]
    assert set(turn["phases"]) == {"score", "states", "finetune", "fixed", "all"}
    assert all(seconds > 0 for pair in turn["phases"].values() for seconds in pair)


def test_the_simulator_takes_shares_as_replicas_do() -> None:
    names = ("SHARES_EACH", "SLOW", "SLOW_SECONDS")
    assert [getattr(simulator, name) for name in names] == [getattr(replicas, name) for name in names]
