"""A Ray head of its own, and jobs submitted to it as a cluster's user does it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

BIN = Path(sys.executable).parent
REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Head:
    address: str
    """Of the jobs server."""
    temp: Path
    """Where Ray keeps its logs."""
    cluster: str
    """Its address for a driver."""


@contextmanager
def running_head(
    free_port: Callable[[], int], variables: dict[str, str] | None = None, **more: Any
) -> Iterator[Head]:
    """A Ray head; its workers find Python, and S3's address and keys, in their environment,
    which is this one's.

    Args:
        variables: of its environment, beside that.
        more: options of `ray start`, or functions of the head's port that give them.
    """
    dashboard = f"http://127.0.0.1:{(port := free_port())}"
    temp = Path(
        tempfile.mkdtemp(prefix="head", dir="/tmp")
    )  # short: the paths of Ray's sockets have at most 107 bytes
    options = {
        "node-ip-address": "127.0.0.1",
        "port": (gcs := free_port()),
        "ray-client-server-port": free_port(),
        "dashboard-host": "127.0.0.1",
        "dashboard-port": port,
        "dashboard-agent-listen-port": free_port(),
        "min-worker-port": 0,
        "max-worker-port": 0,
        "num-cpus": 4,
        "object-store-memory": 200_000_000,
        "temp-dir": temp,
    }
    for key, value in more.items():
        options[key.replace("_", "-")] = value(gcs) if callable(value) else value
    command = [
        str(BIN / "ray"),
        "start",
        "--head",
        "--block",
        "--disable-usage-stats",
        "--include-dashboard=true",
    ]
    with (temp / "head.log").open("w") as log:
        process = subprocess.Popen(
            [*command, *(f"--{key}={value}" for key, value in options.items())],
            env=environment() | (variables or {}),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        wait_for_answer(f"{dashboard}/api/version", process, temp / "head.log")
        yield Head(dashboard, temp, f"127.0.0.1:{gcs}")
    finally:
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            with suppress(psutil.NoSuchProcess):
                one.kill()  # asked to end, it takes half a minute
        process.wait()
        shutil.rmtree(temp, ignore_errors=True)


def environment() -> dict[str, str]:
    without = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return without | {"PATH": f"{BIN}:{os.environ['PATH']}", "RAY_AUTH_MODE": "disabled"}


def wait_for_answer(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until the process answers there. Raises RuntimeError with its log if it never does."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
        else:
            return
    raise RuntimeError(f"nothing answers at {url}:\n{log.read_text()}")


def users_folder(material, folder: Path) -> Path:
    """Fill a user's folder: the jobs, a model, texts, and room for recipes. All of it is
    uploaded with a job.
    """
    shutil.copytree(
        REPOSITORY / "jobs", folder / "jobs", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copytree(material.model, folder / "model")
    for text in (material.calibration, material.heldout):
        shutil.copy(text, folder)
    return folder


def write_recipe(material, folder: Path, output: str, **changes: Any) -> dict[str, Any]:
    """A recipe whose paths are relative to the uploaded folder."""
    recipe = material.recipe(
        output,
        model={"source": "model"},
        sparsity=0.125,
        calibration={"data": material.calibration.name},
        evaluation={"heldout": {"data": material.heldout.name}},
        cluster={"engine": "ray", "replicas": 2},
        **changes,
    )
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return recipe


def submit(head: str, folder: Path, name: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Submit a job and wait for its end; its log comes back on stdout."""
    line = [
        str(BIN / "ray"),
        "job",
        "submit",
        "--address",
        head,
        "--submission-id",
        name,
        "--working-dir",
        ".",
        "--",
        *command,
    ]
    until = time.monotonic() + 100
    while True:
        done = subprocess.run(
            line,
            cwd=folder,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        # On a busy machine the head answers some time before it can start jobs.
        if "No available agent to submit job" not in done.stderr or time.monotonic() > until:
            return done
        time.sleep(1)


def status(head: str, name: str) -> str:
    line = [str(BIN / "ray"), "job", "status", "--address", head, name]
    return subprocess.run(
        line, env=environment(), capture_output=True, text=True, timeout=60, check=True
    ).stdout
