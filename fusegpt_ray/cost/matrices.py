"""The matrices of a model's blocks, known from its files' headers and its config.json alone.

A mixture's experts are all in memory, and all learn; a token passes only some of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import transformers

from fusegpt_ray.fusion.student import expert_layers
from fusegpt_ray.model.architecture import build_meta_blocks
from fusegpt_ray.model.config import read_config
from fusegpt_ray.model.stack import Block, Stack

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_ACTIVE = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")
"""What configurations call the number of experts, and of those that a token passes."""


@dataclass(frozen=True)
class Matrices:
    """Of one block, or the sums of several."""

    elements: int
    """Of all of them."""
    sides: int
    """Rows and columns, of all of them."""
    expert_elements: int
    """Of all experts' alone."""
    active_elements: float
    """Of those that a token passes."""
    active_sides: float
    longest: int
    """The longest side of one."""


Shapes = list[tuple[int, ...]]


def matrices(dense: Stack, blocks: Sequence[Block]) -> Matrices:
    """Of some of a dense model's blocks together."""
    config = read_config(dense.config).get_text_config()
    number, active = _number(config, _EXPERTS), _number(config, _ACTIVE)
    if number:
        kinds = _with_experts(json.dumps(dense.config))
        always = [shape for block in blocks for shape in kinds[block.kind][0]]
        experts = [shape for block in blocks for shape in kinds[block.kind][1]]
    else:
        shapes = (ref.shape for block in blocks for ref in block.weights.values())
        always, experts = [shape for shape in shapes if len(shape) == 2], []
    share = min(1.0, active / number) if active and number else 1.0
    elements, sides = sum(map(prod, always)), sum(map(sum, always))
    of_experts, their_sides = sum(map(prod, experts)), sum(e * (o + i) for e, o, i in experts)
    return Matrices(
        elements + of_experts,
        sides + their_sides,
        of_experts,
        elements + share * of_experts,
        sides + share * their_sides,
        max(side for shape in (*always, *experts) for side in shape[-2:]),
    )


def largest_block(dense: Stack) -> Block:
    """The one with the most values, the first of several."""

    def elements(block: Block) -> int:
        return sum(prod(ref.shape) for ref in block.weights.values())

    return max(dense.blocks, key=elements)


@lru_cache(2)
def _with_experts(config: str) -> list[tuple[Shapes, Shapes]]:
    """By dense number, the shapes of matrices that every token passes, and those of experts, [E, O,
    I]: as the class has them, for files have them in several ways.
    """
    found = []
    for empty in build_meta_blocks(json.loads(config)):
        experts = expert_layers(empty.module)
        always = [
            tuple(value.shape)
            for name, value in empty.module.named_parameters()
            if value.dim() == 2 and name.rpartition(".")[0] not in experts
        ]
        stacks = [tuple(layer.weight.shape) for one in experts.values() for layer in one.values()]
        found.append((always, stacks))
    return found


def _number(config: transformers.PretrainedConfig, names: Sequence[str]) -> int:
    """The first of these settings that is there; the most of a list with one for each block."""
    for name in names:
        value = getattr(config, name, None)
        value = max(value) if isinstance(value, list) and value else value
        if isinstance(value, int) and value > 0:
            return value
    return 0


def attention_heads(dense: Stack) -> tuple[int, int]:
    """How many, and the width of one, as most blocks have them; (0, 0) where none attends, as in
    state space models.
    """
    config = read_config(dense.config).get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        return 0, 0
    # The usual one, where blocks have others.
    head_dim = config.to_dict().get("head_dim")
    return heads, head_dim or config.hidden_size // heads


def slicing_flops(dense: Stack, tokens: int, kept: int) -> int:
    """In float64, of a stack that is made as narrow as that: the covariance of what enters two
    norms a block and the last one, its axes (some 9 D³), and the rotation of all tensors.
    """
    hidden = int(read_config(dense.config).get_text_config().hidden_size)
    refs = [*dense.trunk.values(), *dense.refs]  # the embedding is the head, too
    rotated = sum(prod(ref.shape) for ref in refs)
    norms = 2 * len(dense) + 1
    return 2 * norms * tokens * hidden**2 + 9 * hidden**3 + 2 * rotated * kept


def narrowed_bytes(dense: Stack, share: float) -> int:
    """Of all tensors if the hidden size becomes that share of what it is; a head that was the
    embedding is stored then. What is no wider for it, such as a norm within heads, is counted as if
    it were.
    """
    trunk = sorted(ref.end - ref.begin for ref in dense.trunk.values())
    head = trunk[-1] if len(trunk) == 2 else 0  # of an embedding and a norm
    blocks = sum(ref.end - ref.begin for block in dense.blocks for ref in block.weights.values())
    return round((sum(trunk) + head + blocks) * share)
