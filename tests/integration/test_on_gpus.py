"""A whole run on Ray where there are GPUs: it scores, trains with DeepSpeed and publishes on them,
and learns what one process learns.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from material import Material

pytestmark = [pytest.mark.gpu, pytest.mark.integration, pytest.mark.timeout(1200)]

NOT_FOR_A_USER = ("DS_ACCELERATOR", "RAY_ADDRESS")
"""Of these tests' own environment: DeepSpeed is to find the GPU itself, and the run its own Ray."""


def compress(material: Material, folder: Path, **cluster: Any) -> dict[str, Any]:
    """The manifest of a run of one round in a process of its own, as a user starts it."""
    folder.mkdir()
    recipe = material.recipe(
        folder / "out",
        model={"source": str(material.model_bf16)},
        sparsity=0.125,
        cluster=cluster,
    )
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = subprocess.run(
        [sys.executable, "-m", "fusegpt_ray.cli", "compress", str(folder / "recipe.yaml")],
        env={name: value for name, value in os.environ.items() if name not in NOT_FOR_A_USER},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (manifest,) = (folder / "out").glob("*/fusegpt.json")
    found: dict[str, Any] = json.loads(manifest.read_text())
    return found


@pytest.mark.parametrize("gpus", [1, 2])
def test_ray_and_one_process_learn_the_same(gpus: int, material: Material, tmp_path: Path) -> None:
    if gpus > torch.cuda.device_count():
        pytest.skip(f"there is only {torch.cuda.device_count()} GPU")
    many = {"engine": "ray", "replicas": gpus, "workers": gpus, "zero_stage": 1}
    on_ray = compress(material, tmp_path / "ray", **many)
    # As many windows at once as each of the workers.
    share = material.recipe(tmp_path)["fusion"]["batch"] // gpus
    alone = compress(material, tmp_path / "alone", engine="local", micro_batch=share)
    assert (on_ray["gpu"], on_ray["gpus"]) == (torch.cuda.get_device_name(), gpus)
    assert (alone["gpu"], alone["gpus"]) == (torch.cuda.get_device_name(), 1)
    assert on_ray["removed"] == alone["removed"]
    (ours,), (theirs,) = on_ray["rounds"], alone["rounds"]
    assert ours["scores"] == theirs["scores"]
    for when in ("loss_first", "loss_last"):
        # A rounding of bfloat16 is 4e-3; only the order of adding gradients may differ.
        assert ours[when] == pytest.approx(theirs[when], rel=4e-3)
    assert ours["loss_last"] < ours["loss_first"]
