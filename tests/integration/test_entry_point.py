"""The job of cluster/kubernetes/smoke without containers: its command line exactly as it is
written, in a root of its own with what the Dockerfile copies, nothing to write on but /tmp, a fresh
environment, and keys that have the rights of cluster/bucket-policy.json alone.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from botocore.exceptions import ClientError
from submitting import wait_for_answer

from fusegpt_ray.distributed import serve

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
MODELS, SOURCES = "my-models", "my-sources"

NEW_ROOT = r"""
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs "$NEW"
for path in /*; do
  name=${path#/}
  case $name in app|recipe|tmp) continue;; esac
  if [ -L "$path" ]; then cp -P "$path" "$NEW/"; continue; fi
  [ -d "$path" ] || continue
  mkdir "$NEW/$name"
  mount --rbind "$path" "$NEW/$name"
  case $name in proc|dev|sys) ;; *) mount -o remount,bind,ro "$NEW/$name";; esac
done
mkdir "$NEW/app" "$NEW/recipe" "$NEW/tmp"
mount --bind "$APP" "$NEW/app"
mount --bind "$VENV" "$NEW/app/.venv"
mount --bind "$RECIPE" "$NEW/recipe"
for name in app app/.venv recipe; do mount -o remount,bind,ro "$NEW/$name"; done
mount -t tmpfs tmpfs "$NEW/tmp"
mount -o remount,ro "$NEW"
exec chroot "$NEW" env -i "$@"
"""


def can_mount() -> bool:
    return (
        shutil.which("unshare") is not None
        and subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0
    )


@dataclass(frozen=True)
class Store:
    """An S3 server that asks every request for rights, and two users of it."""

    owner: Any
    run: Any
    """boto3's, by the keys of the run."""
    environment: dict[str, str]
    """How the run finds it."""


@pytest.fixture(scope="module")
def store(free_port: Callable[[], int], tmp_path_factory) -> Iterator[Store]:
    port, log = free_port(), tmp_path_factory.mktemp("s3") / "log"
    url = f"http://127.0.0.1:{port}"

    def client(service: str, keys: dict[str, str]) -> Any:
        return boto3.client(service, endpoint_url=url, region_name="us-east-1", **keys)

    def keys_of(user: str, policy: str) -> dict[str, str]:
        iam.create_user(UserName=user)
        iam.put_user_policy(UserName=user, PolicyName="rights", PolicyDocument=policy)
        made = iam.create_access_key(UserName=user)["AccessKey"]
        return {
            "aws_access_key_id": made["AccessKeyId"],
            "aws_secret_access_key": made["SecretAccessKey"],
        }

    with log.open("w") as out:
        command = [sys.executable, str(ROOT / "tests/s3_server.py"), "-H", "127.0.0.1"]
        server = subprocess.Popen([*command, "-p", str(port)], stdout=out, stderr=out)
        try:
            wait_for_answer(f"{url}/moto-api/data.json", server, log)
            anybody = {"aws_access_key_id": "any", "aws_secret_access_key": "any"}
            iam = client("iam", anybody)
            everything = {"Effect": "Allow", "Action": "s3:*", "Resource": "*"}
            owners = json.dumps({"Version": "2012-10-17", "Statement": [everything]})
            owner = client("s3", keys_of("owner", owners))
            keys = keys_of("run", (CLUSTER / "bucket-policy.json").read_text())
            for bucket in (MODELS, SOURCES):
                client("s3", anybody).create_bucket(Bucket=bucket)
            ask_for_rights(url)
            environment = {name.upper(): value for name, value in keys.items()}
            environment |= {"AWS_ENDPOINT_URL": url, "AWS_DEFAULT_REGION": "us-east-1"}
            yield Store(owner, client("s3", keys), environment)
        finally:
            server.kill()
            server.wait()


def ask_for_rights(url: str) -> None:
    """From now on the server looks at who asks for what."""
    import requests

    requests.post(f"{url}/moto-api/reset-auth", data=b"0", timeout=10).raise_for_status()


def test_the_rights_end_where_they_should(store: Store) -> None:
    store.owner.put_object(Bucket=SOURCES, Key="model/config.json", Body=b"{}")
    assert store.run.get_object(Bucket=SOURCES, Key="model/config.json")["Body"].read() == b"{}"
    for refused in (
        lambda: store.run.put_object(Bucket=SOURCES, Key="model/config.json", Body=b"other"),
        lambda: store.run.delete_object(Bucket=SOURCES, Key="model/config.json"),
        lambda: store.run.put_bucket_acl(Bucket=MODELS, ACL="public-read"),
        lambda: store.run.delete_bucket(Bucket=MODELS),
        lambda: store.run.list_buckets(),
        lambda: store.run.create_bucket(Bucket="another"),
    ):
        with pytest.raises(ClientError, match=r"AccessDenied|Forbidden|403"):
            refused()


def test_ray_train_makes_no_bucket_and_asks_for_none(s3) -> None:
    """s3fs would look at the bucket, and make it where it may not look."""
    place = serve._place("s3://nobodys-bucket/runs")
    before = len(s3.requests())
    place["storage_filesystem"].create_dir("nobodys-bucket/runs", recursive=True)
    assert s3.requests()[before:] == []


@pytest.mark.skipif(not can_mount(), reason="the test makes a root of its own: it needs to mount")
def test_the_smoke_tests_command_line_runs_as_it_is_written(store: Store, tmp_path: Path) -> None:
    app = tmp_path / "app"
    for source, target in re.findall(
        r"^COPY (\S+) (\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE
    ):
        shutil.copytree(ROOT / source, app / target, ignore=shutil.ignore_patterns("__pycache__"))
    (app / ".venv").mkdir()
    (tmp_path / "new").mkdir()
    job = yaml.safe_load((CLUSTER / "kubernetes/base/job.yaml").read_text())["spec"]
    (container,) = job["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    within = {item["name"]: item["value"] for item in container["env"]} | store.environment
    within |= {
        "PATH": "/app/.venv/bin:/usr/bin:/bin",
        "PYTHONPATH": "/app",  # the package as the image has it, not as this environment does
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    line = ["sh", "-c", f"cd /app && {job['entrypoint']} && ! touch /app/jobs/written"]
    done = subprocess.run(
        ["unshare", "--mount", "bash", "-c", NEW_ROOT, "root"]
        + [f"{name}={value}" for name, value in within.items()]
        + line,
        env={
            "PATH": os.environ["PATH"],
            "NEW": str(tmp_path / "new"),
            "APP": str(app),
            "VENV": sys.prefix,
            "RECIPE": str(CLUSTER / "kubernetes/smoke"),
        },
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = store.owner.list_objects_v2(Bucket=MODELS)["Contents"]
    assert "smoke-p12.5/fusegpt.json" in [entry["Key"] for entry in found]
