"""Which weights are read, and which are tied: those that `from_pretrained` takes and ties."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as tf
from desk import LENGTH, Desk
from expected import perplexity
from models import GROUPED, load_model, randomize
from safetensors.torch import load_file, save_file

from fusegpt_ray.cli import main

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def spoil(model: Path, flag: bool, tensors: str) -> None:
    """The desk's model: what its config.json says of ties, and what its file holds."""
    torch.manual_seed(3)
    made = tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED, tie_word_embeddings=False))
    randomize(made)
    made.save_pretrained(model)
    held = load_file(model / "model.safetensors")
    if tensors == "equal":
        held[HEAD] = held[EMBEDDING].clone()
    if tensors == "no head":
        del held[HEAD]
    if tensors == "no embedding":
        del held[EMBEDDING]
    save_file(held, model / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": flag}))


@pytest.mark.parametrize(
    ("flag", "tensors"),
    [
        (True, "another"),
        (True, "equal"),
        (True, "no head"),
        (True, "no embedding"),
        (False, "another"),
    ],
)
def test_ties_as_from_pretrained_makes_them(
    flag: bool, tensors: str, desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(desk.model, flag, tensors)
    text = ["--data", str(desk.heldout), "--length", str(LENGTH)]
    assert main(["evaluate", str(desk.model), *text, "--json"]) == 0
    wanted = perplexity(load_model(desk.model), desk.heldout)
    found = json.loads(capsys.readouterr().out)["perplexity"]
    assert found == pytest.approx(wanted, rel=1e-5)  # float32, another order of additions
    recipe = desk.write(method="mi", evaluation={"own": {"data": str(desk.heldout)}})
    assert main(["compress", recipe]) == 0
    published = desk.out / "demo-p40"
    said = json.loads((published / "fusegpt.json").read_text())["perplexity"]
    config = json.loads((published / "config.json").read_text())
    assert config["tie_word_embeddings"] == (flag and tensors != "another")
    compressed = perplexity(load_model(published), desk.heldout)
    assert compressed == pytest.approx(said["own"]["dropped"], rel=1e-5)


def test_the_weights_of_the_latest_save_are_read(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    """An index of an earlier one, with its shards, lies beside them."""
    load_model(desk.model).save_pretrained(desk.folder / "old", max_shard_size="50KB")
    spoil(desk.model, False, "another")
    for file in (desk.folder / "old").glob("*safetensors*"):
        shutil.copy(file, desk.model)
    text = ["--data", str(desk.heldout), "--length", str(LENGTH)]
    assert main(["evaluate", str(desk.model), *text, "--json"]) == 0
    wanted = perplexity(load_model(desk.model), desk.heldout)
    assert json.loads(capsys.readouterr().out)["perplexity"] == pytest.approx(wanted, rel=1e-5)
    assert wanted != pytest.approx(
        perplexity(load_model(desk.folder / "old"), desk.heldout), rel=0.1
    )


def test_a_head_that_is_missing_and_not_tied_is_said(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(desk.model, False, "no head")
    assert main(["compress", desk.write()]) == 2
    assert "lacks 1 tensors" in capsys.readouterr().err
