"""A comparison on Ray: its cells share workers, and are those of one process."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from fusegpt_ray.comparison.cells import Comparison
from fusegpt_ray.comparison.run import compare

pytestmark = pytest.mark.integration

METHODS = ["mi", {"name": "tuned", "method": "mi+ft", "fusion": {"epochs": 1}}]


def test_cells_on_ray_are_those_of_one_process(material, tmp_path: Path) -> None:
    found = []
    for engine in ("local", "ray"):
        recipe = material.recipe(tmp_path / engine, sparsity=0.125, cluster={"engine": engine})
        result = compare(Comparison.parse(recipe | {"compare": {"methods": METHODS}}))
        assert result["failed"] == []
        assert not [*(tmp_path / engine / "compare").glob("*/blocks")]  # Ray Train's
        found.append(
            {
                path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest()
                for path in (tmp_path / engine).glob("*/*.safetensors")
            }
        )
    assert len(found[0]) == len(METHODS) and found[0] == found[1]
