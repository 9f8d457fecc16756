"""A run on a local Ray, started in a terminal with secrets in its environment, killed while it
trains, and given again, on the Ray of these tests: it ends with the bytes of one process, healing
among them, and tells no secret. Whatever it started listened to this machine only.
"""

from __future__ import annotations

import ipaddress
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import ray
import yaml
from engine_runs import HEALED
from planted import in_objects, leaks, plant
from safetensors.torch import load_file

from fusegpt_ray import Recipe, compress
from fusegpt_ray.cli import main

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

FAILS = {"learning_rate": 1e30}
Listener = tuple[str, str, int]
"""Title of a process, address and port."""


@pytest.fixture(scope="module")
def planted(s3) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        plant(patch, s3.keys)
        yield


@pytest.fixture(scope="module")
def temp() -> Iterator[Path]:
    """Where a local Ray keeps its logs; short: the paths of its sockets have at most 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def start(recipe: dict, folder: Path, temp: Path) -> psutil.Popen:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment |= {"RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": str(temp)}
    command = [sys.executable, "-m", "fusegpt_ray.cli", "compress", str(folder / "recipe.yaml")]
    with (folder / "log").open("a") as log:
        return psutil.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def listening(process: psutil.Process) -> set[Listener]:
    """Where a process and its descendants take connections."""
    found = set()
    for one in [process, *process.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            name = (one.cmdline() or [one.name()])[0].rsplit("/", 1)[-1]
            found |= {
                (name, *c.laddr) for c in one.net_connections() if c.status == psutil.CONN_LISTEN
            }
    return found


def is_loopback(address: str) -> bool:
    ip = ipaddress.ip_address(address)
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback


@dataclass(frozen=True)
class Story:
    recipe: dict
    folder: Path
    """Of the recipe and of what the run printed."""
    temp: Path
    listeners: set[Listener]
    during: dict[str, bytes]
    """The objects in the store when the run was killed, and at its end."""
    after: dict[str, bytes]
    code: int
    """Of the command that was given again, on another Ray."""

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()


@pytest.fixture(scope="module")
def story(
    planted, s3, new_bucket, material, temp: Path, tmp_path_factory, request: pytest.FixtureRequest
) -> Story:
    folder, bucket = tmp_path_factory.mktemp("story"), new_bucket()
    changes = {"sparsity": 0.125, "cluster": {"engine": "ray"}, "fusion": {"epochs": 2}}
    recipe = material.recipe(f"s3://{bucket}/models", **changes, heal=HEALED["heal"])
    run, found = start(recipe, folder, temp), set()
    while run.poll() is None and "  epoch 1/" not in (folder / "log").read_text():
        with suppress(psutil.NoSuchProcess):
            found |= listening(run)
        with suppress(psutil.TimeoutExpired):
            run.wait(0.5)
    started = run.children(recursive=True)
    run.kill()
    run.wait()
    for one in started:  # as when the machine dies
        with suppress(psutil.NoSuchProcess):
            one.kill()
    during = s3.objects(bucket)
    request.getfixturevalue("ray_session")
    with (folder / "log").open("a") as log, redirect_stderr(log):
        code = main(["compress", str(folder / "recipe.yaml")])
    return Story(recipe, folder, temp, found, during, s3.objects(bucket), code)


def test_it_ends_with_the_bytes_of_one_process(story: Story, tmp_path: Path) -> None:
    names = {key.rsplit("/", 1)[-1] for key in story.during}
    assert {"identity.json", "heartbeat.json", "scores-001.json"} <= names, story.log
    assert "fusegpt.json" not in names
    assert story.code == 0, story.log
    assert ray.is_initialized(), "a Ray that was there before is left running"
    assert "models/tiny-p12.5/README.md" in story.after
    here = {"output": {"uri": str(tmp_path), "name": "here"}, "cluster": {"engine": "local"}}
    (local,) = compress(Recipe.parse(story.recipe | here))
    (tmp_path / "theirs.safetensors").write_bytes(
        story.after["models/tiny-p12.5/model.safetensors"]
    )
    ours = load_file(Path(local.uri) / "model.safetensors")
    theirs = load_file(tmp_path / "theirs.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)


def test_nothing_it_leaves_holds_a_secret(story: Story) -> None:
    assert in_objects(story.during) == in_objects(story.after) == []
    assert list(story.temp.rglob("raylet.out")) and leaks(story.temp) == []
    assert leaks(story.folder) == []


def test_it_listens_on_the_loopback_interface_only(story: Story) -> None:
    """Whoever reaches a port of Ray runs code."""
    names = " ".join(name for name, _, _ in story.listeners)
    assert all(
        one in names for one in ("raylet", "gcs_server", "DashboardAgent", "RayTrainWorker")
    ), story.log
    others = {listener for listener in story.listeners if not is_loopback(listener[1])}
    # torch.distributed's TCPStore, where training workers meet, binds every interface and cannot be
    # told otherwise.
    assert len({port for _, _, port in others}) <= 1, others
    # Its process is called as what it does at the moment, which need not be the worker's own name.
    assert not others or any("RayTrainWorker" in name for name, _, _ in others), others


def test_a_run_that_fails_with_a_trace(
    planted, s3, bucket: str, material, temp: Path, tmp_path: Path
) -> None:
    for engine in ("local", "ray"):
        output = f"s3://{bucket}/{engine}"
        assert (
            start(
                material.recipe(output, cluster={"engine": engine}, fusion=FAILS), tmp_path, temp
            ).wait()
            == 1
        )
    log = (tmp_path / "log").read_text()
    assert (
        log.count("Traceback") >= 2
        and log.count("failed: FloatingPointError: the training loss became") == 2
    )
    assert any("heartbeat.json" in key for key in s3.objects(bucket))
    assert leaks(tmp_path) == leaks(temp) == in_objects(s3.objects(bucket)) == []


def test_these_tests_would_find_one(planted, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/log").write_text(f"AWS_SESSION_TOKEN={os.environ['AWS_SESSION_TOKEN']}")
    assert leaks(tmp_path) and in_objects({"a": os.environ["HF_TOKEN"].encode()}) == ["a"]
