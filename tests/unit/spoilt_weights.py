"""Ways to spoil the weights of a desk's model."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from desk import Desk
from safetensors.torch import load_file, save_file
from spoilt import SINGLE


class Trap:
    """Pickled, it makes a file where it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("ran", "w")


def only(name: str, data: bytes) -> Callable[[Desk], object]:
    """The model has this file and no other weights."""

    def spoil(desk: Desk) -> None:
        (desk.model / SINGLE).unlink()
        (desk.model / name).write_bytes(data)

    return spoil


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Desk], object]:
    def spoil(desk: Desk) -> None:
        held = load_file(desk.model / SINGLE)
        change(held)
        save_file(held, desk.model / SINGLE, metadata={"format": "pt"})

    return spoil


def sharded(spoil: Callable[[Path], object]) -> Callable[[Desk], object]:
    """Two shards with an index, then spoilt."""

    def make(desk: Desk) -> None:
        tf.AutoModelForCausalLM.from_pretrained(desk.model).save_pretrained(
            desk.folder / "shards", max_shard_size="100KB"
        )
        (desk.model / SINGLE).unlink()
        shutil.copytree(desk.folder / "shards", desk.model, dirs_exist_ok=True)
        spoil(desk.model)

    return make


TRAP = pickle.dumps(Trap())
