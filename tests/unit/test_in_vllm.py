"""Models that vLLM reads otherwise than their config.json says: before the work it is told that
this may come, and of each published model whether it did.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import transformers as tf
import yaml
from desk import Desk
from experts import save_split
from models import GROUPED

from fusegpt_ray.cli import main
from fusegpt_ray.publishing.in_vllm import BY_NUMBER, INSTEAD, SEEN_IN, wrong_in_vllm
from fusegpt_ray.publishing.modelcard import _serve

SLIDING, FULL = "sliding_attention", "full_attention"
PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()


def gpt_oss(*kinds: str) -> dict[str, Any]:
    sizes = GROUPED | {"num_hidden_layers": len(kinds), "head_dim": 8}
    return tf.GptOssConfig(**sizes, layer_types=list(kinds)).to_dict()


def llama4(blocks: int, step: int, *with_experts: int) -> dict[str, Any]:
    sizes = GROUPED | {"num_hidden_layers": blocks, "head_dim": 8, "num_local_experts": 4}
    config = tf.Llama4TextConfig(
        **sizes, interleave_moe_layer_step=step, moe_layers=list(with_experts)
    )
    return config.to_dict()


@pytest.mark.parametrize(
    ("config", "wrong"),
    [
        (gpt_oss(SLIDING, FULL, SLIDING, FULL), False),
        (gpt_oss(SLIDING, FULL, SLIDING), False),
        (gpt_oss(FULL, SLIDING, FULL, SLIDING), True),  # without the first block
        (gpt_oss(SLIDING, SLIDING, FULL), True),
        (llama4(4, 2, 1, 3), False),
        (llama4(4, 1, 0, 1, 2, 3), False),  # all have experts, whatever their numbers
        (llama4(3, 2, 0, 2), True),
        (tf.MistralConfig(**GROUPED).to_dict(), False),
    ],
)
def test_only_another_order_is_wrong(config: dict[str, Any], wrong: bool) -> None:
    assert bool(wrong_in_vllm(config)) == wrong


def swap_model(desk: Desk, config: dict[str, Any]) -> None:
    """Only what a plan looks at: a class and the shapes of its tensors."""
    kind = tf.AutoConfig.for_model(**config)
    model = tf.AutoModelForCausalLM.from_config(kind)
    (desk.model / "model.safetensors").unlink()
    model.save_pretrained(desk.model)


@pytest.mark.parametrize(
    ("config", "warned"),
    [
        (gpt_oss(*[SLIDING, FULL] * 2), 1),
        (llama4(4, 2, 1, 3), 1),
        (llama4(4, 1, 0, 1, 2, 3), 0),
        (tf.LlamaConfig(**GROUPED).to_dict(), 0),
    ],
)
@pytest.mark.parametrize("verb", ["plan", "validate"])
def test_who_looks_ahead_is_warned_once(
    verb: str,
    config: dict[str, Any],
    warned: int,
    desk: Desk,
    capsys: pytest.CaptureFixture[str],
) -> None:
    swap_model(desk, config)
    recipe = desk.write(method="mi", sparsity=[0.25, 0.5])
    assert main([verb, recipe]) == 0
    said = capsys.readouterr()
    assert said.err.count("gaps that change their order") == warned
    assert "WARNING" not in said.out


def test_runs_of_one_model_are_warned_of_once(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    save_split("gpt_oss", desk.model)
    asked = desk.recipe(evaluation={"held-out": {"data": str(desk.heldout)}})
    path = desk.folder / "comparison.yaml"
    path.write_text(yaml.safe_dump(asked | {"compare": {"methods": ["mi", "last"]}}))
    for verb in ("plan", "validate"):
        assert main([verb, str(path)]) == 0
        assert capsys.readouterr().err.count("WARNING") == 1


@pytest.mark.parametrize("quiet", [(), ("--quiet",)])
def test_the_run_and_the_card_tell_which_model_it_is(
    quiet: tuple[str, ...], desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of five blocks of two kinds in turns first one goes, and then its neighbour, which leaves
    them in turns.
    """
    save_split("gpt_oss", desk.model)
    assert main(["compress", desk.write(method="mi", sparsity=[0.2, 0.4]), *quiet]) == 0
    said = capsys.readouterr().err
    assert said.count("gaps that change their order") == 1
    one, two = sorted(desk.out.glob("demo-p*"))
    manifests = [json.loads((folder / "fusegpt.json").read_text()) for folder in (one, two)]
    assert [sorted(each["removed"]) for each in manifests] in ([[1], [1, 2]], [[2], [1, 2]])
    wrong = wrong_in_vllm(json.loads((one / "config.json").read_text()))
    assert [each.get("wrong_in_vllm") for each in manifests] == [wrong, None]
    assert re.findall("WARNING: (demo.*)", said) == [f"{one.name}: {wrong}"]
    cards = [(folder / "README.md").read_text() for folder in (one, two)]
    assert [f"Warning: {wrong}." in card for card in cards] == [True, False]
    assert [f'vllm serve "<this folder>" {INSTEAD}\n' in card for card in cards] == [True, False]


def test_a_card_names_no_command_where_vllm_has_none() -> None:
    wrong = wrong_in_vllm(llama4(3, 2, 0, 2))
    lines = "\n".join(_serve(wrong))
    assert f"Warning: {wrong}." in lines and "vllm serve" not in lines


def test_the_page_knows_the_same_models() -> None:
    """It is written by `make served`, which tries each class with a gap that matters."""
    assert f"vLLM {SEEN_IN}" in PAGE
    told = re.findall(r"^\| (\w+) \| warned of \|", PAGE, re.MULTILINE)
    types = {getattr(tf, name).config_class.model_type for name in told}
    assert types == BY_NUMBER.keys()
    assert "| FAILS |" not in PAGE
