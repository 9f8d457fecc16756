"""A model of a true shape with random weights, in two small files."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from shapes import Shape

from fusegpt_ray.model.architecture import dense_stack, find_blocks
from fusegpt_ray.model.config import build_skeleton
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.store.writer import Entry, layout, write_safetensors


def shape_config(shape: Shape, length: int) -> dict[str, Any]:
    """The config.json of a LLaMA of this shape."""
    config = transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=length,
        tie_word_embeddings=False,
    )
    return config.to_dict()


def empty_stack(shape: Shape, length: int, dtype: torch.dtype) -> Stack:
    """A LLaMA of which there are no files, only their headers' content."""
    raw = shape_config(shape, length)
    sizes = {name: tuple(p.shape) for name, p in build_skeleton(raw).named_parameters()}
    _, refs = layout("nowhere", ((name, dtype, size) for name, size in sizes.items()))
    return dense_stack(raw, refs)


def random_stack(shape: Shape, length: int, folder: str, dtype: torch.dtype) -> Stack:
    """A LLaMA whose blocks are all the same one, in two small files."""
    raw = shape_config(shape, length)
    model = build_skeleton(raw)
    path = find_blocks(model)

    def value(size: torch.Size) -> torch.Tensor:
        return torch.ones(size) if len(size) == 1 else 0.02 * torch.randn(size)  # norms, products

    sizes = {name: parameter.shape for name, parameter in model.named_parameters()}
    first = f"{path}.0."

    def entries(wanted: Callable[[str], bool]) -> list[Entry]:
        return [
            Entry(name, dtype, size, partial(value, size))
            for name, size in sizes.items()
            if wanted(name)
        ]

    trunk = entries(lambda name: not name.startswith(f"{path}."))
    block = entries(lambda name: name.startswith(first))
    _, refs = write_safetensors(f"{folder}/trunk.safetensors", trunk)
    _, same = write_safetensors(f"{folder}/block.safetensors", block)
    for number in range(shape.blocks):
        refs |= {f"{path}.{number}.{name.removeprefix(first)}": ref for name, ref in same.items()}
    return dense_stack(raw, refs)
