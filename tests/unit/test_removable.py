"""Architectures of which only some blocks can go: those alone are candidates, and it is said."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
import transformers as tf
from desk import Desk
from experts import EXPERTS
from models import COMMON, DEPTH, GROUPED, MODELS, VOCAB, randomize
from safetensors.torch import load_file, save_file

from fusegpt_ray.cli import main
from fusegpt_ray.errors import UserError
from fusegpt_ray.model.removable import ANY, Removable
from fusegpt_ray.model.stack import Block, Stack
from fusegpt_ray.model.structure import observe
from fusegpt_ray.pipeline import compress
from fusegpt_ray.publishing import rehearsal
from fusegpt_ray.publishing.rehearsal import _sets, rehearse
from fusegpt_ray.recipe.recipe import Recipe


def gpt_neox_japanese() -> tf.PretrainedConfig:
    """Its last block alone has a bias."""
    return tf.GPTNeoXJapaneseConfig(**COMMON, intermediate_multiple_size=2)


def gpt2_by_number() -> tf.PretrainedConfig:
    """Each block divides its attention by its own number."""
    sizes = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": DEPTH, "n_head": 4, "n_positions": 64}
    return tf.GPT2Config(**sizes, scale_attn_by_inverse_layer_idx=True)


def diffllama() -> tf.PretrainedConfig:
    """A constant of each block comes of its number."""
    return tf.DiffLlamaConfig(**GROUPED)


NUMBERED = Removable(from_the_end=True)
CASES = {
    "llama": (lambda: tf.LlamaConfig(**GROUPED), ANY, "", ()),
    "gpt-neox-japanese": (
        gpt_neox_japanese,
        Removable(tuple(range(DEPTH - 1))),
        "attention.dense_bias",
        (),
    ),
    "gpt2": (gpt2_by_number, NUMBERED, "attn.scaling", (4, 3)),
    "diffllama": (diffllama, NUMBERED, "self_attn.lambda_init", (4, 3)),
}


@pytest.mark.parametrize("name", CASES)
def test_what_can_go_is_known_before_the_run(name: str) -> None:
    make, expected, why, _ = CASES[name]
    stack, raw = described(make())
    found = rehearse(stack, observe(raw), [1, 2])
    assert (found.blocks, found.from_the_end) == (expected.blocks, expected.from_the_end)
    assert why in found.why


def described(config: tf.PretrainedConfig) -> tuple[Stack, dict[str, Any]]:
    kind = tf.AutoModelForCausalLM._model_mapping[type(config)].__name__
    raw = json.loads(config.to_json_string(use_diff=False)) | {"architectures": [kind]}
    blocks = tuple(Block(number, {}) for number in range(config.num_hidden_layers))
    return Stack(raw, "", {}, blocks), raw


def rwkv(depth: int) -> tf.PretrainedConfig:
    """After each sixth block, the states are divided by two."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "attention_hidden_size": 32}
    return tf.RwkvConfig(vocab_size=VOCAB, num_hidden_layers=depth, **sizes)


def test_what_follows_the_last_block_must_not_depend_on_the_depth() -> None:
    stack, raw = described(rwkv(6))
    with pytest.raises(UserError, match="after its last block depends on the number of blocks"):
        rehearse(stack, observe(raw), [1])
    stack, raw = described(rwkv(5))
    assert rehearse(stack, observe(raw), [1]).blocks == (1, 2, 3, 4)  # the first one has a norm


