"""Whole runs with mixtures of experts: however a checkpoint keeps them, what is published keeps
them so, in the same dtypes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from desk import LENGTH, Desk
from experts import EXPERTS, save_merged, save_split
from safetensors.torch import load_file
from test_unusual_models import published_equals_dense

from fusegpt_ray.cli import main

REFUSED = {
    "minimax": "other values in self_attn.slope_rate",  # how fast a block forgets
}
# Of Jamba, which has experts in every second block, only some blocks can go.
SPLIT = {name: save_split for name in EXPERTS if name not in (*REFUSED, "jamba")}
MERGED = dict.fromkeys(("mixtral", "granitemoeshared", "deepseek_v3"), save_merged)
CASES = [*SPLIT.items(), *MERGED.items()]
IDS = [*SPLIT, *(f"{name}-merged" for name in MERGED)]
Save = Callable[[str, Path, torch.dtype], Path]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: value
        for file in folder.glob("*.safetensors")
        for name, value in load_file(file).items()
    }


def run(desk: Desk, name: str, save: Save, **changes: Any) -> Path:
    """What is published of such a model in bfloat16."""
    (desk.model / "model.safetensors").unlink()
    save(name, desk.model, torch.bfloat16)
    assert main(["compress", desk.write(**changes)]) == 0
    (published,) = desk.out.glob("demo-p*")
    return published


def kept_tensors(desk: Desk, published: Path) -> dict[str, torch.Tensor]:
    """The dense model's tensors without the blocks that went, by their new names."""
    kept = json.loads((published / "fusegpt.json").read_text())["kept"]
    found = {}
    for name, value in tensors(desk.model).items():
        match = re.match(r"(model\.layers\.)(\d+)(\..+)", name)
        if match is None:
            found[name] = value
        elif int(match[2]) in kept:
            found[f"{match[1]}{kept.index(int(match[2]))}{match[3]}"] = value
    return found


@pytest.mark.parametrize(("name", "save"), CASES, ids=IDS)
def test_blocks_are_removed_exactly(name: str, save: Save, desk: Desk) -> None:
    published = run(desk, name, save, method="mi")
    published_equals_dense(desk.model, published)
    expected, found = kept_tensors(desk, published), tensors(published)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key


@pytest.mark.parametrize("name", REFUSED)
def test_blocks_that_depend_on_their_number_are_refused(
    name: str, desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    (desk.model / "model.safetensors").unlink()
    save_split(name, desk.model)
    assert main(["compress", desk.write(method="mi")]) == 2
    assert REFUSED[name] in capsys.readouterr().err
    assert not desk.out.exists()


HEALED = {"rank": 3, "batch": 4, "held_out": 4, "tokens": 8 * LENGTH, "looks": 1}
# Without the two weak blocks alone there would be little to heal.
DEEP = {"method": "mi", "sparsity": 0.6}
LEARNING = {
    "mixtral": (save_split, {"method": "fusegpt"}),
    "deepseek_v3": (save_split, {"method": "fusegpt"}),
    "gpt_oss": (save_split, {"method": "mi", "heal": HEALED | {"train": "lora"}}),
    "granitemoeshared": (save_split, DEEP | {"heal": HEALED | {"train": "all"}}),
    "qwen2_moe": (save_merged, DEEP | {"heal": HEALED | {"train": "lora"}}),
}


@pytest.mark.parametrize("name", LEARNING)
def test_what_was_trained_is_published_as_the_model_was(name: str, desk: Desk) -> None:
    save, changes = LEARNING[name]
    published = run(desk, name, save, **changes)
    _, report = tf.AutoModelForCausalLM.from_pretrained(published, output_loading_info=True)
    assert not any(report.values()), report
    dense, found = kept_tensors(desk, published), tensors(published)
    assert {key: (value.shape, value.dtype) for key, value in found.items()} == {
        key: (value.shape, value.dtype) for key, value in dense.items()
    }
    routers = [key for key in dense if re.search(r"\.(router|gate|shared_expert_gate)\.", key)]
    same = [torch.equal(found[key], dense[key]) for key in routers]
    # Only where all weights are trained are these, too.
    assert same and all(same) == (name != "granitemoeshared")
    experts = [key for key in dense if "experts." in key or "_linear.weight" in key]
    assert any(not torch.equal(found[key], dense[key]) for key in experts)
