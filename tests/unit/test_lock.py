"""The packages of the image: each is pinned by version and hash, and they are what we ask for."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCK = (ROOT / "cluster/requirements.lock").read_text()
PINNED = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^]]*\])?==([^\s;]+)(?: *;[^\\]*)?", re.MULTILINE)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = ("vision", "eval", "gcs", "launcher")
LINUX = {**default_environment(), "sys_platform": "linux", "platform_system": "Linux"}


def versions() -> dict[str, str]:
    return {canonicalize_name(name): version for name, version in PINNED.findall(LOCK)}


def test_what_we_ask_for_is_there_in_a_version_that_we_support() -> None:
    extras = PROJECT["optional-dependencies"]
    asked = list(PROJECT["dependencies"])
    for extra in EXTRAS:
        asked += extras[extra]
    found = versions()
    assert len(found) > len(asked)  # and what those ask for
    for requirement in map(Requirement, asked):
        assert requirement.marker is None or requirement.marker.evaluate(LINUX)
        version = found[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), requirement


def test_torch_is_the_tested_one() -> None:
    constraints = PINNED.findall((ROOT / "constraints.txt").read_text())
    assert constraints and all(versions()[name] == version for name, version in constraints)


def test_the_lock_has_these_extras() -> None:
    (command,) = re.findall(
        r"^lock: .*\n(?:\t.*\n)+", (ROOT / "Makefile").read_text(), re.MULTILINE
    )
    assert tuple(re.findall(r"--extra (\S+)", command)) == EXTRAS


def test_the_machines_have_the_cuda_that_torch_was_built_for() -> None:
    """The base image by its tag; Google's by the driver, which must be of that CUDA or newer."""
    torchs = versions()["cuda-toolkit"].split(".")
    dockerfile = (ROOT / "Dockerfile").read_text()
    (base,) = re.findall(
        r"^FROM nvidia/cuda:([\d.]+)-cudnn-devel-\S+@sha256:[0-9a-f]{64}$", dockerfile, re.M
    )
    assert base.split(".")[:2] == torchs[:2]
    drivers = {"13": 580}  # NVIDIA's release notes: the least of each major version of CUDA
    nodes = yaml.safe_load((ROOT / "cluster/gcp.yaml").read_text())["available_node_types"]
    for node in nodes.values():
        disk = node["node_config"]["disks"][0]["initializeParams"]
        (driver,) = re.findall(r"-nvidia-(\d+)$", disk["sourceImage"])
        assert int(driver) >= drivers[torchs[0]]


def test_every_package_has_hashes_and_comes_from_the_index() -> None:
    """An address in it would be that of whoever made it."""
    packages = re.split(r"\n(?=[A-Za-z0-9])", re.sub(r"^#.*\n", "", LOCK, flags=re.MULTILINE))
    assert len(packages) == len(versions())
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}\b", package) for package in packages)
    assert "://" not in LOCK and " @ " not in LOCK and "--index" not in LOCK


def test_the_image_installs_that_and_nothing_else() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    installs = [line for line in lines if "pip install" in line]
    assert len(installs) == 2
    assert "--require-hashes" in installs[0] and "--no-deps" in installs[1]
