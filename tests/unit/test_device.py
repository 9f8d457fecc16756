"""Where the same work has to give the same bits, and where it cannot."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from fusegpt_ray.model.device import (
    deterministic_or_not,
    hardware,
    set_deterministic,
    tensor_core_products,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def _restore() -> Any:
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


def test_strict_on_a_gpu_and_undone_afterwards() -> None:
    """With warnings only, attention's backward pass would add in any order."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    undo = set_deterministic(GPU, True)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    undo()
    assert torch.is_deterministic_algorithms_warn_only_enabled()


@pytest.mark.parametrize(("device", "wanted"), [(CPU, True), (GPU, False)])
def test_elsewhere_nothing_is_set(device: torch.device, wanted: bool) -> None:
    set_deterministic(device, wanted)()
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_operator_without_such_a_kernel_is_run_all_the_same(
    caplog: pytest.LogCaptureFixture,
) -> None:
    undo, calls = set_deterministic(GPU, True), []

    def call() -> torch.Tensor:
        calls.append(1)
        if not torch.is_deterministic_algorithms_warn_only_enabled():
            # As torch's CUDA kernels do it; those of a CPU are all deterministic but for this one.
            return torch.empty(2).put_(torch.tensor([0, 0]), torch.ones(2), accumulate=False)
        return torch.ones(2)

    with caplog.at_level(logging.WARNING, "fusegpt_ray"):
        found = deterministic_or_not(call)
    undo()
    assert found.shape == (2,)
    assert len(calls) == 2
    assert "put_" in caplog.text and "bits may differ" in caplog.text


def test_other_errors_stay() -> None:
    def call() -> None:
        raise RuntimeError("a mistake")

    with pytest.raises(RuntimeError, match="a mistake"):
        deterministic_or_not(call)


def test_products_are_rounded_on_a_gpu_in_16_bits_only() -> None:
    before = torch.get_float32_matmul_precision()
    for device, dtype, expected in (
        (GPU, torch.bfloat16, "high"),
        (GPU, torch.float32, before),
        (CPU, torch.bfloat16, before),
    ):
        with tensor_core_products(device, dtype):
            assert torch.get_float32_matmul_precision() == expected
        assert torch.get_float32_matmul_precision() == before


def test_a_cpu_is_like_any_other() -> None:
    assert hardware(CPU, compiled=True) == {}
