"""The dtype of the arithmetic that `model.dtype: auto` means."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import DEPTH, open_stack, rewrite
from runners import CPU, Tensors

from fusegpt_ray.model.device import pick_dtype


@pytest.mark.parametrize(
    ("stored", "on_gpu"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.bfloat16),
    ],
)
def test_auto_dtype_is_float32_on_a_cpu_and_bfloat16_for_16_bit_checkpoints_on_a_gpu(
    stored: torch.dtype, on_gpu: torch.dtype, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    def lower(tensors: Tensors) -> Tensors:
        return {name: value.to(stored) for name, value in tensors.items()}

    stack = open_stack(rewrite(checkpoint("llama"), tmp_path, lower))
    assert pick_dtype("auto", stack, CPU) == torch.float32
    assert pick_dtype("auto", stack, torch.device("cuda")) == on_gpu
    for device in ("cpu", "cuda"):
        assert pick_dtype("bfloat16", stack, torch.device(device)) == torch.bfloat16


def test_auto_dtype_is_the_same_in_every_round(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Fused blocks are written in float32; the arithmetic stays that of the dense checkpoint."""
    float32 = open_stack(checkpoint("llama"))
    dense = open_stack(
        rewrite(
            checkpoint("llama"),
            tmp_path,
            lambda t: {name: value.bfloat16() for name, value in t.items()},
        )
    )
    for fused in range(DEPTH):
        stack = dense.swap({fused: float32.blocks[fused]})
        assert pick_dtype("auto", stack, torch.device("cuda")) == torch.bfloat16
