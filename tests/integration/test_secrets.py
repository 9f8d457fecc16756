"""Secrets in the environment, as users have them: nothing that a run prints, writes, or tells Ray
holds one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from planted import in_objects, leaks, plant

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

FAILS = {"learning_rate": 1e30}


@pytest.fixture
def planted(s3, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, s3.keys)


@pytest.fixture
def temp() -> Iterator[Path]:
    """Where a local Ray keeps its logs; short: the paths of its sockets have at most 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def start(recipe: dict, folder: Path, temp: Path) -> subprocess.Popen[bytes]:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment |= {"RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": str(temp)}
    command = [sys.executable, "-m", "fusegpt_ray.cli", "compress", str(folder / "recipe.yaml")]
    with (folder / "log").open("a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def test_a_run_on_a_local_ray_killed_and_resumed(
    planted, s3, bucket: str, material, temp: Path, tmp_path: Path
) -> None:
    changes = {"sparsity": 0.125, "cluster": {"engine": "ray"}, "fusion": {"epochs": 1}}
    recipe = material.recipe(f"s3://{bucket}/models", **changes)
    run = start(recipe, tmp_path, temp)
    deadline = time.monotonic() + 200
    while not any("scores-001" in key for key in s3.objects(bucket)):
        assert run.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.2)
    run.kill()
    run.wait()
    during = s3.objects(bucket)
    assert {"identity.json", "heartbeat.json", "scores-001.json"} <= {
        key.rsplit("/", 1)[-1] for key in during
    }
    assert start(recipe, tmp_path, temp).wait() == 0, (tmp_path / "log").read_text()
    after = s3.objects(bucket)
    assert "models/tiny-p12.5/fusegpt.json" in after and "models/tiny-p12.5/README.md" in after
    assert in_objects(during) == in_objects(after) == []
    assert list(temp.rglob("raylet.out")) and leaks(temp) == []
    assert leaks(tmp_path) == []


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
