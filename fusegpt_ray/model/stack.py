"""A model's depth and width as data: an immutable list of block references over one trunk. No
weights, only where they are.

Every step of a run takes a stack and gives a stack; a stack is small JSON, so that it can be
committed, sent and resumed from. A block is named by its number in the dense model, which it keeps;
its place in the list is its position. One that was inserted has a number beyond those, and says of
which block it is a copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from fusegpt_ray.store.checkpoint import TensorRef

Refs = Mapping[str, TensorRef]


def _refs_to_json(refs: Refs) -> dict[str, Any]:
    return {name: ref.to_json() for name, ref in refs.items()}


def _refs_from_json(data: Mapping[str, Any]) -> dict[str, TensorRef]:
    return {name: TensorRef.from_json(row) for name, row in data.items()}


@dataclass(frozen=True)
class Terms:
    """What a fused block is made of while its terms go on learning: W + B·A + Σ (C_k·D_k) ⊙
    W_donor_k (paper, Eq. 10).
    """

    base: Refs
    """The block's own weights, frozen, as in the dense model."""
    donors: tuple[Block, ...]
    """The blocks fused into it, in order, as plain weights."""
    learned: Refs
    """A, B, C, D, c and norm weights, by parameter name of the student block."""


@dataclass(frozen=True)
class Block:
    """One decoder block: plain weights by the name within the block (`self_attn.q_proj.weight`,
    …; see `empty.py`).
    """

    dense: int
    """Its number in the dense model; of one that was inserted, a number that no other has."""
    weights: Refs
    terms: Terms | None = None
    like: int | None = None
    """Of one that was inserted: the number of the dense block that it is a copy of."""
    shares: int | None = None
    """Of one that shares the matrices of another: that block's number."""

    @property
    def kind(self) -> int:
        """The number of the dense block that it is built as and called as."""
        return self.dense if self.like is None else self.like

    def copied(self, number: int, weights: Refs | None = None) -> Block:
        """A plain copy to insert under this number, with some of its weights replaced."""
        return Block(number, {**self.weights, **(weights or {})}, like=self.kind)

    def of_matrices(self) -> Refs:
        """The weights of layers that have a matrix, with their biases."""
        layers = {
            name.rpartition(".")[0] for name, ref in self.weights.items() if len(ref.shape) > 1
        }
        return {n: ref for n, ref in self.weights.items() if n.rpartition(".")[0] in layers}

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {"dense": self.dense, "weights": _refs_to_json(self.weights)}
        if self.like is not None:
            data["like"] = self.like
        if self.shares is not None:
            data["shares"] = self.shares
        if self.terms is not None:
            data["terms"] = {
                "base": _refs_to_json(self.terms.base),
                "donors": [donor.to_json() for donor in self.terms.donors],
                "learned": _refs_to_json(self.terms.learned),
            }
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        terms = data.get("terms")
        return cls(
            data["dense"],
            _refs_from_json(data["weights"]),
            terms
            and Terms(
                _refs_from_json(terms["base"]),
                tuple(map(cls.from_json, terms["donors"])),
                _refs_from_json(terms["learned"]),
            ),
            data.get("like"),
            data.get("shares"),
        )


@dataclass(frozen=True)
class Stack:
    """A model: configuration of the dense model, trunk (all that is not a block), and the blocks
    left, in order.
    """

    config: Mapping[str, Any]
    """The dense checkpoint's config.json, as it is; once `slice` was called, with its width."""
    prefix: str
    """What stands before a block's number in the checkpoint's tensor names, such as
    `model.layers.`."""
    trunk: Refs
    """Embeddings, final norm, head, vision tower, projector: by name in the checkpoint."""
    blocks: tuple[Block, ...]
    ignored: tuple[str, ...] = ()
    """Tensors of the checkpoint that its class knows of and does not load; only a dense stack
    tells."""

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def kept(self) -> tuple[int, ...]:
        """The numbers of the blocks, by which they are named."""
        return tuple(block.dense for block in self.blocks)

    @property
    def kinds(self) -> tuple[int, ...]:
        """The dense blocks that they are built as: `kept`, but for what was inserted."""
        return tuple(block.kind for block in self.blocks)

    @property
    def refs(self) -> Iterator[TensorRef]:
        """Of all tensors: the trunk's, then the blocks'. The terms of fused blocks are beside."""
        yield from self.trunk.values()
        for block in self.blocks:
            yield from block.weights.values()

    def position(self, dense: int) -> int:
        return self.kept.index(dense)

    def drop(self, *dense: int) -> Stack:
        """Without the blocks that had these numbers in the dense model."""
        assert set(dense) <= set(self.kept), (dense, self.kept)
        left = tuple(block for block in self.blocks if block.dense not in dense)
        return replace(self, blocks=left)

    def replace(self, run: Sequence[int], block: Block) -> Stack:
        """With one block in place of consecutive ones, given by their dense numbers."""
        first = self.position(run[0])
        assert self.kept[first : first + len(run)] == tuple(run), (run, self.kept)
        assert block.dense in run, (block.dense, run)
        blocks = (*self.blocks[:first], block, *self.blocks[first + len(run) :])
        return replace(self, blocks=blocks)

    def insert(self, after: int, *blocks: Block) -> Stack:
        """With these blocks, in order, behind the block of that number."""
        at = self.position(after) + 1
        new = (*self.blocks[:at], *blocks, *self.blocks[at:])
        assert len({block.dense for block in new}) == len(new), [block.dense for block in new]
        return replace(self, blocks=new)

    def swap(self, blocks: Mapping[int, Block]) -> Stack:
        """With the blocks of these dense numbers replaced."""
        assert set(blocks) <= set(self.kept), (set(blocks), self.kept)
        return replace(self, blocks=tuple(blocks.get(block.dense, block) for block in self.blocks))

    def share(self, *group: int) -> Stack:
        """With the layers that have matrices of the first of these blocks, given by their dense
        numbers, in the others too: weights and biases. What else they have, such as norms, stays
        their own.
        """
        assert {*group} <= {*self.kept}, (group, self.kept)
        first = self.blocks[self.position(group[0])]
        taken = first.of_matrices()
        blocks = [self.blocks[self.position(number)] for number in group[1:]]
        assert all(block.of_matrices().keys() == taken.keys() for block in blocks), group
        return self.swap(
            {
                block.dense: replace(
                    block, weights={**block.weights, **taken}, terms=None, shares=first.dense
                )
                for block in blocks
            }
        )

    def slice(self, config: Mapping[str, Any], trunk: Refs, weights: Mapping[int, Refs]) -> Stack:
        """With another width: a config.json of the same depth, the trunk, and by dense number the
        tensors of all blocks, each under the names that it had.
        """
        assert {*weights} == {*self.kept}, (set(weights), self.kept)
        for block in self.blocks:
            assert weights[block.dense].keys() == block.weights.keys(), block.dense
        blocks = tuple(
            replace(block, weights=weights[block.dense], terms=None) for block in self.blocks
        )
        return replace(self, config=config, trunk=trunk, blocks=blocks, ignored=())

    def to_json(self) -> dict[str, Any]:
        return {
            "config": dict(self.config),
            "prefix": self.prefix,
            "trunk": _refs_to_json(self.trunk),
            "blocks": [block.to_json() for block in self.blocks],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        blocks = tuple(Block.from_json(block) for block in data["blocks"])
        return cls(data["config"], data["prefix"], _refs_from_json(data["trunk"]), blocks)
