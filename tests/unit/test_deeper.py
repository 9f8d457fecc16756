"""Copies of blocks put into a stack: where they go, that the model stays what it was, and what is
published.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers as tf
from experts import EXPERTS, save_split
from models import COMMON, DEPTH, MODELS, SUPPORTED, load_model, open_stack, randomize
from published_models import IDS, load, published, same_logits
from recipes import recipe

from fusegpt_ray.errors import UserError
from fusegpt_ray.fusion.writers import writers
from fusegpt_ray.methods import METHODS
from fusegpt_ray.methods.base import Change, Round
from fusegpt_ray.methods.inserting import deeper
from fusegpt_ray.model.stack import Block, Stack
from fusegpt_ray.model.structure import observe
from fusegpt_ray.publishing.rehearsal import rehearse_deeper
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.store.checkpoint import read_tensors
from fusegpt_ray.store.fence import nobody_else
from fusegpt_ray.terminal.display import Display

MIXTURES = ["mixtral", "deepseek_v3", "granitemoehybrid", "gpt_oss"]
"""Experts stored one by one and together, with biases, beside state space blocks."""


def change(dense: Stack, folder: Path, asked: Recipe) -> Change:
    """What the recipe's method makes of a dense model. It asks nothing of workers."""
    nobody = cast(Any, None)
    windows = cast(Any, None)
    this = Round(
        1,
        asked,
        nobody,
        dense,
        dense,
        None,
        0,
        windows,
        "",
        str(folder / "round-001"),
        "",
        nobody_else,
        Display(),
    )
    return METHODS[asked.method].change(this)


def raw_config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


# --- where copies go ---


@pytest.mark.parametrize(
    ("asked", "blocks", "kinds"),
    [
        ({"every": 2}, 5, [0, 1, 1, 2, 3, 3, 4]),
        ({"every": 5}, 5, [0, 1, 2, 3, 4, 4]),
        ({"every": 1}, 3, [0, 0, 1, 1, 2, 2]),
        ({"depth": 0.25}, 8, [0, 1, 2, 3, 3, 4, 5, 6, 7, 7]),
        ({"depth": "+40%"}, 5, [0, 1, 2, 2, 3, 4, 4]),
        ({"depth": 1}, 3, [0, 0, 1, 1, 2, 2]),
    ],
)
def test_injected_copies_stand_behind_their_originals(
    asked: dict[str, Any], blocks: int, kinds: list[int]
) -> None:
    assert [*kinds_of("tli", asked, blocks)] == kinds


def test_what_every_adds_evenly_depth_adds_at_the_same_places() -> None:
    for blocks, every in ((12, 4), (32, 2), (6, 6)):
        share = {"depth": 1 / every}
        assert kinds_of("tli", {"every": every}, blocks) == kinds_of("tli", share, blocks)


