"""Models that plain `from_pretrained` loads and that were refused: by limits or readers of our
own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from desk import Desk, add_tokenizer
from mistakes import edit
from models import DEPTH, GROUPED, randomize, save_tiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fusegpt_ray.cli import main
from fusegpt_ray.model.config import auto_class, read_config
from fusegpt_ray.model.source import Source
from fusegpt_ray.publishing.publish import left_out

INFINITE = {"__float__": "Infinity"}


def shortened(desk: Desk, auto: Any = tf.AutoModelForCausalLM) -> tuple[Path, Any]:
    """The model of the desk without two of its blocks, published, and as plain transformers loads
    it."""
    assert main(["compress", desk.write(method="mi")]) == 0
    (folder,) = desk.out.glob("demo-p*")
    model, report = auto.from_pretrained(folder, output_loading_info=True)
    assert {kind: names for kind, names in report.items() if names} == {}
    assert model.config.get_text_config().num_hidden_layers == DEPTH - 2
    return folder, model


@pytest.mark.parametrize(
    "change",
    [
        {"num_experts": 16384},
        {"n_routed_experts": 10**6, "max_window_layers": 10**6},
        {"architectures": None},
        {"architectures": []},
        {"architectures": ["GPT2LMHeadModel"]},
        {"router_jitter": INFINITE, "time_step_limit": [0.0, INFINITE]},
        {"router_jitter": float("inf"), "aux_loss": float("nan")},
    ],
    ids=str,
)
def test_what_builds_nothing_is_no_reason(desk: Desk, change: dict[str, Any]) -> None:
    edit(desk, "config.json", lambda data: data | change)
    folder, _ = shortened(desk)
    written = json.loads((folder / "config.json").read_text())
    expected = {key: value for key, value in change.items() if key != "architectures"}
    assert json.dumps({key: written[key] for key in expected}) == json.dumps(expected)
    assert written["architectures"] == ["LlamaForCausalLM"]


def test_infinity_arrives(desk: Desk) -> None:
    raw = json.loads((desk.model / "config.json").read_text())
    assert read_config(raw | {"limit": INFINITE}).limit == float("inf")


def test_a_vision_language_model_without_an_architecture(tmp_path: Path) -> None:
    folder = save_tiny("llava", tmp_path / "model")
    raw = json.loads((folder / "config.json").read_text())
    del raw["architectures"]
    assert auto_class(raw) == "AutoModelForImageTextToText"
    (folder / "config.json").write_text(json.dumps(raw))
    assert len(Source.find(str(folder), None).stack()) == DEPTH


def test_names_that_differ_inside_blocks(desk: Desk) -> None:
    """EXAONE's are `transformer.h.3.attn.attention.q_proj` on disk and
    `model.layers.3.self_attn.q_proj` in the model."""
    torch.manual_seed(0)
    for old in desk.model.iterdir():
        old.unlink()
    model = tf.AutoModelForCausalLM.from_config(tf.AutoConfig.for_model("exaone", **GROUPED))
    randomize(model)
    model.save_pretrained(desk.model)
    add_tokenizer(desk.model)
    with safe_open(desk.model / "model.safetensors", "pt") as file:
        before = {*file.keys()}
    assert any(name.startswith("transformer.h.3.attn.attention.") for name in before)
    folder, short = shortened(desk)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {*file.keys()} == {
            name for name in before if ".h.3." not in name and ".h.4." not in name
        }
    kept = json.loads((folder / "fusegpt.json").read_text())["kept"]
    ids = torch.arange(3, 20).reshape(1, -1)
    model.eval().model.layers = torch.nn.ModuleList(model.model.layers[number] for number in kept)
    for position, block in enumerate(model.model.layers):
        block.self_attn.layer_idx = position
    model.config.num_hidden_layers = len(kept)
    assert torch.allclose(
        model(ids, use_cache=False).logits, short.eval()(ids, use_cache=False).logits, atol=1e-5
    )


def test_a_prediction_layer_that_its_class_knows_of_is_left_out(tmp_path: Path) -> None:
    """GLM-OCR is dense, and its seventeenth layer predicts further tokens: `from_pretrained`
    passes over it."""
    text = GROUPED | {"num_hidden_layers": 16, "head_dim": 8}
    vision = {
        "hidden_size": 16,
        "depth": 1,
        "num_heads": 2,
        "intermediate_size": 24,
        "out_hidden_size": 32,
    }
    config = tf.GlmOcrConfig(text_config=text, vision_config=vision)
    tf.GlmOcrForConditionalGeneration(config).save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    further = {
        name.replace(".layers.15.", ".layers.16."): value.clone()
        for name, value in held.items()
        if ".layers.15." in name
    }
    save_file(held | further, tmp_path / "model.safetensors", metadata={"format": "pt"})
    source = Source.find(str(tmp_path), None)
    stack = source.stack()
    assert len(stack) == 16 and {*stack.ignored} == {*further} and further
    assert {*further} <= {*left_out(source, stack)}
