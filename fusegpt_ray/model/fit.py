"""Whether the tensors of a checkpoint are those of the model that its config.json describes; and if not, what they are."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from fusegpt_ray.errors import UserError
from fusegpt_ray.model.config import KEY
from fusegpt_ray.store.checkpoint import TensorRef

_PLAIN = ("F64", "F32", "F16", "BF16")
_OLD_BUFFERS = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")
"""Computed nowadays, and ignored by transformers where an old checkpoint still has them."""
_QUANTIZED = re.compile(
    r".*\.(qweight|qzeros|scales|g_idx|weight_scale|weight_scale_inv|weight_packed|input_scale|SCB"
    r"|weight\.absmax|weight\.quant_map|weight\.quant_state\..*|weight_format)"
)
"""What GPTQ, AWQ, FP8, compressed-tensors, bitsandbytes and MLX store beside or instead of weights."""
_AGAIN = "download it again"
_ITS_CONFIG = "use the config.json that belongs to the weights"


@dataclass(frozen=True)
class _Misfit:
    """A tensor of the model that is stored in another shape or dtype."""

    name: str
    problem: str
    fix: str


def fitting(
    model: PreTrainedModel,
    in_block: re.Pattern[str],
    depth: int,
    tensors: Mapping[str, TensorRef],
    inside: Mapping[str, str],
) -> list[str]:
    """The names of the tensors that the model uses, and of buffers that old checkpoints keep beside.

    `in_block` matches the model's name of a block's tensor, its number first; `inside`: see `names_inside`.

    Raises:
        UserError: tensors are missing, have another shape or dtype, or the model does not use them
            (`from_pretrained` would report them as unexpected: biases that are left out, say). The
            message says what the checkpoint is, where that can be told.
    """
    expected = dict(model.state_dict(keep_vars=True))
    buffers = {name for name, _ in model.named_buffers()}
    unexpected = model._keys_to_ignore_on_load_unexpected or ()
    ignored = re.compile("|".join([*_OLD_BUFFERS, *unexpected]))
    used: list[str] = []
    extra: list[str] = []
    misfits: list[_Misfit] = []
    for name, ref in tensors.items():
        target = expected.get(inside[name])
        if target is not None:
            used.append(name)
            misfits += _misfit(name, ref, target)
        elif inside[name] in buffers or ignored.search(inside[name]):
            match = in_block.fullmatch(inside[name])
            if match is None or int(match[1]) < depth:
                used.append(name)
        else:
            extra.append(name)
    there = {inside[name] for name in used}
    # Either of two tied tensors may be the one that is stored.
    ties = model.all_tied_weights_keys.items()
    there |= {name for tie in ties if not there.isdisjoint(tie) for name in tie}
    parameters = (name for name, value in expected.items() if isinstance(value, nn.Parameter))
    missing = sorted(name for name in parameters if name not in there)
    _say_what_it_is(extra, missing, expected.keys())
    if misfits:
        first = misfits[0]
        raise UserError(KEY, first.name, first.problem, first.fix)
    numbers = {int(match[1]) for name in extra if (match := in_block.fullmatch(inside[name]))}
    if numbers and min(numbers) >= depth:
        problem = f"the checkpoint has {depth + len(numbers)} blocks, config.json says {depth}"
        fix = (
            "set num_hidden_layers right; or, if these are layers for multi-token prediction, leave "
            "them out: save_pretrained of the model that from_pretrained loads has none"
        )
        raise UserError(KEY, min(extra), problem, fix)
    if missing:
        problem = f"the checkpoint lacks {len(missing)} tensors of the model"
        raise UserError(KEY, missing[0], problem, _AGAIN)
    if extra:
        what = f"{len(extra)} tensors that the model of its config.json does not use"
        raise UserError(KEY, min(extra), f"the checkpoint has {what}", _ITS_CONFIG)
    return used


def _misfit(name: str, ref: TensorRef, target: torch.Tensor) -> Iterator[_Misfit]:
    shape = tuple(target.shape)
    if shape != ref.shape and 0 in ref.shape:
        problem = f"it was saved empty (shape {list(ref.shape)}), as by DeepSpeed ZeRO-3 if weights are not gathered"
        fix = "make the checkpoint whole with zero_to_fp32.py, or save it again with stage3_gather_16bit_weights_on_model_save"
        yield _Misfit(name, problem, fix)
    elif shape != ref.shape:
        problem = f"shape {list(ref.shape)} in the checkpoint, {list(shape)} by config.json"
        yield _Misfit(name, problem, _ITS_CONFIG)
    elif target.is_floating_point() and ref.code not in _PLAIN:
        problem = f"stored as {ref.code}, which says nothing without scales"
        fix = f"use the checkpoint in its original dtype, one of {', '.join(_PLAIN)}"
        yield _Misfit(name, problem, fix)


def _say_what_it_is(extra: list[str], missing: list[str], expected: Collection[str]) -> None:
    """
    Raises:
        UserError: the names tell what this checkpoint is instead of a plain one.
    """
    if quantized := sorted(filter(_QUANTIZED.fullmatch, extra)):
        problem = "a quantized checkpoint, whose weights cannot be fused"
        fix = "use the checkpoint in its original dtype; quantise what this tool publishes"
        raise UserError(KEY, quantized[0], problem, fix)
    if adapters := sorted(name for name in extra if re.search(r"\blora_(A|B|embedding)", name)):
        problem = "an adapter's tensor: its base model's weights are not changed yet"
        fix = "merge the adapter first (peft: merge_and_unload, then save_pretrained)"
        raise UserError(KEY, adapters[0], problem, fix)
    wrapper, count = _wrapper(extra, expected) if missing else ("", 0)
    if wrapper and count >= len(missing):
        problem = f"{count} names of tensors hold {wrapper!r}, as a wrapper around the model saves them"
        fix = f"save the model inside of the wrapper, or rename the tensors without {wrapper!r}"
        raise UserError(KEY, extra[0], problem, fix)


def _wrapper(extra: list[str], expected: Collection[str]) -> tuple[str, int]:
    """What to leave out of names to get the model's, and of how many names.

    Such as `module.` (DistributedDataParallel), `_orig_mod.` (torch.compile), `pretrained_model.`
    (value heads), `base_model.model.` (adapters).
    """
    found: Counter[str] = Counter()
    for name in extra:
        words = name.split(".")
        for begin in range(len(words)):
            for end in range(begin + 1, min(begin + 4, len(words))):
                if ".".join(words[:begin] + words[end:]) in expected:
                    found[".".join(words[begin:end]) + "."] += 1
    return found.most_common(1)[0] if found else ("", 0)
