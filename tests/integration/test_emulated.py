"""The benchmark of emulated blocks runs, on more replicas than there are cores; what it measures is
not tested, but for what does not depend on the machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "emulated.py"


def test_blocks_that_sleep(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": os.pathsep.join(sys.path)}
    out = tmp_path / "out.json"
    sizes = ["--replicas", "1", "4", "--seconds", "0.002", "--windows", "4"]
    family = ["--members", "2", "--sets", "2", "--json", str(out)]
    command = [sys.executable, str(SCRIPT), *sizes, *family]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    one, next_of_one, four, next_of_four = found["scoring"]
    # 12 blocks: 78 block-forwards a window; nobody but the replicas sleeps.
    assert one["slept"] == pytest.approx(4 * 78 * 0.002) == four["slept"]
    assert one["ideal"] == pytest.approx(4 * four["ideal"])  # four windows, four replicas
    assert next_of_one["slept"] == pytest.approx(next_of_four["slept"])
    assert next_of_one["slept"] < one["slept"]  # the search walks less
    assert found["family"]["slept"] > 0
