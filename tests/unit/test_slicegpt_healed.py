"""A narrower model, healed to the dense one's distributions, beside plain torch."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from desk import LENGTH, Desk
from infirmary import kl
from models import load_model
from safetensors.torch import load_file
from stopped_runs import Watching
from test_deeper_runs import Stopped
from test_slicegpt import recipe
from torch import nn

from fusegpt_ray.cost.cost import _healing
from fusegpt_ray.cost.flops import head_flops, healing_flops, matrix_flops
from fusegpt_ray.cost.footprint import healing_bytes
from fusegpt_ray.errors import UserError
from fusegpt_ray.healing.whole_model import WholeModel
from fusegpt_ray.pipeline import compress
from fusegpt_ray.planning.plan import plan
from fusegpt_ray.terminal.display import Display

RATE = 1e-3
HEAL = {"tokens": 8 * LENGTH, "batch": 4, "held_out": 4, "looks": 2, "warmup": 0.0}
ALL = HEAL | {"train": "all", "learning_rate": RATE}


def healed(desk: Desk, name: str, show: Display | None = None, **heal: Any) -> Any:
    output = {"uri": str(desk.out), "name": name, "report": False, "samples": []}
    # A seed with which two steps on random text make what is held out better, too.
    drawn = desk.recipe()["calibration"] | {"seed": 1}
    asked = recipe(desk, output=output, heal=heal or None, calibration=drawn)
    (published,) = compress(asked, show or Watching())
    return published


@pytest.mark.parametrize("share", [None, 5])
def test_healing_is_adam_on_the_sliced_model(
    share: int | None, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Distributions of each by its own norm and head, of two hidden sizes; also where all blocks
    are one group, as if their layers were the same modules."""
    drawn: list[torch.Tensor] = []
    real = WholeModel.task

    def noted(self: Any, windows: np.ndarray, held_out: np.ndarray, *rest: Any) -> Any:
        drawn.extend(torch.from_numpy(each).long() for each in (windows, held_out))
        return real(self, windows, held_out, *rest)

    sliced = healed(desk, "sliced")
    monkeypatch.setattr(WholeModel, "task", noted)
    done = healed(desk, "healed", **ALL, share=share)
    student, teacher = load_model(Path(sliced.uri)), load_model(desk.model)
    assert student.config.hidden_size < teacher.config.hidden_size
    for model in (student, teacher):
        model.requires_grad_(False)
    if share:
        for path, layer in [*student.model.layers[0].named_modules()]:
            if isinstance(layer, nn.Linear):
                for block in student.model.layers[1:]:
                    block.set_submodule(path, layer)
    student.model.layers.requires_grad_()
    adam = torch.optim.Adam(student.model.layers.parameters(), betas=(0.9, 0.95))
    windows, held_out = drawn
    states, held = [copy.deepcopy(student.state_dict())], [kl(student, teacher, held_out).item()]
    for step, ids_BT in enumerate(windows.split(4)):
        adam.param_groups[0]["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / 2))
        adam.zero_grad()
        kl(student, teacher, ids_BT).backward()
        adam.step()
        held.append(kl(student, teacher, held_out).item())
        states.append(copy.deepcopy(student.state_dict()))
    assert done.manifest["healing"]["held_out"] == pytest.approx(held, rel=1e-3)
    best = min(range(3), key=held.__getitem__)
    assert best > 0, "or nothing was learned"
    for name, value in load_file(Path(done.uri) / "model.safetensors").items():
        # As in `test_healing`: Adam makes much of gradients that are little more than rounding.
        assert (value - states[best][name]).abs().mean() < 2e-2 * RATE, name
    row = done.manifest["perplexity"]["heldout"]
    assert row["sliced"] == pytest.approx(
        sliced.manifest["perplexity"]["heldout"]["sliced"], rel=1e-6
    )
    assert row["healed"] != row["sliced"]


@pytest.mark.parametrize("heal", [HEAL | {"rank": 2}, ALL | {"loss": "tokens"}])
def test_a_stopped_one_ends_with_the_same_bytes(desk: Desk, heal: dict[str, Any]) -> None:
    """With low-rank updates, and on the text itself."""
    whole = (Path(healed(desk, "whole", **heal).uri) / "model.safetensors").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        healed(desk, "demo", Stopped("a part"), **heal)
    done = healed(desk, "demo", **heal)
    assert (Path(done.uri) / "model.safetensors").read_bytes() == whole
    assert "hidden size 32 → 24" in (Path(done.uri) / "README.md").read_text()


def test_what_it_takes_is_known_before(desk: Desk) -> None:
    """Two trunks at once, and less work than for a model as wide as the dense one."""
    narrow, wide = (
        recipe(desk, heal=HEAL, method=method, sparsity=0.25) for method in ("slicegpt", "mi")
    )
    planned = plan(narrow, Display())
    dense = planned.model.stack
    needed = [healing_bytes(asked, dense, torch.float32, 5) for asked in (narrow, wide)]
    assert needed[0] > needed[1]
    whole, sliced = (healing_flops(recipe(desk, heal=ALL), dense, 5, width) for width in (1, 0.75))
    # There and back through all matrices, and through the student's head without its gradient.
    saved = 5 * 3 * matrix_flops(dense, LENGTH) + 2 * head_flops(dense, LENGTH)
    assert whole - sliced == pytest.approx(0.25 * saved, rel=1e-6)
    (healing,) = (stage for stage in planned.cost.stages if stage.name == "healing")
    as_wide = _healing(narrow, dense, [5], 8, looks=2)
    assert healing.block_forwards == as_wide.block_forwards and healing.flops < as_wide.flops


def test_states_of_two_sizes_are_not_compared(desk: Desk) -> None:
    with pytest.raises(UserError, match="its states have another size") as refused:
        recipe(desk, heal=HEAL | {"hidden": 0.5})
    assert refused.value.key == "heal.hidden"
