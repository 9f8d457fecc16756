"""SIGTERM, which Kubernetes, `ray job stop` and notices of preemption send: a training makes a
checkpoint at its next step, then the run stops as after Ctrl-C, says so, and goes on to the same
bytes.
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from shutil import rmtree
from typing import Any

import psutil
import pytest
import yaml

from fusegpt_ray import Recipe, compress

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


@pytest.fixture(name="temp", scope="module")
def _temp() -> Iterator[Path]:
    """Of a local Ray; short: the paths of its sockets have at most 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
    yield folder
    rmtree(folder, ignore_errors=True)


def start(recipe: dict[str, Any], folder: Path, temp: Path) -> psutil.Popen:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment |= {"RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": str(temp)}
    command = [sys.executable, "-m", "fusegpt_ray.cli", "compress", str(folder / "recipe.yaml")]
    with (folder / "log").open("a") as log:
        return psutil.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def weights(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.glob("*-p*/*.safetensors")
    }


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_a_run_that_is_terminated_says_so_and_goes_on(
    engine: str, material: Any, temp: Path, tmp_path: Path
) -> None:
    changes = {"sparsity": 0.125, "fusion": {"epochs": 30}, "evaluation": {}}
    changes["cluster"] = {"engine": engine}  # without the signal, the first checkpoint came later
    recipe = material.recipe(str(tmp_path / "out"), **changes)
    run, log = start(recipe, tmp_path, temp), tmp_path / "log"
    while run.poll() is None and "  epoch 1/" not in log.read_text():
        time.sleep(0.05)
    started = run.children(recursive=True)
    run.send_signal(signal.SIGTERM)
    assert run.wait(120) == 143, log.read_text()
    end = log.read_text().rstrip().splitlines()[-1]
    assert end == "stopped; the same command goes on from what is saved", log.read_text()
    _, left = psutil.wait_procs(started, timeout=30)
    assert left == [], "what it started ends with it"

    assert start(recipe, tmp_path, temp).wait() == 0, log.read_text()
    assert re.search(r"going on after part [1-9]\d* of 30", log.read_text()), log.read_text()
    here = recipe | {"output": {"uri": str(tmp_path / "undisturbed"), "name": "tiny"}}
    compress(Recipe.parse(here | {"cluster": {"engine": "local"}}))
    assert weights(tmp_path / "out") == weights(tmp_path / "undisturbed") != {}
