"""The work of evaluation is known once the number of windows is."""

from __future__ import annotations

from typing import Any

import pytest
from desk import Desk
from test_cost import costs, recipe, stages
from test_healed_runs import HEAL

from fusegpt_ray.pipeline import compress
from fusegpt_ray.terminal.display import Display
from fusegpt_ray.text import protocol


@pytest.mark.parametrize(
    ("changes", "models"),
    [
        ({"method": "mi"}, 2),
        ({"method": "mi", "heal": HEAL}, 3),
        ({"fusion": {"start": "scale"}, "heal": HEAL}, 5),
        ({"method": "slicegpt", "heal": HEAL}, 3),
        ({"method": "tli", "depth": 0.2, "sparsity": []}, 2),
    ],
    ids=["mi", "mi, healed", "all", "narrower", "deeper"],
)
def test_evaluation_counts_every_model_that_the_judge_measures(
    desk: Desk, changes: dict[str, Any], models: int
) -> None:
    """As many as have a perplexity in the manifest: each window passes all of their blocks."""
    fusion = desk.recipe()["fusion"] | changes.get("fusion", {})
    held = {"heldout": {"data": str(desk.heldout)}}
    asked = {"sparsity": 0.2} | changes | {"fusion": fusion, "evaluation": held}
    unknown = costs(desk, **asked)
    assert "evaluation" not in stages(unknown) and unknown.uncounted == ("heldout",)
    assert "evaluation on heldout is not counted" in unknown.in_words()
    windows = 5
    given = {"heldout": held["heldout"] | {"windows": windows}}
    known = costs(desk, **asked | {"evaluation": given})
    assert not known.uncounted and "not counted" not in known.in_words()
    (model,) = compress(recipe(desk, **asked), Display())
    row = model.manifest["perplexity"]["heldout"]
    assert len(protocol.stages([row])) == models
    # In the manifest, all is counted: the text has been read.
    (planned,) = [one for one in model.manifest["planned"] if one["stage"] == "evaluation"]
    assert planned["block_forwards"] == stages(known)["evaluation"]
    walked = 5 + (models - 1) * len(model.manifest["kept"])
    assert planned["block_forwards"] == windows * walked
