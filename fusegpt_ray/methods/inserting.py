"""Copies of blocks are put into the stack, all at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from fusegpt_ray.fusion.writers import writers, zeros
from fusegpt_ray.methods.base import Change, CopiesOf, Copy, Round
from fusegpt_ray.model.architecture import build_meta_blocks
from fusegpt_ray.model.stack import Refs, Stack
from fusegpt_ray.model.structure import observe
from fusegpt_ray.store import storage
from fusegpt_ray.store.checkpoint import TensorRef
from fusegpt_ray.store.records import FileRecord
from fusegpt_ray.store.writer import entries_of, write_safetensors


def deeper(dense: Stack, copies: Sequence[Copy], changed: Sequence[Refs] = ()) -> Stack:
    """The stack with these copies, which are numbered on from the dense model's last block.

    Args:
        changed: of each copy, the weights that are not those of its original.
    """
    stack, after = dense, dict[int, int]()
    for index, copy in enumerate(copies):
        number = len(dense) + index
        block = dense.blocks[copy.like].copied(number, changed[index] if changed else None)
        stack = stack.insert(after.get(copy.after, copy.after), block)
        after[copy.after] = number  # several behind one block stay in order
    return stack


def insert(round: Round, place: CopiesOf, zero: bool) -> Change:
    """Insert copies of blocks.

    Args:
        place: says which, and where.
        zero: whether their output layers are zero, so that the model stays what it is.
    """
    copies = place(round.recipe, len(round.stack))
    files: dict[str, FileRecord] = {}
    changed = _zeroed(round, copies, files) if zero else []
    behind = ", ".join(map(str, dict.fromkeys(copy.after for copy in copies)))
    round.show.say(f"  {len(copies)} blocks inserted, behind {behind}")
    return Change(deeper(round.stack, copies, changed), files, inserted=tuple(copies))


def _zeroed(round: Round, copies: Sequence[Copy], files: dict[str, FileRecord]) -> list[Refs]:
    """Of each copy, its weights that are zero. Those of the same shapes share a file."""
    config = round.dense.config
    names = writers(observe(config), [copy.like for copy in copies])
    empty = build_meta_blocks(config)
    written: dict[object, dict[str, TensorRef]] = {}
    found: list[Refs] = []
    for copy in copies:
        refs = round.stack.blocks[copy.like].weights
        tensors = zeros(empty[copy.like], names[copy.like], refs)
        key = _shapes(tensors)
        if key not in written:
            uri = storage.join(round.folder, f"zeros-{len(written):03d}.safetensors")
            round.fence()
            files[uri], written[key] = write_safetensors(uri, entries_of(tensors))
        found.append(written[key])
    return found


def _shapes(tensors: Mapping[str, torch.Tensor]) -> object:
    return tuple((name, value.dtype, tuple(value.shape)) for name, value in tensors.items())
