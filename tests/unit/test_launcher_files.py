"""The other files of cluster/, and what they name: Ray's launcher reads its own, and paths and
images are those of the Dockerfile.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
JOB = yaml.safe_load((CLUSTER / "kubernetes/base/job.yaml").read_text())
DOCKERFILE = (ROOT / "Dockerfile").read_text()

launchers = pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((CLUSTER / name).read_text())
    return found


@launchers
def test_rays_launcher_accepts_its_file(name: str) -> None:
    """As `ray up` begins: its defaults are filled in, and its own schema knows every key."""
    config = prepare_config(read(name))
    validate_config(config)
    types = config["available_node_types"]
    assert types.keys() == {"head", "gpu"} and config["head_node_type"] == "head"
    assert types["head"]["resources"] == {"CPU": 0, "GPU": 0}  # it drives, and does no work
    assert types["gpu"]["min_workers"] == 0  # nothing stays when nothing is to be done
    assert types["gpu"]["max_workers"] == config["max_workers"]


@launchers
def test_a_key_that_rays_launcher_does_not_know_is_found(name: str) -> None:
    with pytest.raises(Exception, match="idle_minutes"):
        validate_config(prepare_config(read(name) | {"idle_minutes": 10}))


@launchers
def test_rays_ports_ask_for_a_token_and_jobs_come_by_ssh_alone(name: str) -> None:
    config = read(name)
    options = config["docker"]["run_options"]
    assert "--env RAY_AUTH_MODE=token" in options and "--cap-drop ALL" in options
    assert not [option for option in options if "TOKEN=" in option or "privileged" in option]
    assert config["file_mounts"] == {"/home/fusegpt/.ray/auth_token": "~/.ray/auth_token"}
    (start,) = [line for line in config["head_start_ray_commands"] if "--head" in line]
    assert "--dashboard-host=127.0.0.1" in start


def test_skypilots_file() -> None:
    """Its keys are known ones of SkyPilot's task (its package is not among the tests')."""
    task = read("sky.yaml")
    assert task.keys() == {
        *("name", "num_nodes", "workdir", "resources", "envs", "secrets", "setup", "run")
    }
    assert task["envs"] == {"RAY_AUTH_MODE": "token"} and task["secrets"] == {
        "RAY_AUTH_TOKEN": None
    }
    assert "--dashboard-host=127.0.0.1" in task["run"] and "ports" not in task["resources"]
    assert "python jobs/compress.py recipe.yaml" in task["run"]
    assert "ray stop" not in task["run"].replace("`ray stop`", "")  # it ends SkyPilot's own Ray
    for part in ("setup", "run"):
        subprocess.run(["bash", "-n"], input=task[part], text=True, check=True, timeout=10)


def test_all_nodes_run_one_image() -> None:
    lines = (CLUSTER / "kubernetes/base/kustomization.yaml").read_text()
    (image,) = yaml.safe_load(lines)["images"]
    named = f"{image['newName']}:{image['newTag']}"
    assert {read(name)["docker"]["image"] for name in ("aws.yaml", "gcp.yaml")} == {named}
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version and image["newTag"] == version[1]


def test_the_image_has_what_the_entry_point_names() -> None:
    """Its COPY lines bring the job, the package and the example to the paths that are named."""
    python, script, _ = JOB["spec"]["entrypoint"].split()
    assert python == "python"
    assert "\nWORKDIR /app\n" in DOCKERFILE and "PATH=/app/.venv/bin:$PATH" in DOCKERFILE
    copied = re.findall(r"^COPY (.+) (\S+)$", DOCKERFILE, re.MULTILINE)
    folders = {source for source, target in copied if source == target}
    recipe = read("kubernetes/smoke/recipe.yaml")
    files = [
        script,
        recipe["model"]["source"],
        recipe["calibration"]["data"],
        recipe["evaluation"]["heldout"]["data"],
    ]
    ignored = (ROOT / ".dockerignore").read_text().split()
    for file in files:
        inside = Path(file).relative_to("/app")
        assert (ROOT / inside).exists() and inside.parts[0] in folders
        assert inside.parts[0] not in ignored
    assert {source for source, _ in copied} >= {"fusegpt_ray", "jobs"}


def test_the_policy_names_actions_of_objects_one_by_one() -> None:
    """That a whole run needs no more is tried in tests/integration/test_entry_point.py."""
    policy = json.loads((CLUSTER / "bucket-policy.json").read_text())
    for statement in policy["Statement"]:
        assert statement["Effect"] == "Allow"
        assert not [action for action in statement["Action"] if "*" in action]
        assert all(re.fullmatch(r"arn:aws:s3:::[\w-]+(/\*)?", arn) for arn in statement["Resource"])
