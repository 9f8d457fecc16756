"""`ray job submit` to a Ray head of its own, as a cluster's user does it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers as tf
import yaml
from safetensors.torch import load_file

from fusegpt_ray import Recipe, compress

pytestmark = pytest.mark.integration

BIN = Path(sys.executable).parent
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def head(s3, free_port: Callable[[], int]) -> Iterator[str]:
    """The address of the jobs server of a Ray head; its workers find Python, and S3's address and keys, in their environment."""
    dashboard = f"http://127.0.0.1:{(port := free_port())}"
    temp = Path(tempfile.mkdtemp(prefix="head", dir="/tmp"))  # short: the paths of Ray's sockets have at most 107 bytes
    options = {
        "node-ip-address": "127.0.0.1",
        "port": free_port(),
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
    command = [str(BIN / "ray"), "start", "--head", "--block", "--disable-usage-stats", "--include-dashboard=true"]
    with (temp / "head.log").open("w") as log:
        process = subprocess.Popen(
            [*command, *(f"--{key}={value}" for key, value in options.items())],
            env=_environment(),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        _wait_for(f"{dashboard}/api/version", process, temp / "head.log")
        yield dashboard
    finally:
        process.send_signal(signal.SIGTERM)  # with --block it takes its own processes, and only those, with it
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        shutil.rmtree(temp, ignore_errors=True)


def _environment() -> dict[str, str]:
    without = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return without | {"PATH": f"{BIN}:{os.environ['PATH']}", "RAY_AUTH_MODE": "disabled"}


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
        else:
            return
    raise RuntimeError(f"the head did not start:\n{log.read_text()}")


@pytest.fixture(scope="module")
def folder(material, tmp_path_factory) -> Path:
    """A user's folder: the jobs, a model, texts, and room for recipes. All of it is uploaded with a job."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(REPOSITORY / "jobs", folder / "jobs", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(material.model, folder / "model")
    for text in (material.calibration, material.heldout):
        shutil.copy(text, folder)
    return folder


def write_recipe(material, folder: Path, output: str) -> dict:
    """A recipe whose paths are relative to the uploaded folder."""
    recipe = material.recipe(
        output,
        model={"source": "model"},
        sparsity=0.125,
        calibration={"data": material.calibration.name},
        evaluation={"heldout": {"data": material.heldout.name}},
        cluster={"engine": "ray", "replicas": 2},
    )
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return recipe


def submit(head: str, folder: Path, name: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Submit a job and wait for its end; its log comes back on stdout."""
    line = [str(BIN / "ray"), "job", "submit", "--address", head, "--submission-id", name, "--working-dir", ".", "--", *command]
    return subprocess.run(line, cwd=folder, env=_environment(), capture_output=True, text=True, timeout=200, check=False)


def status(head: str, name: str) -> str:
    line = [str(BIN / "ray"), "job", "status", "--address", head, name]
    return subprocess.run(line, env=_environment(), capture_output=True, text=True, timeout=60, check=True).stdout


def test_a_job_compresses_from_its_folder_to_s3(head, s3, bucket, material, folder, tmp_path) -> None:
    recipe = write_recipe(material, folder, f"s3://{bucket}/jobs")
    changed = ("--set", "fusion.epochs=2", "--set", "output.name=submitted")
    done = submit(head, folder, "compress", "python", "jobs/compress.py", "recipe.yaml", *changed)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in status(head, "compress")

    objects = s3.objects(bucket)
    assert "jobs/submitted-p12.5/fusegpt.json" in objects
    published = tmp_path / "published"
    published.mkdir()
    for key, data in objects.items():
        if key.startswith("jobs/submitted-p12.5/"):
            (published / key.rsplit("/", 1)[-1]).write_bytes(data)
    assert tf.AutoModelForCausalLM.from_pretrained(published).config.num_hidden_layers == 7

    # The same recipe here, in one process, gives the same bytes.
    local = {
        "model": {"source": str(material.model)},
        "output": {"uri": str(tmp_path), "name": "here"},
        "cluster": {"engine": "local"},
    }
    texts = {"calibration": recipe["calibration"] | {"data": str(material.calibration)}, "evaluation": {}}
    (here,) = compress(Recipe.parse(recipe | local | texts | {"fusion": recipe["fusion"] | {"epochs": 2}}))
    ours, theirs = (load_file(Path(path) / "model.safetensors") for path in (here.uri, published))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert ours.keys() == theirs.keys()


def test_a_typo_fails_the_job_with_our_message(head, s3, bucket, material, folder) -> None:
    write_recipe(material, folder, f"s3://{bucket}/jobs")
    done = submit(head, folder, "typo", "python", "jobs/compress.py", "recipe.yaml", "--set", "fusion.epoch=2")
    assert done.returncode != 0
    assert "error: fusion.epoch = 2: unknown key. Fix: did you mean fusion.epochs." in done.stdout
    assert "Traceback" not in done.stdout
    assert "failed" in status(head, "typo")
    assert s3.objects(bucket) == {}
