"""The device that a process computes on: which it is, in which dtype it computes, and whether twice
the same work gives the same bits.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from fusegpt_ray.model.stack import Stack


def pick_device() -> torch.device:
    """The accelerator that torch sees, else the CPU.

    Ray's resources decide where a task runs; torch knows which device is there.
    """
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(name: str, stack: Stack, device: torch.device) -> torch.dtype:
    """The dtype to compute in, for the recipe's `model.dtype`.

    `auto` looks at the trunk, because no round changes it (fused blocks are float32).
    """
    if name != "auto":
        return getattr(torch, name)
    sizes = {2: 0, 4: 0}
    for ref in stack.trunk.values():
        sizes[2 if ref.dtype.itemsize <= 2 else 4] += ref.end - ref.begin
    return torch.bfloat16 if device.type != "cpu" and sizes[2] > sizes[4] else torch.float32


def hardware(device: torch.device, compiled: bool) -> dict[str, str]:
    """What a GPU's bits depend on besides the program. Nothing for a CPU: runs go from one to
    another, at the price of roundings.

    `compiled`: whether blocks are.
    """
    if device.type != "cuda":
        return {}
    return {
        "blocks": "compiled" if compiled else "not compiled",
        "gpu": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
    }


def set_deterministic(device: torch.device, wanted: bool) -> bool:
    """Whether a GPU uses kernels only that always give the same bits; returns what was set before.

    Operators that have no such kernel are run as they are, and torch warns of them. A CPU's
    kernels need no such setting.
    """
    before = torch.are_deterministic_algorithms_enabled()
    if device.type == "cuda":
        # cuBLAS looks at it when its first handle is made.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(wanted, warn_only=True)
        # Nothing here reads memory that nobody has written, so filling it would be waste.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = False
        with suppress(ImportError, AttributeError):  # before torch 2.9 there is no such mode
            from torch._inductor import config

            config.deterministic = wanted
    return before


@contextmanager
def tensor_core_products(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Float32 matrix products with inputs of TensorFloat32, where the arithmetic's dtype rounds
    their results more than that anyway.
    """
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda" and dtype.itemsize == 2:
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
