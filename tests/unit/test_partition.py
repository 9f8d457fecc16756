"""Frozen weights in parts: a block has them while it runs, and computes what it did."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from fusegpt_ray.model.recorder import Context, run_block
from fusegpt_ray.training.partition import Partition

NOTHING = Context((), {})


@pytest.fixture(autouse=True)
def _group(tmp_path: Path) -> Iterator[None]:
    """Of this process alone."""
    meet = f"file://{tmp_path}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def block() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(6, 5), nn.SiLU(), nn.Linear(5, 6, bias=False))
    layers[2].to(torch.bfloat16)  # rows of numbers of two dtypes
    layers.requires_grad_(False)
    layers.insert(2, Cast())
    return layers


class Cast(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.bfloat16)


@pytest.mark.parametrize("recompute", [False, True])
def test_outputs_and_gradients_are_those_of_the_whole_block(recompute: bool) -> None:
    plain, parted = block(), block()
    partition = Partition(0, 1)
    partition.keep(parted)
    run = partition.run(run_block)
    x, y = (torch.randn(3, 6, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    x, y = x.requires_grad_(), x.detach().clone().requires_grad_()
    expected = plain(x)
    if recompute:
        found = checkpoint(run, parted, y, NOTHING, use_reentrant=False)
    else:
        found = run(parted, y, NOTHING)
    assert torch.equal(found, expected)
    # A second call in between has weights of its own.
    run(parted, y.detach(), NOTHING)
    expected.float().sum().backward()
    found.float().sum().backward()
    assert x.grad is not None and y.grad is not None
    assert torch.equal(x.grad, y.grad)
    assert all(value.numel() == 0 for value in parted.parameters())


def test_a_worker_of_three_keeps_a_third() -> None:
    whole = {name: value.clone() for name, value in block().named_parameters()}
    parts = []
    for rank in range(3):
        parted = block()
        partition = Partition(rank, 3)
        partition.keep(parted)
        parts.append({d: part for d, (part, _) in partition._parts[parted].items()})
        assert all(value.numel() == 0 for value in parted.parameters())
    for dtype in (torch.float32, torch.bfloat16):
        row = torch.cat([part[dtype] for part in parts])
        expected = torch.cat([v.reshape(-1) for v in whole.values() if v.dtype == dtype])
        assert torch.equal(row[: len(expected)], expected)
        assert len(row) < len(expected) + 3


def test_what_learns_is_left_alone() -> None:
    parted = block()
    parted[0].weight = nn.Parameter(torch.empty(0))  # is given before each step
    partition = Partition(0, 1)
    partition.keep(parted)
    parted[0].weight = learned = nn.Parameter(torch.randn(5, 6))
    partition.run(run_block)(parted, torch.randn(3, 6), NOTHING)
    assert parted[0].weight is learned
