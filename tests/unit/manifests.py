"""The files of cluster/kubernetes, as kustomize builds them, and what pods are in them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "cluster" / "kubernetes"
COMPONENTS = {
    path.parent.name
    for path in KUBERNETES.glob("*/kustomization.yaml")
    if "kind: Component" in path.read_text()
}
OVERLAYS = sorted(
    {path.parent.name for path in KUBERNETES.glob("*/kustomization.yaml")} - COMPONENTS
)

Object = dict[str, Any]


def build(folder: Path) -> list[Object]:
    """The objects that `kubectl apply -k` would send."""
    command = [found, "build"] if (found := shutil.which("kustomize")) else None
    if found := shutil.which("kubectl"):
        command = [found, "kustomize"]
    if command is None:
        pytest.skip("overlays are built by kubectl or kustomize, and neither is here")
    done = subprocess.run(
        [*command, str(folder)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def with_components(folder: Path, overlay: str, *components: str) -> list[Object]:
    """An overlay of a user's own, in a folder beside this repository, that adds components."""
    here = folder / "mine"
    here.mkdir()
    shutil.copytree(KUBERNETES, folder / "kubernetes")
    lines = {
        "resources": [f"../kubernetes/{overlay}"],
        "components": [f"../kubernetes/{name}" for name in components],
    }
    (here / "kustomization.yaml").write_text(yaml.safe_dump(lines))
    return build(here)


def of_kind(objects: list[Object], kind: str) -> Object:
    (found,) = [item for item in objects if item["kind"] == kind]
    return found


def pods(item: Any) -> Iterator[Object]:
    """The pod templates in an object of KubeRay."""
    if isinstance(item, dict):
        for key, value in item.items():
            if key in ("template", "submitterPodTemplate"):
                yield value
            else:
                yield from pods(value)
    elif isinstance(item, list):
        for value in item:
            yield from pods(value)
