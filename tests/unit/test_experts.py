"""Mixtures of experts: however a checkpoint keeps them, what is published keeps them so, and is
exact.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from desk import Desk
from experts import EXPERTS, save_merged, save_split
from safetensors.torch import load_file
from test_unusual_models import published_equals_dense

from fusegpt_ray.cli import main

LAYOUTS = {"split": save_split, "merged": save_merged}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def renumbered(name: str, places: dict[int, int]) -> str:
    """What a tensor is called once its block has another place; nothing if the block is gone."""
    if (found := re.match(r"(model\.layers\.)(\d+)(\..+)", name)) is None:
        return name
    number = int(found[2])
    return f"{found[1]}{places[number]}{found[3]}" if number in places else ""


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", EXPERTS)
def test_blocks_are_removed_exactly(name: str, layout: str, desk: Desk) -> None:
    (desk.model / "model.safetensors").unlink()
    LAYOUTS[layout](name, desk.model)
    assert main(["compress", desk.write(method="mi")]) == 0
    published = desk.out / "demo-p40"
    published_equals_dense(desk.model, published)
    kept = json.loads((published / "fusegpt.json").read_text())["kept"]
    before, after = tensors(desk.model), tensors(published)
    places = {number: position for position, number in enumerate(kept)}
    expected = {renumbered(key, places): value for key, value in before.items()}
    expected.pop("", None)
    assert after.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(after[key], value) and after[key].dtype == value.dtype, key