def test_of_candidates_a_block_is_watched_once_at_each_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Though each candidate makes another config.json, and so another model: two kinds of blocks
    take turns."""
    kinds = ["conv", "full_attention"] * 4
    stack, raw = described(tf.Lfm2Config(**GROUPED | {"num_hidden_layers": 8}, layer_types=kinds))
    structure = observe(raw)
    watched, operations = 0, rehearsal._operations

    def counted(*call: Any) -> list[Any]:
        nonlocal watched
        watched += 1
        return operations(*call)

    monkeypatch.setattr(rehearsal, "_operations", counted)
    attempt = rehearsal._Attempt(stack, structure)
    assert [attempt.problem([number]) for number in range(8)] == [""] * 8
    assert len(attempt._others) == 8
    assert watched == 8 + 7 * 2  # of the dense model, and at the same number or one less


def saved(desk: Desk, config: tf.PretrainedConfig) -> None:
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config)
    randomize(model)
    (desk.model / "model.safetensors").unlink()
    model.save_pretrained(desk.model)


@pytest.mark.parametrize("name", CASES)
def test_no_other_block_goes(name: str, desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor does the proof find anything: what is published is what was scored."""
    make, expected, why, removed = CASES[name]
    saved(desk, make())
    assert main(["compress", desk.write(method="mi")]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert ("only the blocks 0, 1, 2, 3 can go" in said) == (expected.blocks is not None)
    assert why in said
    assert ("only the last blocks can go, in this order" in said) == expected.from_the_end
    (folder,) = desk.out.glob("demo-p*")
    manifest = json.loads((folder / "fusegpt.json").read_text())
    assert tuple(manifest["removed"]) == removed or not expected.from_the_end
    for number, record in enumerate(manifest["rounds"]):
        scored = {int(dense) for dense in record["scores"] | record["stopped"]}
        assert len(scored) == (1 if expected.from_the_end else DEPTH - number - bool(why))
        assert scored <= set(expected.blocks or range(DEPTH))


def test_a_tournament_is_refused(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    """There is nothing to choose."""
    saved(desk, diffllama())
    changes = {"search": {}, "heal": {"tokens": 96, "batch": 4}}
    assert main(["compress", desk.write(method="mi", **changes)]) == 2
    said = capsys.readouterr().err
    assert "search = " in said and "only the last blocks can go" in said
    assert not desk.out.exists()


def test_the_candidates_of_a_round() -> None:
    assert ANY.among((0, 1, 3)) is None
    assert Removable((0, 1, 2)).among((0, 2, 4)) == (0, 2)
    assert Removable(from_the_end=True).among((0, 2, 4)) == (4,)
    assert Removable(one_stays=(1, 3)).among((0, 1, 3)) is None
    assert Removable(one_stays=(1, 3)).among((0, 2, 3)) == (0, 2)
    assert Removable((0, 3), one_stays=(1, 3)).among((0, 2, 3)) == (0,)


@pytest.mark.parametrize(
    ("numbers", "fewest", "most"), [(4, 1, 4), (9, 2, 3), (12, 1, 11), (3, 1, 1)]
)
def test_as_many_blocks_are_tried_as_a_run_removes(numbers: int, fewest: int, most: int) -> None:
    first, spread, last = _sets(range(numbers), fewest, most, ANY)
    assert len(first) == len(last) == fewest and len(set(spread)) == most
    assert spread == sorted(spread) and set(spread) <= set(range(numbers))


lfm2 = MODELS["lfm2"].config
HYBRIDS = {"lfm2": lfm2, "qwen3_next": EXPERTS["qwen3_next"]}


@pytest.mark.parametrize("name", HYBRIDS)
def test_one_attention_block_stays_in_all_that_is_tried(name: str) -> None:
    config = HYBRIDS[name]()
    attention = tuple(n for n, kind in enumerate(config.layer_types) if kind == "full_attention")
    most = config.num_hidden_layers - 2
    rule = Removable(one_stays=attention)
    tried = _sets(range(config.num_hidden_layers), most, most, rule)
    plain = _sets(range(config.num_hidden_layers), most, most, ANY)
    assert tried != plain and all(len(set(each)) == most for each in tried)
    for each, before in zip(tried, plain, strict=True):
        assert not {*attention} <= {*each}
        assert each == before or {*attention} <= {*before}
    stack, raw = described(config)
    assert rehearse(stack, observe(raw), [1, most]) == rule


WAYS = ["mi", "kl", "loss", "bi", "run", "spaced"]


def unimportant_attention(desk: Desk) -> None:
    """A hybrid whose two attention blocks, side by side, do next to nothing."""
    saved(desk, lfm2())
    file = desk.model / "model.safetensors"
    tensors = load_file(file)
    for name, value in tensors.items():
        if re.search(r"layers\.[12]\..*(out_proj|w2)", name):
            value *= 1e-3
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("way", [*WAYS, "tournament", "shortgpt", "sleb", "last", "random"])
def test_one_attention_block_stays_however_blocks_are_chosen(way: str, desk: Desk) -> None:
    """Though both would be the first to go."""
    unimportant_attention(desk)
    changes: dict[str, Any] = {"method": "mi", "sparsity": 0.6}
    if way in WAYS or way == "tournament":
        others = [other for other in ("mi", "bi") if other != way]
        candidates = WAYS if way == "tournament" else [way, others[0]]
        heal = {"tokens": 48, "batch": 4, "held_out": 4, "train": "all", "looks": 1}
        changes |= {"search": {"candidates": candidates}, "heal": heal}
    else:
        changes["method"] = way
    (found,) = compress(Recipe.parse(desk.recipe(**changes)))
    removed = found.manifest["removed"]
    assert len(removed) == 3 and not {1, 2} <= {*removed}
    assert {1, 2} & {*removed} or way in ("last", "random")
    searched = found.manifest.get("search", {}).get("tried", [])
    assert bool(searched) == ("search" in changes)
    for tried in searched:
        assert not {1, 2} <= {*tried["removed"]}
        assert ("run" in tried["ways"]) <= (sorted(tried["removed"]) == [2, 3, 4])
