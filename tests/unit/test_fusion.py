"""The parts of fusing, each against its formula written out: the group and the fused layer."""

from __future__ import annotations

import math

import pytest
import torch
from fused_layers import IN, KINDS, OUT, fuse
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from fusegpt_ray.fusion.group import group_span
from fusegpt_ray.fusion.linear import FusedLinear

# --- the partial group ---


@pytest.mark.parametrize(
    ("blocks", "donor", "first", "last"),
    [
        # "for p > 0 blocks p−4 … p+3; clamped to the first 8 or the last 8; p = 0 takes 0…7"
        (32, 0, 0, 7),
        (32, 1, 0, 7),
        (32, 3, 0, 7),
        (32, 4, 0, 7),
        (32, 5, 1, 8),
        (32, 16, 12, 19),
        (32, 27, 23, 30),
        (32, 28, 24, 31),
        (32, 29, 24, 31),
        (32, 31, 24, 31),
        (12, 0, 0, 7),
        (12, 6, 2, 9),
        (12, 8, 4, 11),
        (12, 11, 4, 11),
        (9, 4, 0, 7),
        (9, 5, 1, 8),
        (8, 0, 0, 7),
        (8, 4, 0, 7),
        (8, 7, 0, 7),
        # "Fewer than 8 blocks left: all of them."
        (5, 0, 0, 4),
        (5, 2, 0, 4),
        (5, 4, 0, 4),
        (1, 0, 0, 0),
    ],
)
def test_group_of_seven_neighbours(blocks: int, donor: int, first: int, last: int) -> None:
    assert list(group_span(donor, blocks, 7)) == list(range(first, last + 1))


@pytest.mark.parametrize("neighbours", [1, 2, 3, 6, 7])
@pytest.mark.parametrize("blocks", [1, 2, 5, 8, 13])
def test_any_group_holds_its_donor_and_as_many_neighbours_as_there_are(
    blocks: int, neighbours: int
) -> None:
    for donor in range(blocks):
        span = group_span(donor, blocks, neighbours)
        assert donor in span
        assert len(span) == min(neighbours + 1, blocks)
        assert span.start >= 0
        assert span.stop <= blocks


# --- the fused layer ---


