"""Two training workers make the models of one process, whatever the method trains."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import LIGHT, TWO_WORKERS
from safetensors.torch import load_file
from test_engines import REORDERED

from fusegpt_ray.compressing.compression import Compression
from fusegpt_ray.pipeline import compress, open_workers
from fusegpt_ray.planning.plan import Plan, plan
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.terminal.display import Display
from fusegpt_ray.workers.base import Workers

pytestmark = pytest.mark.integration

HEAL: dict[str, Any] = {
    "tokens": 512,
    "batch": 4,
    "held_out": 4,
    "looks": 2,
    "train": "all",
    "learning_rate": 0.001,
}
LOW_RANK = HEAL | {"train": "lora", "rank": 4, "learning_rate": 0.005}
QUARTER: dict[str, Any] = {"sparsity": 0.25}
TLI: dict[str, Any] = {"method": "tli", "sparsity": [], "every": 4}
WAYS: dict[str, dict[str, Any]] = {
    "streamline": LIGHT | {"method": "streamline"},
    "tli": TLI | {"heal": HEAL},
    "tli-new-blocks-alone": TLI | {"heal": HEAL | {"train": "new"}},
    "dus": {"method": "dus", "sparsity": [], "depth": 0.25, "heal": LOW_RANK},
    "foldgpt-shared": QUARTER | {"method": "foldgpt", "heal": HEAL | {"share": 2}},
    "slicegpt": QUARTER | {"method": "slicegpt", "heal": LOW_RANK},
    "slicegpt-shared": QUARTER | {"method": "slicegpt", "heal": HEAL | {"share": 2}},
}
"""By name, what is changed in the tests' recipe."""
CLUSTER = TWO_WORKERS | {"zero_stage": 3}
"""Of the stages of ZeRO, the one that splits most; `test_healing_on_workers` has the others. There
is room for one replica beside the workers, so that none of them is started again.
"""


def planned(material: Any, out: Path, way: str, cluster: dict[str, Any]) -> Plan:
    asked = material.recipe(out / way, **WAYS[way], cluster=cluster)
    return plan(Recipe.parse(asked), Display())


@pytest.fixture(name="together", scope="module")
def _together(
    material: Any, ray_session: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, Workers]]:
    """Where models go, and the replica and the two training workers that make all of them."""
    out = tmp_path_factory.mktemp("together")
    with open_workers(planned(material, out, "streamline", CLUSTER).setup, Display()) as workers:
        yield out, workers


@pytest.mark.parametrize("way", WAYS)
def test_two_workers_make_the_model_of_one_process(
    material: Any, tmp_path: Path, together: tuple[Path, Workers], way: str
) -> None:
    alone = planned(material, tmp_path, way, {"engine": "local"}).recipe
    made = [*compress(alone, Display())]
    out, workers = together
    begun = Compression.begin(planned(material, out, way, CLUSTER), workers, Display())
    made += begun.publish_all(restart=False).values()
    told = [one.manifest for one in made]
    for key in ("removed", "kept", "inserted", "width"):
        assert told[0].get(key) == told[1].get(key)
    rows = [record["perplexity"]["heldout"] for record in told]
    alike = {"dense", "dropped", "sliced", "inserted"} & rows[0].keys()
    assert len(alike) == 2, "the dense model, and what became of it before anything learned"
    for stage in alike:
        assert rows[0][stage] == rows[1][stage], "a replica makes them, to the bit"
    for this, that in zip(told[0]["rounds"], told[1]["rounds"], strict=True):
        assert this.get("scores") == that.get("scores"), "a replica computes them, to the bit"
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
