"""Two training workers make the models of one process, whatever the method trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import LIGHT, TWO_WORKERS
from safetensors.torch import load_file
from test_engines import REORDERED

from fusegpt_ray.pipeline import compress
from fusegpt_ray.publishing.publish import Published
from fusegpt_ray.recipe import Recipe
from fusegpt_ray.report import Display

pytestmark = pytest.mark.integration

HEAL: dict[str, Any] = {
    "tokens": 512,
    "batch": 4,
    "held_out": 4,
    "looks": 2,
    "train": "all",
    "learning_rate": 0.001,
}
WAYS: dict[str, tuple[dict[str, Any], int]] = {
    "streamline": (LIGHT | {"method": "streamline"}, 1),
    "tli, new blocks alone": (
        {"method": "tli", "sparsity": [], "every": 4, "heal": HEAL | {"train": "new"}},
        3,
    ),
}
"""By name: what is changed in the tests' recipe, and DeepSpeed's stage."""


@pytest.mark.parametrize("way", WAYS)
def test_two_workers_make_the_model_of_one_process(
    material, tmp_path: Path, ray_session, way: str
) -> None:
    changed, stage = WAYS[way]
    made: list[Published] = []
    for cluster in ({"engine": "local"}, TWO_WORKERS | {"zero_stage": stage, "replicas": 2}):
        out = tmp_path / cluster["engine"]
        (one,) = compress(Recipe.parse(material.recipe(out, **changed, cluster=cluster)), Display())
        made.append(one)
    told = [one.manifest for one in made]
    for key in ("removed", "kept", "inserted"):
        assert told[0].get(key) == told[1].get(key)
    for this, that in zip(told[0]["rounds"], told[1]["rounds"], strict=True):
        assert this.get("scores") == that.get("scores"), "replicas compute them, to the bit"
        assert this["losses"] == pytest.approx(that["losses"], rel=1e-4)
    if "healing" in told[0]:
        held = [record["healing"]["held_out"] for record in told]
        assert held[0] == pytest.approx(held[1], rel=1e-4)
        assert min(held[0]) == held[0][-1] < held[0][0], "or nothing was learned"
    ours, theirs = (load_file(Path(one.uri) / "model.safetensors") for one in made)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(
            ours[name], theirs[name], **REORDERED, msg=lambda text, name=name: f"{name}: {text}"
        )
