"""Whether a model can be made narrower as an ordinary checkpoint, and the config.json of that."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import lcm
from typing import Any

from torch import nn

from fusegpt_ray.errors import UserError
from fusegpt_ray.fusion.rotation import APART, EMBEDDING, HEAD, NORM, READS, WRITES, known
from fusegpt_ray.model.architecture import find_blocks
from fusegpt_ray.model.config import KEY, build_skeleton, read_config

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "granite", "smollm3", "seed_oss")
"""Architectures of which a test rotates a model and finds the same logits. The names of tensors do
not tell all: Gemma's embedding is multiplied by the root of the hidden size."""
MULTIPLE = 8
"""Of the hidden size, for the sake of matrix products; see `sliced_width`."""
_FIX = "use method: mi, which removes blocks of any architecture"


@dataclass(frozen=True)
class Width:
    """A hidden size before and after."""

    dense: int
    kept: int

    @property
    def share(self) -> float:
        """Of the hidden size, and so of every matrix of a block, that is kept."""
        return self.kept / self.dense

    def in_words(self) -> str:
        return f"hidden size {self.dense} → {self.kept}"


def sliced_width(raw: Mapping[str, Any], sparsity: float) -> Width:
    """The hidden size of which `sparsity` is removed, as in the paper. Every matrix has the hidden
    size on one of its sides, so this is also the share of the blocks' parameters.

    It is the nearest multiple of 8 and of the number of attention heads: configurations of most
    classes are refused otherwise, though their `head_dim` is given.

    Raises:
        UserError: no such multiple is left below the dense hidden size.
    """
    text = read_config(raw).get_text_config()
    step = lcm(MULTIPLE, int(text.num_attention_heads))
    dense = int(text.hidden_size)
    kept = round(dense * (1 - sparsity) / step) * step
    if not 0 < kept < dense:
        problem = f"the hidden size {dense} would become {kept}, the nearest multiple of {step}"
        most = (dense - 1) // step * step
        fix = f"use {1 - most / dense:.4g} or more" if most and kept else "use a lower one"
        raise UserError("sparsity", sparsity, problem, fix if most else _FIX)
    return Width(dense, kept)


def sliced_config(raw: Mapping[str, Any], width: Width) -> dict[str, Any]:
    """The config.json of the narrower model: heads stay as wide as they are, the head is no longer
    the embedding, and ε is that of the shorter norm (see `rotation.py`).
    """
    text = read_config(raw).get_text_config()
    made: dict[str, Any] = json.loads(json.dumps(dict(raw)))
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return made | {
        "hidden_size": width.kept,
        "head_dim": int(head),
        "rms_norm_eps": float(text.rms_norm_eps) / width.share,
        "tie_word_embeddings": False,
    }


def check_width(raw: Mapping[str, Any], sparsity: float) -> Width:
    """The width of a model of which so much can be sliced off.

    Raises:
        UserError: it cannot; the message says why.
    """
    model = build_skeleton(raw)
    name = type(model).__name__
    if problem := _unsuited(model, str(raw.get("model_type"))):
        raise UserError(KEY, name, problem, _FIX)
    width = sliced_width(raw, sparsity)
    found, wanted = _shapes(build_skeleton(sliced_config(raw, width))), _expected(model, width)
    if differing := sorted(key for key in wanted if found.get(key) != wanted[key]):
        key = differing[0]
        shape = list(found[key]) if key in found else "missing"
        problem = f"with {width.in_words()} its class makes {key} {shape}, not {list(wanted[key])}"
        raise UserError(KEY, name, problem, _FIX)
    return width


def _unsuited(model: nn.Module, kind: str) -> str:
    """Why the model cannot be rotated, or nothing."""
    blocks = model.get_submodule(find_blocks(model))
    assert isinstance(blocks, nn.ModuleList)
    modules = [type(module).__name__ for module in blocks.modules()]
    if not any("RMSNorm" in module for module in modules):
        return "slicing needs RMSNorm, which a rotation of its states does not change"
    names = {name for block in blocks for name, _ in block.named_parameters()}
    if unknown := sorted(name for name in names if not known(name)):
        return (
            f"slicing does not know what {unknown[0]} does; a norm between a block's output and the"
            " stream, for one, cannot be rotated"
        )
    if kind not in MODEL_TYPES:
        return f"slicing is known to be exact for {', '.join(MODEL_TYPES)} only"
    trunk = {*_shapes(model)} - {f"{find_blocks(model)}.{n}.{k}" for n, k in _of_blocks(blocks)}
    if trunk - {EMBEDDING, NORM, HEAD}:
        return f"slicing does not know what {min(trunk - {EMBEDDING, NORM, HEAD})} does"
    return ""


def _of_blocks(blocks: nn.ModuleList) -> list[tuple[int, str]]:
    return [(number, key) for number, block in enumerate(blocks) for key in block.state_dict()]


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def _expected(model: nn.Module, width: Width) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors after slicing: what reads or writes the stream is narrower."""
    readers = {layer for layers in READS.values() for layer in layers}

    def shape(name: str, value: tuple[int, ...]) -> tuple[int, ...]:
        if name in (EMBEDDING, HEAD):
            return (value[0], width.kept)
        if name == NORM:
            return (width.kept,)
        tail = name.split(".", 3)[-1]  # model.layers.3.TAIL
        layer, _, kind = tail.rpartition(".")
        if tail in APART or (layer in readers and kind == "bias"):
            return value
        if layer in READS or (layer in WRITES and kind == "bias"):
            return (width.kept,)
        return (width.kept, value[1]) if layer in WRITES else (value[0], width.kept)

    return {name: shape(name, value) for name, value in _shapes(model).items()}
