"""How much a block matters, as pure functions of hidden states. Shapes: B rows, T tokens, D hidden
size.
"""

from __future__ import annotations

import torch


def macro_influence(full_BTD: torch.Tensor, without_BTD: torch.Tensor) -> torch.Tensor:
    """1 − cos between the final states of the model and of the model without a block, summed over
    tokens: [B] float64.

    Macro Influence is its mean over all tokens (paper, section 3.1; method.md). Sums are returned,
    in float64, so that windows can be scored anywhere and added in any order without changing which
    block is the lowest. No token counts below 0 (a rounded cosine can pass 1), so that a sum over
    some windows is a lower bound of the sum over all.

    A beginning-of-sequence token is one of the tokens: its states, however large, have one cosine,
    as all others do.
    """
    cosine_BT = torch.nn.functional.cosine_similarity(full_BTD.float(), without_BTD.float(), dim=-1)
    return (1 - cosine_BT.double()).clamp(min=0).sum(dim=-1)
