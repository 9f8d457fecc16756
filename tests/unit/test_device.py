"""Where the same work has to give the same bits, and where it cannot."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch._inductor import config as inductor

from fusegpt_ray.model.device import (
    deterministic_kernels,
    deterministic_or_not,
    hardware,
    set_deterministic,
    tensor_core_products,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def settings() -> tuple[bool, ...]:
    """All that decides which kernels a GPU uses."""
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark,
        inductor.deterministic,
    )


@pytest.fixture(autouse=True)
def _restore() -> Any:
    """What a test sets for good is undone."""
    before = settings()
    with deterministic_kernels(GPU, False):
        yield
    assert settings() == before


def test_strict_on_a_gpu_and_undone_afterwards() -> None:
    """With warnings only, attention's backward pass would add in any order."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = True
    before = settings()
    with deterministic_kernels(GPU, True):
        assert settings() == (True, False, False, False, True)
        with deterministic_kernels(GPU, False):
            assert not settings()[0] and not inductor.deterministic
        assert settings() == (True, False, False, False, True)
    assert settings() == before


def test_it_is_undone_after_an_error_too() -> None:
    before = settings()
    with pytest.raises(ZeroDivisionError), deterministic_kernels(GPU, True):
        raise ZeroDivisionError
    assert settings() == before


def test_the_last_one_to_set_it_has_its_way() -> None:
    for wanted in (True, False, True):
        set_deterministic(GPU, wanted)
        assert torch.are_deterministic_algorithms_enabled() == wanted
        assert inductor.deterministic == wanted


@pytest.mark.parametrize("wanted", [True, False])
def test_on_a_cpu_nothing_is_set(wanted: bool) -> None:
    torch.use_deterministic_algorithms(not wanted)
    before = settings()
    set_deterministic(CPU, wanted)
    with deterministic_kernels(CPU, wanted):
        assert settings() == before


def test_an_operator_without_such_a_kernel_is_run_all_the_same(
    caplog: pytest.LogCaptureFixture,
) -> None:
    calls = []

    def call() -> torch.Tensor:
        calls.append(1)
        if not torch.is_deterministic_algorithms_warn_only_enabled():
            # As torch's CUDA kernels do it; those of a CPU are all deterministic but for this one.
            return torch.empty(2).put_(torch.tensor([0, 0]), torch.ones(2), accumulate=False)
        return torch.ones(2)

    with deterministic_kernels(GPU, True), caplog.at_level(logging.WARNING, "fusegpt_ray"):
        found = deterministic_or_not(call)
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
