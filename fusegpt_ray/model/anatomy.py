"""Where the decoder blocks and the trunk of a checkpoint are: its tensors as a stack.

Notable:
- nothing is known by architecture name. Blocks are the one ModuleList as long as the text configuration says the model is deep;
- a block's tensors go by the model's own names, which the checkpoint's need not be.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import transformers
from torch import nn

from fusegpt_ray.errors import UserError
from fusegpt_ray.model.config import KEY, build_skeleton
from fusegpt_ray.model.fit import fitting
from fusegpt_ray.model.names import names_inside
from fusegpt_ray.model.stack import Block, Stack
from fusegpt_ray.store.checkpoint import TensorRef


def find_blocks(model: transformers.PreTrainedModel) -> str:
    """The path of the decoder blocks' ModuleList, such as `model.layers`.

    Raises:
        UserError: there is none, or more than one.
    """
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == depth
        and len({type(block) for block in module}) == 1
        and not re.search(r"vision|visual|image|audio|encoder\b", name)
    ]
    outermost = [name for name in found if not any(name.startswith(other + ".") for other in found)]
    if len(outermost) != 1:
        what = (
            f"{len(outermost)} lists of {depth} decoder blocks found ({', '.join(outermost)})" if found else "no decoder blocks found"
        )
        fix = "use a decoder-only model whose blocks are all of one class (LLaMA, LLaVA, Mistral, Qwen, Gemma, OPT, GPT-2 …)"
        raise UserError(KEY, type(model).__name__, what, fix)
    return outermost[0]


def block_moulds(raw: Mapping[str, Any]) -> list[nn.Module]:
    """The dense model's blocks without weights, by dense number, for whoever needs no trunk (see `load_block`)."""
    model = build_skeleton(raw)
    return list(model.get_submodule(find_blocks(model)))


def dense_stack(raw: Mapping[str, Any], tensors: Mapping[str, TensorRef]) -> Stack:
    """The stack of a whole dense checkpoint: its config.json and the tensors of its files.

    Raises:
        UserError: blocks cannot be found; or the tensors are not the model's (see `fitting`).
    """
    model = build_skeleton(raw)
    path = find_blocks(model)
    depth = len(model.get_submodule(path))
    in_block = re.compile(rf"{re.escape(path)}\.(\d+)\.(.+)")
    inside = names_inside(model, tensors)
    trunk: dict[str, TensorRef] = {}
    blocks: list[dict[str, TensorRef]] = [{} for _ in range(depth)]
    prefixes: set[str] = set()
    for name in fitting(model, in_block, depth, tensors, inside):
        match = in_block.fullmatch(inside[name])
        if match is None:
            trunk[name] = tensors[name]
        else:
            blocks[int(match[1])][match[2]] = tensors[name]
            prefixes.add(_prefix(name, match[1], match[2]))
    if len(prefixes) != 1:
        problem = f"its blocks are called in several ways ({', '.join(sorted(prefixes))})"
        fix = "re-save the checkpoint with save_pretrained"
        raise UserError(KEY, type(model).__name__, problem, fix)
    found = (Block(number, weights) for number, weights in enumerate(blocks))
    return Stack(dict(raw), prefixes.pop(), trunk, tuple(found))


def _prefix(name: str, number: str, inside: str) -> str:
    """What stands before a block's number in a checkpoint's name; what follows it may be renamed."""
    if name.endswith(f"{number}.{inside}"):
        return name.removesuffix(f"{number}.{inside}")
    words = name.split(".")
    assert number in words, (name, number)
    return ".".join([*words[: words.index(number)], ""])
