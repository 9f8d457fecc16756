"""A user's mistakes that show only on the nodes of a Ray cluster."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import ray
from safetensors.torch import load_file, save_file

from fusegpt_ray import Recipe, UserError, compress
from fusegpt_ray.distributed.nodes import nodes_without

pytestmark = pytest.mark.integration


def test_nodes_that_do_not_see_a_file_are_named(ray_session, material, tmp_path) -> None:
    seen = str(material.model / "model.safetensors")
    assert nodes_without([seen]) == []
    assert nodes_without([seen, str(tmp_path / "elsewhere.safetensors")]) == [
        node["NodeManagerAddress"] for node in ray.nodes()
    ]


def test_nan_is_told_on_ray(ray_session, material, tmp_path: Path) -> None:
    """Workers find it, the driver names the tensor, and nothing stays of the run."""
    model = Path(shutil.copytree(material.model, tmp_path / "model"))
    held, name = load_file(model / "model.safetensors"), "model.layers.5.self_attn.o_proj.weight"
    held[name][3, 7] = math.nan
    save_file(held, model / "model.safetensors", metadata={"format": "pt"})
    changes = {"model": {"source": str(model)}, "cluster": {"engine": "ray", "replicas": 2}}
    recipe = Recipe.parse(material.recipe(tmp_path / "out", **changes))
    with pytest.raises(UserError, match=f"model.source = .*{name} holds NaN or Inf"):
        compress(recipe)
    assert not (tmp_path / "out").exists()
