"""What the integration tests share: a tiny model with its texts, an S3 server, and one local Ray
that knows how to reach it."""

from __future__ import annotations

import logging
import os
import re
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray

from fusegpt_ray.distributed.connection import Connection
from fusegpt_ray.recipe.cluster_section import Cluster

os.environ["OMP_NUM_THREADS"] = (
    "1"  # for what the tests start: the same threads everywhere, so the same sums
)

# --- S3 and Ray ---

REQUEST = re.compile(r'"(?:\x1b\[\d+m)*([A-Z]+) (\S+) HTTP')


@dataclass(frozen=True)
class S3:
    """An S3 server on this machine. Every process finds it and its keys in the environment, as
    with a real one."""

    client: Any
    """boto3's, by which the tests look at what is there."""
    keys: tuple[str, str]
    """The access key and the secret key: nothing that a run writes may hold them."""
    log: Path

    def requests(self) -> list[tuple[str, str]]:
        """Every request so far, in the order in which they were answered: method and path."""
        return REQUEST.findall(self.log.read_text())

    def objects(self, bucket: str) -> dict[str, bytes]:
        """All objects of a bucket."""
        return {
            key: self.client.get_object(Bucket=bucket, Key=key)["Body"].read()
            for key in self.listed(bucket)
        }

    def listed(self, bucket: str) -> dict[str, str]:
        """All objects of a bucket, by their ETags, which tell one content from another."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
        found = [entry for page in pages for entry in page.get("Contents", [])]
        return {entry["Key"]: entry["ETag"] for entry in found}

    def upload(self, files: Iterable[Path], bucket: str, prefix: str) -> None:
        for file in files:
            self.client.upload_file(str(file), bucket, f"{prefix}/{file.name}")


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    # Here: tests that need a GPU run where only the product is installed, too.
    import boto3
    from s3fs import S3FileSystem

    keys = ("PLANTED-ACCESS-KEY-7d1c", "PLANTED-SECRET-KEY-93ab")
    port, log = free_port(), tmp_path_factory.mktemp("s3") / "log"
    with pytest.MonkeyPatch.context() as patch, log.open("w") as out:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": keys[0],
            "AWS_SECRET_ACCESS_KEY": keys[1],
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
        S3FileSystem.clear_instance_cache()
        command = [sys.executable, str(Path(__file__).parents[1] / "s3_server.py")]
        where = ["-H", "127.0.0.1", "-p", str(port)]
        server = subprocess.Popen([*command, *where], stdout=out, stderr=out)
        try:
            _wait_for(port, server)
            yield S3(boto3.client("s3"), keys, log)
        finally:
            server.kill()
            server.wait()
            S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="session")
def new_bucket(s3: S3) -> Callable[[], str]:
    """Makes an empty bucket and gives its name."""
    from s3fs import S3FileSystem

    def make() -> str:
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        s3.client.create_bucket(Bucket=name)
        S3FileSystem.clear_instance_cache()
        return name

    return make


@pytest.fixture
def bucket(new_bucket: Callable[[], str]) -> str:
    """The name of a new, empty bucket."""
    return new_bucket()


@pytest.fixture(scope="module")
def ray_session(s3: S3) -> None:
    """One local Ray for all integration tests of this process, started as a run starts it. It
    starts after the S3 server, because workers inherit the environment."""
    if ray.is_initialized():
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("CUDA_VISIBLE_DEVICES", "0,1")  # what no process may see that asked for none
        assert Connection.open(Cluster(object_store_gb=0.5)).own
    logging.getLogger("ray.data").setLevel(
        logging.WARNING
    )  # else a failed test shows pages of its metrics


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Idle processes of Ray, too, take time, of which other tests need all."""
    yield
    if nextitem is None or not nextitem.path.is_relative_to(Path(__file__).parent):
        ray.shutdown()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session", name="free_port")
def _free_port() -> Callable[[], int]:
    return free_port


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise RuntimeError(f"nothing answers on port {port}")
