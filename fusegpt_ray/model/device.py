"""The device that a process computes on: which it is, in which dtype it computes, and whether twice
the same work gives the same bits.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any, TypeVar

import torch

from fusegpt_ray.model.stack import Stack

R = TypeVar("R")
_LOG = logging.getLogger(__name__)


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


def set_deterministic(device: torch.device, wanted: bool) -> None:
    """From now on, on a GPU, use only kernels that always give the same bits, or any kernels. A
    CPU's kernels need no such setting. For a while: `deterministic_kernels`.

    Operators that have no such kernel raise; see `deterministic_or_not`.
    """
    if device.type != "cuda":
        return
    if wanted:
        # cuBLAS looks at it when its first handle is made.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # Nothing here reads memory that nobody has written, so filling it would be waste.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = False
    # With warnings only, attention's backward pass would still add in any order.
    torch.use_deterministic_algorithms(wanted, warn_only=False)
    _inductor().deterministic = wanted


@contextmanager
def deterministic_kernels(device: torch.device, wanted: bool) -> Iterator[None]:
    """`set_deterministic` within this block; afterwards everything is as it was."""
    if device.type != "cuda":
        yield
        return
    enabled = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    timed, compiled = torch.backends.cudnn.benchmark, _inductor().deterministic
    set_deterministic(device, wanted)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = timed
        _inductor().deterministic = compiled


def _inductor() -> Any:
    """Its settings, imported only where there is a GPU."""
    from torch._inductor import config

    return config


def deterministic_or_not(call: Callable[[], R]) -> R:
    """`call()`; where an operator of the model has no deterministic kernel, again without asking
    for one, which is said once. `call` must be safe to repeat.
    """
    try:
        return call()
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        reason = str(error).split(".", 1)[0]
    _LOG.warning("the bits may differ from run to run on this GPU: %s", reason)
    torch.use_deterministic_algorithms(True, warn_only=True)
    return call()


@contextmanager
def deterministic_where_possible() -> Iterator[None]:
    """What has no deterministic kernel is run as it is, silently: for results that are kept."""
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(before, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*does not have a deterministic implementation")
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


@contextmanager
def tensor_core_products(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Float32 matrix products with inputs of TensorFloat32, where the arithmetic's dtype rounds
    their results more than that anyway.
    """
    rounds_more = device.type == "cuda" and dtype.itemsize == 2
    with _products("high" if rounds_more else torch.get_float32_matmul_precision()):
        yield


def full_products() -> AbstractContextManager[None]:
    """Float32 matrix products in full, inside of `tensor_core_products` too."""
    return _products("highest")


@contextmanager
def _products(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@cache
def copying_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all copies between host and device beside the computing: memory that was used
    for its copies is used again by its copies only.
    """
    return torch.cuda.Stream(device)
