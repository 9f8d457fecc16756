"""The checkpoint of a model with only some of its blocks, or with copies of some: its config.json
and its tensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from transformers import PretrainedConfig

from fusegpt_ray.model.companions import unmapped
from fusegpt_ray.model.config import model_class, read_config
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.store.checkpoint import TensorRef, read_tensors
from fusegpt_ray.store.writer import Entry

_NOT_BY_BLOCK = re.compile(r"architectures|.*token_ids?")
"""Lists that may be as long as the model is deep by chance."""
_BLOCK_NUMBERS = re.compile(r".*(layer|block|attn|attention).*")
"""What a list or a table of block numbers may be called, such as `full_attn_idxs` and
`mlp_only_layers`."""

_NUMBERS = re.compile(r"\d+(,\d+)+")
"""Such a list, written out (Step 3.7's `moe_layers_enum`)."""
_LETTERS = re.compile(r".*pattern")
"""What a text of one letter a block may be called (Nemotron-H's `hybrid_override_pattern`)."""

_FIRST = re.compile(r"first_k_dense_replace|num_dense_layers|moe_layer_start_index|dense_mlp_idx")
"""What a setting may be called that gives the first block with experts: those before it are
dense."""
_LAST = "moe_layer_end_index"
"""Of the last block with experts."""

_ALSO = "num_blocks"
"""What a class may call the depth beside `num_hidden_layers`, and not say so in its
`attribute_map` (xLSTM); others call something else by this name."""


def shrink_config(stack: Stack) -> dict[str, Any]:
    """The dense model's config.json with the stack's depth, and every setting of a block in step.

    It names the class that it was built with, and no code of its own.

    Raises:
        UserError: transformers does not take the result.
    """
    raw: dict[str, Any] = json.loads(json.dumps(unmapped(dict(stack.config))))
    raw["architectures"] = [model_class(raw).__name__]
    config = read_config(raw)
    text = config.get_text_config()
    section = text_section(raw, config, text)
    depth = text.num_hidden_layers
    # Settings may be absent from the file and still have one value a block, derived by the class.
    for key, value in (text.to_dict() | section).items():
        if not _NOT_BY_BLOCK.fullmatch(key):
            changed = _shrunk(key, value, stack.kinds, depth)
            if changed is not None:
                section[key] = changed
    main, names = _depth_names(text)
    for key in names & section.keys() or {main}:
        section[key] = len(stack)
    if section.get(_ALSO) == depth:
        section[_ALSO] = len(stack)
    for key in names & raw.keys():
        if raw[key] == depth:  # a copy beside the text model's section
            raw[key] = len(stack)
    read_config(raw)
    return raw


def text_section(
    raw: dict[str, Any], config: PretrainedConfig, text: PretrainedConfig
) -> dict[str, Any]:
    """Where a file keeps the settings of the text model; older ones keep them among the others."""
    names = [key for key in config.sub_configs if getattr(config, key, None) is text]
    return raw[names[0]] if names and isinstance(raw.get(names[0]), dict) else raw


def _depth_names(text: PretrainedConfig) -> tuple[str, set[str]]:
    """The name that the class itself uses for the depth, and all of which one file may use
    several.
    """
    main = text.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    aliases = {key for key, target in text.attribute_map.items() if target == main}
    halves = {"decoder_layers"} if main == "encoder_layers" else set()
    return main, {"num_hidden_layers", main} | aliases | halves


def _shrunk(key: str, value: Any, kept: Sequence[int], depth: int) -> Any:
    """The value for these blocks, by what they were in the dense model; None where it is not one of
    a block's.
    """
    if _FIRST.fullmatch(key) or key == _LAST:
        return _moved(value, key == _LAST, kept)
    numbered = bool(_BLOCK_NUMBERS.fullmatch(key)) and bool(value)
    if isinstance(value, dict):
        return _table(value, kept, depth) if numbered else None
    if isinstance(value, str) and numbered and _NUMBERS.fullmatch(value):
        numbers = _shrunk(key, [*map(int, value.split(","))], kept, depth)
        return None if numbers is None else ",".join(map(str, numbers))
    if isinstance(value, str) and _LETTERS.fullmatch(key) and len(value) == depth:
        return "".join(value[number] for number in kept)
    if not isinstance(value, list | tuple):
        return None
    in_range = all(type(item) is int and 0 <= item < depth for item in value)
    if numbered and in_range and len({*value}) == len(value):
        return [new for new, old in enumerate(kept) if old in value]
    if len(value) == depth:
        return [value[number] for number in kept]
    if (runs := list(_run_lengths(value))) and len(runs) == depth:
        return [[[runs[number]], 1] for number in kept]
    return None


def _moved(value: Any, last: bool, kept: Sequence[int]) -> Any:
    """The number of the first or the last block of a kind, or one for each of several kinds."""
    if isinstance(value, list):
        return [_moved(item, last, kept) for item in value]
    if type(value) is not int:
        return None
    return sum(number < value + last for number in kept) - last


def _table(value: dict[Any, Any], kept: Sequence[int], depth: int) -> dict[Any, Any] | None:
    """A table by block number; or one of settings, of which some are lists of that kind, as in
    MiniMax's `sparse_attention_config` and Kimi's `linear_attn_config`, which counts from one.
    """
    if all(_is_number(name, depth) for name in value):
        items = {str(name): item for name, item in value.items()}  # as JSON has them
        return {str(new): items[str(old)] for new, old in enumerate(kept) if str(old) in items}
    lists = {name: item for name, item in value.items() if isinstance(item, list)}
    listed = [number for item in lists.values() for number in item]
    if {*map(type, listed)} == {int} and sorted(listed) == [*range(1, depth + 1)]:
        return value | {
            name: [new for new, old in enumerate(kept, 1) if old + 1 in item]
            for name, item in lists.items()
        }
    found = {name: _shrunk(str(name), item, kept, depth) for name, item in value.items()}
    changed = {name: item for name, item in found.items() if item is not None}
    return value | changed if changed else None


def _is_number(name: object, depth: int) -> bool:
    return str(name).isdecimal() and int(str(name)) < depth


def _run_lengths(value: Sequence[Any]) -> Iterator[Any]:
    """The items of a list such as GPT-Neo's [[["global", "local"], 6]], written out; none if it is
    not one.
    """
    for run in value:
        match run:
            case [list(items), int(times)]:
                yield from items * times
            case _:
                return


def model_entries(stack: Stack, dense: Stack) -> Iterator[Entry]:
    """Every tensor of the model in the checkpoint's own names, blocks renumbered, dtypes as in the
    dense checkpoint.
    """
    for name, ref in stack.trunk.items():
        yield _entry(name, ref, ref.dtype)
    for number, block in enumerate(stack.blocks):
        original = dense.blocks[dense.position(block.kind)].weights
        for name, ref in block.weights.items():
            # As the dense checkpoint calls it, which may be otherwise than the class does.
            tail = original[name].name.removeprefix(f"{stack.prefix}{block.kind}.")
            yield _entry(f"{stack.prefix}{number}.{tail}", ref, original[name].dtype)


def _entry(name: str, ref: TensorRef, dtype: torch.dtype) -> Entry:
    return Entry(name, dtype, ref.shape, partial(_read_one, ref))


def _read_one(ref: TensorRef) -> torch.Tensor:
    return read_tensors({ref.name: ref})[ref.name]
