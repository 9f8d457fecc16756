"""A narrower model in closed form: norms folded, the residual stream rotated, and sliced (SliceGPT,
Ashkboos et al., arXiv 2401.15024).

With x a state of the residual stream, g a norm's weight, and Q an orthogonal matrix:

    RMSNorm(x) ⊙ g · Wᵀ = RMSNorm(x·Q) · (W·diag(g)·Q)ᵀ        (its Eq. 2 and 3)

so a model of which every matrix that reads the stream is W·diag(g)·Q, every one that writes to it
Qᵀ·W, and whose embedding is E·Q, computes what the dense model does, on rotated states. The columns
of Q are the principal axes of the normalised states, the largest first. Slicing keeps the first K
of D columns: P = Q[:, :K].

Ours differs in four points, the first of them from the paper and the others from its authors' code.
The paper has a Q for every norm, and so a matrix Qₗᵀ·Qₗ₊₁ on every residual connection, which no
ordinary checkpoint has a place for. Here one Q is common to the whole stream, of the states that
enter all norms. The code finds each Q in the states of the model that is already sliced up to
there, so that later axes are those of what is left; here one walk of the dense model finds the one
there is. The code leaves the last MLP's output and the head as wide as they were, unless asked to
slice them; here they are sliced like all else, because a configuration has one hidden size. And the
code finds the axes of the states as they are; here they are those of what the norms give, as in the
paper's text. What the first point costs: benchmarks/slicing.py.

A norm's mean is then over K numbers instead of D. As the D − K others are zero,

    x / sqrt(Σx²/D + ε) = sqrt(D/K) · x / sqrt(Σx²/K + ε·D/K)

so the factor sqrt(D/K) goes into the matrices that follow, and ε becomes ε·D/K. Norms within heads
(Qwen3) have the same ε from the configuration. They give what they gave if their inputs are
sqrt(D/K) times as large, by the same equation, so their projections have the factor twice.

Shapes: n states, D hidden size, K kept of it, O outputs of a matrix, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt

import torch

from fusegpt_ray.model.names import Tensors

READS: Mapping[str, tuple[str, ...]] = {
    "input_layernorm": tuple(f"self_attn.{name}_proj" for name in ("q", "k", "v", "qkv")),
    "post_attention_layernorm": tuple(f"mlp.{name}_proj" for name in ("gate", "up", "gate_up")),
}
"""The norms of a block that read the stream, and the linear layers that read each of them."""
WRITES = ("self_attn.o_proj", "mlp.down_proj")
"""The linear layers whose outputs are added to the stream."""
APART = {f"self_attn.{name}_norm.weight": f"self_attn.{name}_proj" for name in ("q", "k")}
"""Norms within each head, which slicing leaves as they are, and the layers that they follow."""
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
"""The trunk's tensors, as the model's class calls them."""


def known(name: str) -> bool:
    """Whether slicing knows what a tensor of a block is."""
    layer, _, kind = name.rpartition(".")
    read = any(layer in layers for layers in READS.values())
    return (
        name in APART
        or (layer in READS and kind == "weight")
        or ((read or layer in WRITES) and kind in ("weight", "bias"))
    )


def normalised(h_nD: torch.Tensor, eps: float) -> torch.Tensor:
    """States as RMSNorm without a weight gives them, in float64."""
    h_nD = h_nD.double()
    return h_nD * torch.rsqrt(h_nD.square().mean(-1, keepdim=True) + eps)


def principal_axes(covariance_DD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(Q [D, D], eigenvalues [D]) of a symmetric matrix, the largest first, in float64.

    An axis has no direction: its largest component is made positive, so that the bytes of a model
    follow from its states.
    """
    value_D, axis_DD = torch.linalg.eigh(covariance_DD.double())
    value_D, axis_DD = value_D.flip(0), axis_DD.flip(1)
    largest_D = axis_DD.gather(0, axis_DD.abs().argmax(0, keepdim=True))[0]
    return axis_DD * torch.where(largest_D < 0, -1.0, 1.0), value_D


def reading(weight_OD: torch.Tensor, norm_D: torch.Tensor, axes_DK: torch.Tensor) -> torch.Tensor:
    """[O, K]: a matrix that reads the stream through a norm."""
    hidden, kept = axes_DK.shape
    return sqrt(hidden / kept) * (weight_OD.double() * norm_D.double()) @ axes_DK


def sliced_block(tensors: Tensors, axes_DK: torch.Tensor) -> dict[str, torch.Tensor]:
    """A block's tensors on the sliced stream, in float64; all of them are `known`.

    `axes_DK`: the first K principal axes, float64.
    """
    made: dict[str, torch.Tensor] = {}
    norms = {layer: norm for norm, layers in READS.items() for layer in layers}
    factor = sqrt(axes_DK.shape[0] / axes_DK.shape[1])
    within = [layer for norm, layer in APART.items() if norm in tensors]
    for name, value in tensors.items():
        layer, _, kind = name.rpartition(".")
        if layer in READS:
            made[name] = torch.ones(axes_DK.shape[1], dtype=torch.float64)
        elif layer in norms and kind == "weight":
            made[name] = reading(value, tensors[f"{norms[layer]}.weight"], axes_DK)
        elif layer in WRITES:
            made[name] = axes_DK.T @ value.double()  # a bias is written as well
        else:
            made[name] = value.double()
        if layer in within:
            made[name] = factor * made[name]
    return made


def sliced_trunk(
    embedding_VD: torch.Tensor, norm_D: torch.Tensor, head_VD: torch.Tensor, axes_DK: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The embedding, the final norm and the head by the names of their roles, in float64. The
    head has the norm in it, and so is no longer the embedding where it was that.
    """
    return {
        EMBEDDING: embedding_VD.double() @ axes_DK,
        NORM: torch.ones(axes_DK.shape[1], dtype=torch.float64),
        HEAD: reading(head_VD, norm_D, axes_DK),
    }
