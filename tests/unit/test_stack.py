"""What a stack, a skeleton and a trunk hold, and how a stack changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from models import DEPTH, MODELS, SUPPORTED, open_stack
from runners import config_of, make_runner

from fusegpt_ray.model.architecture import find_blocks
from fusegpt_ray.model.config import build_skeleton
from fusegpt_ray.model.stack import Block, Stack, Terms
from fusegpt_ray.store.checkpoint import read_index

# --- what a stack is ---


@pytest.mark.parametrize("name", MODELS)
def test_a_stack_holds_every_tensor_of_the_checkpoint_once(
    name: str, checkpoint: Callable[[str], Path]
) -> None:
    folder = checkpoint(name)
    stack = open_stack(folder)
    on_disk = read_index(str(folder), "model.source")
    assert stack.prefix == MODELS[name].prefix
    assert stack.kept == tuple(range(DEPTH))
    rebuilt = dict(stack.trunk)
    for block in stack.blocks:
        rebuilt |= {
            f"{stack.prefix}{block.dense}.{name}": ref for name, ref in block.weights.items()
        }
    assert rebuilt == on_disk
    kinds = {tuple(sorted(block.weights)) for block in stack.blocks}
    assert len(kinds) == (2 if name == "lfm2" else 1)


def test_stacks_are_json_and_back(checkpoint: Callable[[str], Path]) -> None:
    dense = open_stack(checkpoint("llama-sharded"))
    a, b = dense.blocks[0], dense.blocks[1]
    fused = Block(
        0,
        b.weights,
        Terms(a.weights, (b, a), {"x.C0": b.weights["mlp.up_proj.weight"]}),
    )
    stack = dense.drop(1).swap({0: fused})
    assert stack.kept == (0, 2, 3, 4)
    assert stack.position(2) == 1
    assert (len(stack), len(dense)) == (4, 5)
    again = Stack.from_json(json.loads(json.dumps(stack.to_json())))
    assert again == stack
    assert again.blocks[0].terms == fused.terms
    assert again.blocks[1].terms is None


def test_a_sliced_stack_has_other_tensors_everywhere(checkpoint: Callable[[str], Path]) -> None:
    """And can be dropped from, and is JSON and back, as any other."""
    dense, other = open_stack(checkpoint("llama")), open_stack(checkpoint("llama-tied"))
    weights = {block.dense: block.weights for block in other.blocks}
    stack = dense.slice(other.config, other.trunk, weights)
    assert (stack.config, stack.trunk, stack.kept) == (other.config, other.trunk, dense.kept)
    assert stack.blocks == other.blocks and stack.prefix == dense.prefix
    deeper = dense.insert(1, dense.blocks[1].copied(5))
    wider = deeper.slice(other.config, other.trunk, {**weights, 5: other.blocks[1].weights})
    assert wider.blocks[2] == other.blocks[1].copied(5) and wider.kinds == deeper.kinds
    short = stack.drop(1)
    assert Stack.from_json(json.loads(json.dumps(short.to_json()))) == short
    with pytest.raises(AssertionError):
        short.slice(other.config, other.trunk, weights)
    with pytest.raises(AssertionError):
        dense.slice(other.config, other.trunk, {**weights, 0: {}})


@pytest.mark.parametrize(
    "step", [lambda stack: stack.drop(9), lambda stack: stack.swap({9: stack.blocks[0]})]
)
def test_only_blocks_that_are_there_are_dropped_and_swapped(
    step: Callable[[Stack], Stack], checkpoint: Callable[[str], Path]
) -> None:
    with pytest.raises(AssertionError):
        step(open_stack(checkpoint("llama")))


def test_one_block_takes_the_place_of_a_run(checkpoint: Callable[[str], Path]) -> None:
    dense = open_stack(checkpoint("llama"))
    new = Block(1, dense.blocks[4].weights)
    stack = dense.replace((1, 2, 3), new)
    assert stack.blocks == (dense.blocks[0], new, dense.blocks[4])
    assert (stack.trunk, stack.config) == (dense.trunk, dense.config)
    assert dense.drop(2).replace((1, 3), new) == stack
    for run, block in (((1, 3), new), ((2, 1), new), ((2, 3), new), ((4, 5), dense.blocks[4])):
        with pytest.raises(AssertionError):
            dense.replace(run, block)


# --- what a skeleton and a trunk are ---


def test_a_skeleton_holds_no_weights(checkpoint: Callable[[str], Path]) -> None:
    for name in SUPPORTED:
        model = build_skeleton(config_of(checkpoint(name)))
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
        assert {buffer.device.type for buffer in model.buffers()} <= {"cpu"}
        assert find_blocks(model) == MODELS[name].blocks


def test_a_trunk_holds_no_blocks(checkpoint: Callable[[str], Path]) -> None:
    stack = open_stack(checkpoint("llama"))
    trunk = make_runner(stack).trunk
    assert {name for name, _ in trunk.model.named_parameters()} == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    }
    assert {
        parameter.device.type
        for meta_block in trunk.meta_blocks
        for parameter in meta_block.module.parameters()
    } == {"meta"}
