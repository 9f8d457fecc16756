"""A model made narrower on Ray, by two replicas, is that of one process."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from fusegpt_ray.pipeline import compress
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.terminal.display import Display

pytestmark = pytest.mark.integration


def test_two_replicas_make_the_bytes_of_one_process(material, tmp_path: Path) -> None:
    found = []
    for cluster in ({"engine": "local"}, {"engine": "ray", "replicas": 2}):
        out = tmp_path / cluster["engine"]
        asked = {"method": "slicegpt", "sparsity": 0.25, "heal": None, "cluster": cluster}
        (published,) = compress(Recipe.parse(material.recipe(out, **asked)), Display())
        files = sorted(Path(published.uri).glob("*.safetensors"))
        found.append([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])
        found[-1].append(published.manifest["width"])
    assert found[0] == found[1] and found[0]