def apply(fused: FusedLinear, own: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What the layer computes with the weight that is formed."""
    y = functional_call(own, fused(), (x,))
    assert isinstance(y, torch.Tensor)
    return y


def shake(layer: nn.Module) -> None:
    """Away from the start, where half of what learns is zero."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)


def formula(
    own: nn.Module, others: list[nn.Module], p: dict[str, torch.Tensor], x: torch.Tensor
) -> torch.Tensor:
    """y = x·W'ᵀ + b', W' = W + B·A + Σ (C_k·D_k) ⊙ W_k and b' = b + Σ c_k ⊙ b_k, weights [outputs,
    inputs]."""
    weight, bias = as_paper(own) + p["B"] @ p["A"], own.bias
    for k, other in enumerate(others):
        weight = weight + (p[f"C{k}"] @ p[f"D{k}"]) * as_paper(other)
        if bias is not None:
            bias = bias + p[f"c{k}"] * other.bias
    y = x @ weight.T
    return y if bias is None else y + bias


def as_paper(layer: nn.Module) -> torch.Tensor:
    """A layer's weight as [outputs, inputs]; Conv1D keeps it the other way round."""
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight


@pytest.mark.parametrize("donors", [0, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_gradients_are_the_formula(kind: str, donors: int) -> None:
    fused, own, others = fuse(kind, donors)
    shake(fused)
    p = {name: value.detach().clone().requires_grad_() for name, value in fused.named_parameters()}
    biases = 0 if own.bias is None else donors
    assert len(p) == 2 + 2 * donors + biases
    x = torch.randn(2, 4, IN, dtype=torch.float64)
    upstream = torch.randn(2, 4, OUT, dtype=torch.float64)
    x_fused, x_formula = x.clone().requires_grad_(), x.clone().requires_grad_()

    y = apply(fused, own, x_fused)
    expected = formula(own, others, p, x_formula)
    (y * upstream).sum().backward()
    (expected * upstream).sum().backward()

    # float64 throughout: only the order of additions differs.
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(y, expected, **close)
    torch.testing.assert_close(x_fused.grad, x_formula.grad, **close)
    for name, value in fused.named_parameters():
        torch.testing.assert_close(value.grad, p[name].grad, **close)
        assert value.grad.abs().max() > 0.01, name


@pytest.mark.parametrize("kind", KINDS)
def test_folding_equals_forward(kind: str) -> None:
    fused, own, _ = fuse(kind, 2)
    shake(fused)
    x = torch.randn(3, IN, dtype=torch.float64)
    expected = apply(fused, own, x)
    weight, bias = fused.effective()
    own.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
    torch.testing.assert_close(own(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("learned", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_starts_as_the_layer_it_replaces(
    kind: str, dtype: torch.dtype, learned: torch.dtype
) -> None:
    fused, own, _ = fuse(kind, 2, dtype, learned)
    x = torch.randn(3, 4, IN, dtype=dtype)
    weight, bias = fused.effective()
    assert torch.equal(weight.to(dtype), own.weight)
    assert bias is None or torch.equal(bias.to(dtype), own.bias)
    assert torch.equal(apply(fused, own, x), own(x))


def test_what_learns_starts_as_the_paper_says() -> None:
    own, donor = nn.Linear(100, 40), nn.Linear(100, 40)
    generator = torch.Generator().manual_seed(0)
    fused = FusedLinear(own, [(donor.weight, donor.bias)], 64, 32, torch.float32, generator)
    shapes = {name: tuple(value.shape) for name, value in fused.named_parameters()}
    assert shapes == {"A": (32, 100), "B": (40, 32), "C0": (40, 64), "D0": (64, 100), "c0": (40,)}
    for name in ("B", "C0", "c0"):
        assert not getattr(fused, name).any()
    for name in ("A", "D0"):  # Kaiming uniform with a = √5: within ± √(6 / ((1 + a²)·100)) = ± 0.1
        value = getattr(fused, name)
        assert 0.099 < value.abs().max() <= 0.1
        assert value.std().item() == pytest.approx(0.1 / math.sqrt(3), rel=0.03)
        assert abs(value.mean().item()) < 0.003
    assert {name for name, value in fused.named_parameters() if value.requires_grad} == set(shapes)
    assert own.weight.data_ptr() == fused.weight.data_ptr()  # frozen weights are shared, not copied
    assert donor.weight.data_ptr() == fused.donor_weight0.data_ptr()


def test_the_seed_alone_decides_the_start() -> None:
    def start(seed: int) -> torch.Tensor:
        torch.rand(7)  # the global generator has no say
        return fuse("linear", 1, seed=seed)[0].D0.detach()

    assert torch.equal(start(1), start(1))
    assert not torch.equal(start(1), start(2))


@pytest.mark.parametrize("kind", KINDS)
def test_float32_masters_of_bfloat16_weights(kind: str) -> None:
    """The sum is formed in float32 and rounded once; gradients are float32."""
    fused, own, others = fuse(kind, 1, torch.bfloat16, torch.float32)
    shake(fused)
    p = dict(fused.named_parameters())
    exact = (
        as_paper(own).float() + p["B"] @ p["A"] + (p["C0"] @ p["D0"]) * as_paper(others[0]).float()
    )
    bias = (
        None
        if own.bias is None
        else (own.bias.float() + p["c0"] * others[0].bias.float()).bfloat16()
    )
    weight = exact.bfloat16()
    x = torch.randn(4, IN)
    formed = fused()
    assert torch.equal(formed["weight"], weight.T if kind == "Conv1D" else weight)
    assert ("bias" in formed) == (bias is not None)
    assert bias is None or torch.equal(formed["bias"], bias)
    assert torch.equal(fused.effective()[0], exact.T if kind == "Conv1D" else exact)
    y = apply(fused, own, x.bfloat16())
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert {value.grad.dtype for value in p.values()} == {torch.float32}
