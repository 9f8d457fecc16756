"""A published, shorter model as the proof of it sees it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import open_stack
from safetensors.torch import load_file, save_file

from fusegpt_ray.model.source import Source
from fusegpt_ray.model.stack import Block, Stack
from fusegpt_ray.publishing.proof import open_published
from fusegpt_ray.publishing.publish import publish
from fusegpt_ray.publishing.shrink import model_entries
from fusegpt_ray.store.checkpoint import read_header

Tensors = dict[str, torch.Tensor]
KEPT = [0, 2, 4]
Q = "model.layers.1.self_attn.q_proj.weight"
FACTS: dict[str, Any] = {
    "method": "mi",
    "sparsity": 0.4,
    "recipe": {"importance": {"metric": "mi"}},
    "removed": [1, 3],
    "rounds": [],
    "perplexity": {},
}


def shortened(dense: Stack) -> Stack:
    return dense.drop(*set(dense.kept) - set(KEPT))


@pytest.fixture(name="folder")
def _folder(checkpoint: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """Name of a tiny model → the folder of its published, shorter form."""

    def get(name: str) -> Path:
        dense = open_stack(checkpoint(name))
        out = tmp_path / name
        publish(
            str(out),
            shortened(dense),
            dense,
            Source.find(str(checkpoint(name)), None),
            10**9,
            FACTS,
        )
        return out

    return get


def opened(folder: Path, dense: Stack) -> Stack:
    entries = {entry.name: entry for entry in model_entries(shortened(dense), dense)}
    return open_published(str(folder), entries, dense)


def without(tensors: Tensors, *names: str) -> Tensors:
    return {name: value for name, value in tensors.items() if name not in names}


def with_block(
    dense: Stack, folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor]
) -> Stack:
    """The shorter stack with a block as fine-tuning writes it, changed."""
    stack = shortened(dense)
    tensors = load_file(Path(dense.blocks[2].weights["self_attn.q_proj.weight"].file))
    work = {
        name: change(name, tensors[f"model.layers.2.{name}"].float())
        for name in dense.blocks[2].weights
    }
    save_file(work, folder / "work.safetensors")
    return stack.swap({2: Block(2, read_header(str(folder / "work.safetensors"), "work"))})