@pytest.mark.parametrize("blocks", [2, 5, 12])
def test_up_scaling_is_the_first_blocks_and_then_the_last(blocks: int) -> None:
    for add in range(1, blocks + 1):
        depth = blocks + add
        kept = [*range(blocks)]
        wanted = kept[: depth - depth // 2] + kept[blocks - depth // 2 :]
        assert [*kinds_of("dus", {"depth": add / blocks}, blocks)] == wanted


def test_solar_is_made_of_32_blocks_as_its_paper_says() -> None:
    assert kinds_of("dus", {"depth": "+50%"}, 32) == (*range(24), *range(8, 32))


def kinds_of(method: str, asked: dict[str, Any], blocks: int) -> tuple[int, ...]:
    growth = METHODS[method].growth
    assert growth
    dense = Stack({}, "", {}, tuple(Block(number, {}) for number in range(blocks)))
    stack = deeper(dense, growth.place(recipe(method=method, **asked), blocks))
    assert len({*stack.kept}) == len(stack) and {*range(blocks)} < {*stack.kept}
    return stack.kinds


def test_inserted_blocks_survive_json_and_have_names_of_their_own(
    checkpoint: Callable[[str], Path],
) -> None:
    dense = open_stack(checkpoint("llama"))
    copy = dense.blocks[3].copied(DEPTH)
    stack = dense.insert(1, copy)
    assert stack.kept == (0, 1, DEPTH, 2, 3, 4) and stack.kinds == (0, 1, 3, 2, 3, 4)
    assert Stack.from_json(json.loads(json.dumps(stack.to_json()))) == stack
    assert stack.drop(3).position(DEPTH) == 2
    assert stack.swap({DEPTH: dense.blocks[0]}).kept[2] == 0
    with pytest.raises(AssertionError):
        stack.insert(0, copy)  # the name is taken


# --- that the model stays what it was ---


@pytest.mark.parametrize("name", [*MODELS, *MIXTURES])
def test_the_deeper_model_starts_as_the_old_one_bit_for_bit(
    name: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Loaded by plain from_pretrained, in the logits of a pass and of generation with a cache."""
    place = tmp_path / "source"
    source = checkpoint(name) if name in MODELS else save_split(name, place)
    stack = change(open_stack(source), tmp_path, recipe(method="tli", every=2)).stack
    published(source, tmp_path / "out", stack=stack)
    dense, model = load(source), load(tmp_path / "out")
    assert model.config.get_text_config().num_hidden_layers == DEPTH + 2
    assert same_logits(model, dense)
    prompt = {"input_ids": IDS[:1, :5], "max_new_tokens": 4, "do_sample": False}
    with torch.no_grad():
        assert torch.equal(model.generate(**prompt), dense.generate(**prompt))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "lfm2", "mixtral"])
def test_only_what_writes_to_the_stream_is_zero(
    name: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    place = tmp_path / "source"
    source = checkpoint(name) if name in MODELS else save_split(name, place)
    dense = open_stack(source)
    made = change(dense, tmp_path, recipe(method="tli", every=2))
    # Blocks of one kind share what is zero.
    assert len(made.files) == (2 if name == "lfm2" else 1)
    last = {"llama": "o_proj|down_proj", "gemma3": "o_proj|down_proj", "gpt2": "c_proj"}
    last |= {"lfm2": "out_proj|w2", "mixtral": "o_proj|w2"}
    for number in (DEPTH, DEPTH + 1):
        block = made.stack.blocks[made.stack.position(number)]
        own = read_tensors(dense.blocks[block.kind].weights)
        for key, value in read_tensors(block.weights).items():
            zero = any(f".{part}." in f".{key}" for part in last[name].split("|"))
            assert value.dtype == own[key].dtype and own[key].any()
            assert torch.equal(value, torch.zeros_like(value) if zero else own[key]), key


def test_a_block_with_a_norm_behind_its_sums_is_refused() -> None:
    config = tf.OPTConfig(**COMMON, ffn_dim=48, word_embed_proj_dim=32)
    raw = json.loads(config.to_json_string()) | {"do_layer_norm_before": False}
    with pytest.raises(UserError, match="block 1 does not hand on its states as they are"):
        writers(observe(raw), [1, 3])


def test_layers_are_found_whatever_they_are_called() -> None:
    """Also where every matrix of a block is square, so that sizes tell nothing apart."""
    config = tf.LlamaConfig(**COMMON, intermediate_size=32)
    found = writers(observe(json.loads(config.to_json_string())), range(DEPTH))
    names = ["self_attn.o_proj.weight", "mlp.down_proj.weight"]
    assert found == dict.fromkeys(range(DEPTH), names)


# --- what is published ---


@pytest.mark.parametrize("name", SUPPORTED)
def test_up_scaling_is_published_as_the_library_would_build_it(
    name: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Every setting of a block goes with it, or the model is refused before."""
    source = checkpoint(name)
    dense = open_stack(source)
    stack = change(dense, tmp_path, recipe(method="dus", depth="+40%")).stack
    rehearse_deeper(dense, observe(raw_config(source)), stack)
    published(source, tmp_path / "out", stack=stack)
    model, old = load_model(tmp_path / "out"), load_model(source)
    assert stack.kinds == (0, 1, 2, 3, 2, 3, 4)
    blocks, before = (m.get_submodule(MODELS[name].blocks) for m in (model, old))
    for block, kind in zip(blocks, stack.kinds, strict=True):
        own = before[kind].state_dict()
        assert all(torch.equal(value, own[key]) for key, value in block.state_dict().items())
    ours, theirs = (m.config.get_text_config().to_dict() for m in (model, old))
    lists = [
        key for key, value in theirs.items() if isinstance(value, list) and len(value) == DEPTH
    ]
    for key in lists:
        assert ours[key] == [theirs[key][kind] for kind in stack.kinds]


@pytest.mark.parametrize(("name", "kinds"), [("deepseek_v3", 1), ("ernie4_5_moe", 1)])
def test_how_many_blocks_are_dense_goes_along(name: str, kinds: int, tmp_path: Path) -> None:
    """Block 0 has no experts, and so has a copy of it."""
    source = save_split(name, tmp_path / "source")
    dense = open_stack(source)
    stack = change(dense, tmp_path, recipe(method="tli", every=1)).stack
    rehearse_deeper(dense, observe(raw_config(source)), stack)
    published(source, tmp_path / "out", stack=stack)
    config = raw_config(tmp_path / "out")
    key = "first_k_dense_replace" if name == "deepseek_v3" else "moe_layer_start_index"
    assert config[key] == 2 * kinds
    assert same_logits(load(tmp_path / "out"), load(source))


def test_a_depth_that_the_config_cannot_express_is_refused(tmp_path: Path) -> None:
    """Jamba's blocks are of their kinds by their numbers alone."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(EXPERTS["jamba"]())
    randomize(model)
    model.save_pretrained(tmp_path / "source")
    dense = open_stack(tmp_path / "source")
    structure = observe(raw_config(tmp_path / "source"))
    stack = change(dense, tmp_path, recipe(method="dus", depth="+20%")).stack
    assert stack.kinds == (0, 1, 2, 2, 3, 4)
    with pytest.raises(UserError, match=r"block \d would become block \d"):
        rehearse_deeper(dense, structure, stack)
    # By a whole period of two it can be expressed.
    longer = change(dense, tmp_path, recipe(method="dus", depth="+40%")).stack
    rehearse_deeper(dense, structure, longer)
