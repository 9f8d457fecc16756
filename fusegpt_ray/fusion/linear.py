"""The weight and bias of a fused linear layer (paper, Eq. 7–10):

    W' = W + B·A + Σ_k (C_k·D_k) ⊙ W_k,   b' = b + Σ_k c_k ⊙ b_k

Shapes: O outputs, I inputs, R rank, E experts. A and D are [R, I], B and C [O, R]; weights are [O,
I], but [I, O] in GPT-2's Conv1D. A mixture has one tensor of all experts' weights, [E, O, I] or, in
some models, [E, I, O]. Then each of the above has E in front, and the formula holds for each expert
e by itself: W'_e = W_e + B_e·A_e + Σ_k (C_ke·D_ke) ⊙ W_ke.

Notable:
- W and the donors' W_k are buffers: frozen, shared between layers where they are the same tensor,
  and never touched by ZeRO;
- A, B, C, D and c may be float32 masters while W is bf16: the sum is formed in the masters' dtype
  once a loss batch (see `training/span.py`) and then cast;
- at the start B, C and c are zero, so the layer is exactly the linear layer it replaces.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

Linear: TypeAlias = nn.Linear | Conv1D
Frozen: TypeAlias = tuple[torch.Tensor, torch.Tensor | None]
"""A weight and a bias, if there is one."""


class Experts(NamedTuple):
    """A linear layer of each expert of a mixture."""

    weight: torch.Tensor
    """[E, O, I], or [E, I, O] where it is transposed."""
    bias: torch.Tensor | None
    """[E, O]."""
    transposed: bool


def is_transposed(own: Linear | Experts) -> bool:
    """Whether the weight has its inputs first."""
    return own.transposed if isinstance(own, Experts) else isinstance(own, Conv1D)


def sizes(own: Linear | Experts) -> tuple[int, ...]:
    """(Experts, if any,) outputs and inputs."""
    return tuple((own.weight.mT if is_transposed(own) else own.weight).shape)


class FusedLinear(nn.Module):
    """The weight and bias of a linear layer that takes in the same-named layers of removed blocks,
    and learns a low-rank update of its own.

    Its parameters are all its own (C0, D0, c0, C1, …), not those of submodules (see `Learned`).
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    A: torch.Tensor
    B: torch.Tensor
    product = staticmethod(torch.matmul)
    """Of two factors: [O, R] and [R, I] → [O, I]; of experts each by itself."""

    def __init__(
        self,
        own: Linear | Experts,
        donors: Sequence[Frozen | None],
        rank: int,
        lora_rank: int,
        dtype: torch.dtype,
        generator: torch.Generator,
    ) -> None:
        """`own` is the frozen layer, `donors` the removed blocks' layers in order of removal.

        A donor without such a layer is None, and term k is left out. `dtype` is that of what
        learns.
        """
        super().__init__()
        self.transposed = is_transposed(own)
        self.of_experts = isinstance(own, Experts)
        self.terms = len(donors)
        *experts, outputs, inputs = sizes(own)

        def learn(name: str, value: torch.Tensor) -> None:
            self.register_parameter(name, nn.Parameter(value.to(own.weight.device, dtype)))

        self.register_buffer("weight", own.weight.detach(), persistent=False)
        self.register_buffer(
            "bias", None if own.bias is None else own.bias.detach(), persistent=False
        )
        learn("B", torch.zeros(*experts, outputs, lora_rank))
        learn("A", kaiming(lora_rank, inputs, generator, *experts))
        for k, donor in enumerate(donors):
            if donor is None:
                continue
            weight, bias = donor
            self.register_buffer(f"donor_weight{k}", weight, persistent=False)
            learn(f"C{k}", torch.zeros(*experts, outputs, rank))
            learn(f"D{k}", kaiming(rank, inputs, generator, *experts))
            if bias is not None:
                self.register_buffer(f"donor_bias{k}", bias, persistent=False)
                learn(f"c{k}", torch.zeros(bias.shape))

    def names(self, path: str) -> tuple[str, str]:
        """What a block calls its weight and its bias, by its path among what learns."""
        return (path, bias_of(path)) if self.of_experts else (f"{path}.weight", f"{path}.bias")

    def forward(self) -> dict[str, torch.Tensor]:
        """The effective weight and bias, in the frozen weight's dtype."""
        weight, bias = self.effective()
        formed = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        return {key: value.to(self.weight.dtype) for key, value in formed.items()}

    def effective(
        self, frozen: Sequence[Frozen | None] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The effective weight and bias, in the dtype of what learns (float32 masters: exact to
        float32).

        `frozen`: the layer's own and its donors' weights and biases, if not those it holds.
        """
        held, *donors = frozen or self.frozen()
        assert held is not None
        own, bias = held
        device = self.weight.device
        weight = own.to(device) + self._laid_out(self.product(self.B, self.A))
        bias = bias if bias is None else bias.to(device)
        for k, donor in enumerate(donors):
            if donor is None:
                continue
            donor_weight, donor_bias = donor
            coefficients = self._laid_out(
                self.product(getattr(self, f"C{k}"), getattr(self, f"D{k}"))
            )
            weight = weight + coefficients * donor_weight.to(device)
            if bias is not None and donor_bias is not None:
                bias = bias + getattr(self, f"c{k}") * donor_bias.to(device)
        return weight, bias

    def frozen(self) -> list[Frozen | None]:
        """The weight and bias of the layer itself and of each donor that gives one."""

        def donor(k: int) -> Frozen | None:
            weight = getattr(self, f"donor_weight{k}", None)
            return None if weight is None else (weight, getattr(self, f"donor_bias{k}", None))

        return [(self.weight, self.bias), *map(donor, range(self.terms))]

    def _laid_out(self, product_OI: torch.Tensor) -> torch.Tensor:
        return product_OI.mT if self.transposed else product_OI


class FusedExperts(nn.ModuleDict):
    """The fused layers of a mixture's experts, by the names of their weights."""

    def forward(self) -> dict[str, torch.Tensor]:
        """Their effective weights and biases, by name in the module that holds the experts."""
        return {
            key if kind == "weight" else bias_of(key): value
            for key, layer in self.items()
            if isinstance(layer, FusedLinear)  # a norm among the experts' own is beside them here
            for kind, value in layer().items()
        }


def bias_of(weight: str) -> str:
    """What experts' biases are called, beside their weights."""
    return f"{weight}_bias"


def kaiming(
    rows: int, columns: int, generator: torch.Generator, experts: int | None = None
) -> torch.Tensor:
    """Kaiming uniform with a = √5, as nn.Linear starts; on the CPU in float32, so that every device
    starts the same. For each of so many experts, if there are any.
    """
    if experts is not None:
        return torch.stack([kaiming(rows, columns, generator) for _ in range(experts)])
    return nn.init.kaiming_uniform_(torch.empty(rows, columns), a=math.sqrt(5), generator=generator)
