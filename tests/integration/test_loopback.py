"""A run on a local Ray listens on this machine only: whoever reaches a port of Ray runs code."""

from __future__ import annotations

import ipaddress
import os
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

pytestmark = pytest.mark.integration


Listener = tuple[str, str, int]
"""Title of a process, address and port."""


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


def test_a_run_listens_on_the_loopback_interface_only(material, tmp_path: Path) -> None:
    recipe = material.recipe(
        tmp_path / "out", sparsity=0.125, cluster={"engine": "ray"}, fusion={"epochs": 1}
    )
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {
        "RAY_AUTH_MODE": "disabled"
    }
    command = [sys.executable, "-m", "fusegpt_ray.cli", "compress", str(tmp_path / "recipe.yaml")]
    found: set[Listener] = set()
    with (tmp_path / "log").open("w") as log:
        run = psutil.Popen(command, stdout=log, stderr=log, env=environment)
        while (
            run.poll() is None and "  epoch 1/" not in (tmp_path / "log").read_text()
        ):  # then everything has started
            with suppress(psutil.NoSuchProcess):
                found |= listening(run)
            with suppress(psutil.TimeoutExpired):
                run.wait(0.5)
        for one in [*run.children(recursive=True), run]:
            with suppress(psutil.NoSuchProcess):
                one.kill()
    names = " ".join(name for name, _, _ in found)
    assert all(
        one in names for one in ("raylet", "gcs_server", "DashboardAgent", "RayTrainWorker")
    ), (tmp_path / "log").read_text()
    others = {listener for listener in found if not is_loopback(listener[1])}
    # torch.distributed's TCPStore, where training workers meet, binds every interface and cannot be
    # told otherwise.
    assert len({port for _, _, port in others}) <= 1, others
    assert all(
        "RayTrainWorker" in name or "_setup_torch_process_group" in name for name, _, _ in others
    ), others
