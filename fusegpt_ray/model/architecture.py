"""Where the decoder blocks and the trunk of a checkpoint are: its tensors as a stack.

Notable:
- nothing is known by architecture name. Blocks are the one ModuleList as long as the text
  configuration says the model is deep;
- a block's tensors go by the model's own names, which the checkpoint's need not be (`names.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import nn

from fusegpt_ray.errors import UserError
from fusegpt_ray.model import mismatch
from fusegpt_ray.model.config import KEY, build_skeleton
from fusegpt_ray.model.names import Names
from fusegpt_ray.model.stack import Block, Stack
from fusegpt_ray.store.checkpoint import TensorRef

_PLAIN = ("F64", "F32", "F16", "BF16")
_OLD_BUFFERS = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")
"""Computed nowadays, and ignored by transformers where an old checkpoint still has them."""


def find_blocks(model: transformers.PreTrainedModel) -> str:
    """The path of the decoder blocks' ModuleList, such as `model.layers`.

    Raises:
        UserError: there is none, or more than one.
    """
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == depth
        and not re.search(r"vision|visual|image|audio|encoder\b", name)
    ]
    # Blocks of one class, if there are any; a few models have a class for each kind of block.
    found = [name for name, blocks in lists if len({type(block) for block in blocks}) == 1]
    found = found or [name for name, blocks in lists if len(blocks)]
    outermost = [name for name in found if not any(name.startswith(other + ".") for other in found)]
    if len(outermost) != 1:
        what = (
            f"{len(outermost)} lists of {depth} decoder blocks found ({', '.join(outermost)})"
            if found
            else "no decoder blocks found"
        )
        fix = (
            "use a decoder-only model whose blocks lie in one list (LLaMA, LLaVA, Mistral, Qwen,"
            " Gemma, OPT, GPT-2 …)"
        )
        raise UserError(KEY, type(model).__name__, what, fix)
    return outermost[0]


def build_meta_blocks(raw: Mapping[str, Any]) -> list[nn.Module]:
    """The dense model's blocks without weights, by dense number, for whoever needs no trunk (see
    `load_block`).
    """
    model = build_skeleton(raw)
    return list(model.get_submodule(find_blocks(model)))


def dense_stack(raw: Mapping[str, Any], tensors: Mapping[str, TensorRef]) -> Stack:
    """The stack of a whole dense checkpoint: its config.json and the tensors of its files.

    Raises:
        UserError: blocks cannot be found; or the checkpoint lacks tensors of the model, has them in
        another shape or quantized, or
            has others that `from_pretrained` would report as unexpected (biases that are left out,
            say).
    """
    model = build_skeleton(raw)
    path = find_blocks(model)
    depth = len(model.get_submodule(path))
    names = Names.of(model)
    in_block = re.compile(rf"{re.escape(path)}\.(\d+)\.(.+)")
    trunk: dict[str, TensorRef] = {}
    blocks: dict[int, dict[str, TensorRef]] = {}
    prefixes: set[str] = set()
    seen: set[str] = set()
    buffers = {name for name, _ in model.named_buffers()}
    ignored = re.compile(
        "|".join([*_OLD_BUFFERS, *(model._keys_to_ignore_on_load_unexpected or ())])
    )
    extra: list[str] = []
    left: list[str] = []
    for name, ref in tensors.items():
        inside = names.inside(name)
        target = names.expected.get(inside)
        _check(name, ref, target)
        match = in_block.fullmatch(inside)
        if target is None and inside not in buffers and not ignored.search(inside):
            extra.append(name)
        elif target is None and match and int(match[1]) >= depth:
            left.append(name)  # a layer beyond the last that the class knows of and does not run
            continue
        seen.add(inside)
        if match is None:
            trunk[name] = ref
            continue
        prefixes.add(names.prefix(name, path, int(match[1]), match[2]))
        blocks.setdefault(int(match[1]), {})[match[2]] = ref
    if beyond := sorted(
        ref.name for number in blocks if number >= depth for ref in blocks[number].values()
    ):
        mismatch.refuse_beyond(beyond[0], len(blocks), depth)
    # Either of two tied tensors may be the one that is stored.
    ties = model.all_tied_weights_keys.items()
    there = seen | {name for tie in ties if not seen.isdisjoint(tie) for name in tie}
    parameters = (name for name, value in names.expected.items() if isinstance(value, nn.Parameter))
    missing = [name for name in parameters if name not in there]
    if missing or extra:
        mismatch.refuse(tensors, names.expected, names.inside, missing, extra)
    if sorted(blocks) != list(range(depth)) or len(prefixes) != 1:
        raise UserError(
            KEY,
            f"{len(blocks)} blocks",
            f"config.json says {depth}",
            "use the config.json of these weights",
        )
    stack_blocks = tuple(Block(number, blocks[number]) for number in range(depth))
    return Stack(dict(raw), prefixes.pop(), trunk, stack_blocks, tuple(left))


def _check(name: str, ref: TensorRef, target: torch.Tensor | None) -> None:
    """
    Raises:
        UserError: a tensor does not hold what the model has there.
    """
    if target is None:
        return
    if target.is_floating_point() and ref.code not in _PLAIN:
        problem = f"stored as {ref.code}, which says nothing without scales"
        raise UserError(
            KEY,
            name,
            problem,
            f"use the checkpoint in its original dtype, one of {', '.join(_PLAIN)}",
        )
    if tuple(target.shape) != ref.shape:
        if ref.begin == ref.end and target.numel():
            mismatch.refuse_empty(name, ref.shape, target.shape)
        problem = f"shape {list(ref.shape)} in the checkpoint, {list(target.shape)} by config.json"
        raise UserError(KEY, name, problem, "use the config.json that belongs to the weights")
