"""Where the decoder blocks and the trunk of a checkpoint are: its tensors as a stack.

Notable:
- nothing is known by architecture name. Blocks are the one ModuleList as long as the text
  configuration says the model is deep;
- a block's tensors go by the model's own names, which the checkpoint's need not be (`names.py`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
import transformers
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from fusegpt_ray.errors import UserError, reading_users_file
from fusegpt_ray.model import mismatch
from fusegpt_ray.model.config import KEY, build_skeleton
from fusegpt_ray.model.empty import EmptyBlock, empty_blocks
from fusegpt_ray.model.names import Destination, Names
from fusegpt_ray.model.stack import Block, Stack
from fusegpt_ray.store.checkpoint import TensorRef

_PLAIN = ("F64", "F32", "F16", "BF16")
_OLD_BUFFERS = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")
"""Computed nowadays, and ignored by transformers where an old checkpoint still has them."""
_ENCODER = re.compile(r"(^|\.)encoder\.layers?$")
_LAYER = GradientCheckpointingLayer
"""What transformers makes all decoder blocks of; those of a hybrid may be of several classes."""
_RESAVE = "re-save the checkpoint with save_pretrained"


def find_blocks(model: transformers.PreTrainedModel) -> str:
    """The path of the decoder blocks' ModuleList, such as `model.layers`.

    Raises:
        UserError: there is none, or more than one; or it is an encoder's.
    """
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and 0 < len(module) == depth
        and (len({*map(type, module)}) == 1 or _are_layers(module))
        and not re.search(r"vision|visual|image|audio", name)
    ]
    found = [name for name in lists if not re.search(r"encoder\b", name)]
    if not found:  # BERT's decoders call theirs so
        found = [name for name in lists if _ENCODER.search(name)]
        _check_decoder(model, found)
    outermost = [name for name in found if not any(name.startswith(other + ".") for other in found)]
    if len(outermost) > 1:  # as many projectors as blocks, say
        outermost = [name for name in outermost if _are_layers(model.get_submodule(name))]
    if len(outermost) != 1:
        what = f"no decoder blocks found: its configuration says {depth}, and no list has so many"
        if found:
            what = f"{len(found)} lists have {depth} modules ({', '.join(found)}), as many as there"
            what += " are blocks, and it is not clear which are these"
        elif depth is None:
            what = "no decoder blocks found: its configuration does not say how many there are"
        fix = (
            "use a decoder-only model whose blocks lie in one list (LLaMA, LLaVA, Mistral, Qwen,"
            " Gemma, OPT, GPT-2 …)"
        )
        raise UserError(KEY, type(model).__name__, what, fix)
    return outermost[0]


def _check_decoder(model: transformers.PreTrainedModel, found: Collection[str]) -> None:
    """
    Raises:
        UserError: the blocks that were found see all of a text.
    """
    if found and not getattr(model.config.get_text_config(), "is_decoder", True):
        problem = "config.json says is_decoder: false: an encoder, which sees all of a text"
        fix = "use a decoder, such as LLaMA, Mistral, Qwen or Gemma"
        raise UserError(KEY, type(model).__name__, problem, fix)


def _are_layers(modules: nn.Module) -> bool:
    return all(isinstance(block, _LAYER) for block in modules.children())


def build_meta_blocks(raw: Mapping[str, Any]) -> list[EmptyBlock]:
    """The dense model's blocks without weights, by dense number, for whoever needs no trunk (see
    `load_block`).
    """
    model = build_skeleton(raw)
    path = find_blocks(model)
    return empty_blocks(Names.of(model), path, [*model.get_submodule(path).children()])


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
    ignored = _ignored(model)
    trunk: dict[str, TensorRef] = {}
    blocks: dict[int, dict[str, TensorRef]] = {}
    prefixes: set[str] = set()
    converted: dict[str, TensorRef] = {}
    seen: set[str] = set()
    extra: list[str] = []
    left: list[str] = []
    for name, ref in tensors.items():
        where = names.destination(name)
        inside, target = where.inside, names.expected.get(where.inside)
        _check(name, ref, target, where)
        match = in_block.fullmatch(inside)
        if target is None and not ignored.search(inside):
            extra.append(name)
        elif target is None and match and int(match[1]) >= depth:
            left.append(name)  # a layer beyond the last that the class knows of and does not run
            continue
        seen.add(inside)
        if target is not None and where.pattern is not None:
            converted[name] = ref
        if match is None:
            trunk[name] = ref
            continue
        number, tail = int(match[1]), match[2]
        prefixes.add(names.prefix(name, path, number, tail))
        key = tail if where.pattern is None else _key(names, name, where, path, number)
        blocks.setdefault(number, {})[key] = ref
    if beyond := sorted(
        ref.name for number in blocks if number >= depth for ref in blocks[number].values()
    ):
        mismatch.refuse_beyond(beyond[0], len(blocks), depth)
    missing = _missing(model, names, seen | _made(names, converted))
    if missing or extra:
        mismatch.refuse(tensors, names.expected, names.inside, missing, extra)
    if sorted(blocks) != list(range(depth)) or len(prefixes) != 1:
        found, problem = f"{len(blocks)} blocks", f"config.json says {depth}"
        raise UserError(KEY, found, problem, "use the config.json of these weights")
    stack_blocks = tuple(Block(number, blocks[number]) for number in range(depth))
    return Stack(dict(raw), prefixes.pop(), trunk, stack_blocks, tuple(left))


def _ignored(model: transformers.PreTrainedModel) -> re.Pattern[str]:
    """Names of tensors that may be in a checkpoint and are no parameters of the model's."""
    buffers = (f"^{re.escape(name)}$" for name, _ in model.named_buffers())
    known = model._keys_to_ignore_on_load_unexpected or ()
    return re.compile("|".join([*_OLD_BUFFERS, *known, *buffers]))


