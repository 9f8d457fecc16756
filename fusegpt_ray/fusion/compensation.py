"""How the block before the gap can make up for a removed one, in closed form and without new
parameters: a change of its last linear layer.

Block q writes M = H Wᵀ + b to the residual stream last. The removed block, which was called next,
added Δ to it. Each way is a least-squares fit of Δ:

- `linear`: Δ ≈ H A (+ c, if the layer has a bias). Then W' = W + Aᵀ, b' = b + c.
- `matrix`: Δ ≈ M S with S [D, D]. Then W' = (1 + S)ᵀ W, b' = b (1 + S). That is the least-squares
  transformation T = 1 + S of ReplaceMe (arXiv 2505.02819); λ draws T to the identity, which is the
  block dropped.
- `scale`: Δ ≈ s M with one number s. Then W' = (1 + s) W, b' = (1 + s) b. Prune&Comp (arXiv
  2507.18212) has one number as well, but takes it from the ratio of mean norms of the states with
  and without the block, and folds it into every weight that writes to the stream before the gap.

Shapes: n tokens, I inputs of the layer, D hidden size and its outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import count
from typing import Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fusegpt_ray.fusion.least_squares import Fit
from fusegpt_ray.fusion.linear import Linear, sizes
from fusegpt_ray.fusion.student import expert_layers, linear_layers
from fusegpt_ray.model.recorder import Context, empty_call, states_of

Way = Literal["linear", "matrix", "scale"]
PIECES = 8
"""Sums are made of so many pieces of the windows at most. The last one is held out."""


def features(
    way: Way, h_nI: torch.Tensor, m_nD: torch.Tensor, delta_nD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is fitted to what: x [n, F] and y [n, K]."""
    if way == "linear":
        return h_nI, delta_nD
    if way == "matrix":
        return m_nD, delta_nD
    return m_nD.reshape(-1, 1), delta_nD.reshape(-1, 1)


def change(
    way: Way, fit: Fit, weight_DI: torch.Tensor, bias_D: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """What the fit adds to the layer's weight, and to its bias if it has one; float64."""
    own = [weight_DI.double()] if bias_D is None else [weight_DI.double(), bias_D.double()]
    if way == "linear":
        return [fit.weight_FK.T, fit.bias_K][: len(own)]
    if way == "matrix":
        return [fit.weight_FK.T @ value for value in own]
    return [fit.weight_FK.squeeze() * value for value in own]


def needed_tokens(way: Way, layer: Linear) -> int:
    """Fewer could be fitted exactly by some change that is good for nothing else."""
    outputs, inputs = sizes(layer)
    unknowns = {"linear": inputs + (layer.bias is not None), "matrix": outputs, "scale": 1}
    return unknowns[way]


def split(windows: int, batch: int) -> list[int]:
    """How many windows each piece has: all but the last in whole batches, as even as those allow.
    The last one, about an eighth, is held out.
    """
    batches = -(-windows // batch)
    pieces = min(PIECES, batches)
    ends = [min(windows, batch * (batches * i // pieces)) for i in range(1, pieces + 1)]
    return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]


def fitted_windows(windows: int, batch: int) -> int:
    """Of so many, those that are not held out."""
    return sum(split(windows, batch)[:-1])


def needed_windows(tokens: int, length: int, batch: int, multiple: int) -> int:
    """The fewest windows, in multiples of a number, of which so many tokens are fitted."""
    return next(
        windows
        for windows in count(multiple, multiple)
        if length * fitted_windows(windows, batch) >= tokens
    )


def last_linear(block: nn.Module, run: Callable[[], object]) -> str | None:
    """The linear layer with as many outputs as the hidden size that a block calls last, and once.
    None where experts are called after it: what they write is no single layer's.

    Args:
        run: calls the block, or a copy that is made in it, and returns what that returns.
    """
    called: list[str] = []

    def note(name: str) -> Callable[..., None]:
        # A plain function: a copy of the block keeps it as it is.
        return lambda *_: called.append(name)

    layers = dict(linear_layers(block))
    watched: dict[str, nn.Module] = {**layers} | {
        path: block.get_submodule(path) for path in expert_layers(block)
    }
    hooks = [module.register_forward_hook(note(path)) for path, module in watched.items()]
    try:
        out = run()
    finally:
        for hook in hooks:
            hook.remove()
    h_BTD = states_of(out)
    fitting = [
        path for path in called if path not in layers or sizes(layers[path])[0] == h_BTD.shape[-1]
    ]
    last = fitting[-1] if fitting else ""
    return last if last in layers and fitting.count(last) == 1 else None


def last_linears(calls: Sequence[tuple[nn.Module, torch.Tensor, Context]]) -> Mapping[int, Linear]:
    """By number, those of an empty model's blocks, which are called so (see `Structure.calls`)."""
    found = {}
    for number, (block, h_BTD, context) in enumerate(calls):
        name = last_linear(block, partial(_call_empty, block, h_BTD, context))
        if name is not None:
            layer = block.get_submodule(name)
            assert isinstance(layer, nn.Linear | Conv1D)
            found[number] = layer
    return found


def _call_empty(block: nn.Module, h_BTD: torch.Tensor, context: Context) -> object:
    return empty_call(block, h_BTD, context)()