def _missing(model: transformers.PreTrainedModel, names: Names, seen: set[str]) -> list[str]:
    """The parameters that are not there. Either of two tied ones may be the one that is stored."""
    ties = model.all_tied_weights_keys.items()
    there = seen | {name for tie in ties if not seen.isdisjoint(tie) for name in tie}
    parameters = (name for name, value in names.expected.items() if isinstance(value, nn.Parameter))
    return [name for name in parameters if name not in there]


def _key(names: Names, name: str, where: Destination, path: str, number: int) -> str:
    """What a block calls a tensor that is converted (see `empty.py`).

    Raises:
        UserError: its name does not tell.
    """
    within = rf"(?:^|\.){re.escape(path.rpartition('.')[2])}\.{number}\.(.+)"
    found = re.search(within, names.renamed(name))
    if found is None or names.renamed_destination(f"{path}.{number}.{found[1]}") != where:
        problem = f"transformers makes {where.inside} of it, by rules that cannot be followed"
        raise UserError(KEY, name, problem, _RESAVE)
    return found[1]


def _made(names: Names, refs: Mapping[str, TensorRef]) -> set[str]:
    """The model's tensors that are made of these.

    Raises:
        UserError: they are not what the class expects.
    """
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for name, ref in refs.items():
        empty = torch.empty(ref.shape, device="meta")
        groups.setdefault(names.inside(name), {})[name] = empty
    made: dict[str, torch.Tensor] = {}
    for inside, empties in groups.items():
        problem = f"cannot be made of the {len(empties)} tensors that the checkpoint has for it"
        with reading_users_file(KEY, inside, problem, "download the checkpoint again"):
            made |= names.convert(empties)
    for name, value in made.items():
        target = names.expected.get(name)
        if target is None or target.shape != value.shape:
            shape = "missing" if target is None else list(target.shape)
            problem = f"shape {list(value.shape)} in the checkpoint, {shape} by config.json"
            raise UserError(KEY, name, problem, "use the config.json that belongs to the weights")
    return {*made}


def _check(name: str, ref: TensorRef, target: torch.Tensor | None, where: Destination) -> None:
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
    if where.pattern is None and tuple(target.shape) != ref.shape:
        if ref.begin == ref.end and target.numel():
            mismatch.refuse_empty(name, ref.shape, target.shape)
        problem = f"shape {list(ref.shape)} in the checkpoint, {list(target.shape)} by config.json"
        raise UserError(KEY, name, problem, "use the config.json that belongs to the weights")
