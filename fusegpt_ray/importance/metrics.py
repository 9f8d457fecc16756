"""How much a block matters, as pure functions of states.

Shapes: B windows, T tokens, D hidden size, n tokens of one window, V vocabulary.

Each function compares the model without a block (one for each candidate) with a reference, and
returns a sum over tokens for each window, [B] float64. Sums are returned, in float64, so that
windows can be scored anywhere and added in any order without changing which block is the lowest. No
token counts below 0 (a rounded cosine can pass 1), so that a sum over some windows is a lower bound
of the sum over all. No bit of a candidate's sums depends on the other candidates.

A beginning-of-sequence token is one of the tokens: its states, however large, have one cosine, as
all others do. Padding is none, nor is whatever else `counted_BT` leaves out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cosine_similarity, cross_entropy

from fusegpt_ray.recipe.specs import METRIC_SPECS, MetricSpec

AT_ONCE = 1024
"""Tokens whose logits are in memory at once."""

Head = Callable[[torch.Tensor], torch.Tensor]
"""Logits [1, n, V] of states [1, n, D] that leave the last block."""
Counted = torch.Tensor | None
"""Which tokens count, bool [B, T]; None: all of them."""
Sums = Callable[[Head, torch.Tensor, Sequence[torch.Tensor], Counted], list[torch.Tensor]]
"""(head, reference, states without each candidate [B, T, D], which tokens count) → for each
candidate, [B] float64. The reference is states [B, T, D], or tokens [B, T]: see
`MetricSpec.against`."""


@dataclass(frozen=True)
class Metric:
    """One way to tell how much a block matters."""

    spec: MetricSpec
    sums: Sums


def macro_influence(
    full_BTD: torch.Tensor, without_BTD: torch.Tensor, counted_BT: Counted = None
) -> torch.Tensor:
    """1 − cos between the final states of the model and of the model without a block, summed over
    tokens: [B] float64.

    Macro Influence is its mean over all tokens (paper, section 3.1; method.md). Between the states
    that leave and enter a block, it is Block Influence (arXiv 2403.03853).
    """
    cosine_BT = cosine_similarity(full_BTD.float(), without_BTD.float(), dim=-1)
    return _only((1 - cosine_BT.double()).clamp(min=0), counted_BT).sum(dim=-1)


def _cosines(
    head: Head,
    full_BTD: torch.Tensor,
    without: Sequence[torch.Tensor],
    counted_BT: Counted = None,
) -> list[torch.Tensor]:
    return [macro_influence(full_BTD, without_BTD, counted_BT) for without_BTD in without]


def kl_divergence(
    head: Head,
    dense_BTD: torch.Tensor,
    without: Sequence[torch.Tensor],
    counted_BT: Counted = None,
) -> list[torch.Tensor]:
    """KL(dense model ‖ model without the block) of the next token's distribution, in nats, summed
    over all T tokens (that count).
    """
    sums = _zeros(without)
    for row, part in _parts(*dense_BTD.shape[:2]):
        log_p_nV = _log_probabilities(head, dense_BTD[row, part])
        counted_n = None if counted_BT is None else counted_BT[row, part]
        p_nV = log_p_nV.exp()
        for sum_B, without_BTD in zip(sums, without, strict=True):
            terms_nV = p_nV * (log_p_nV - _log_probabilities(head, without_BTD[row, part]))
            # 0 · log 0 = 0, where a model gives a token no probability at all.
            divergence_n = terms_nV.masked_fill_(p_nV == 0, 0).sum(dim=-1)
            sum_B[row] += _only(divergence_n.double().clamp(min=0), counted_n).sum()
    return sums


def token_loss(
    head: Head,
    ids_BT: torch.Tensor,
    without: Sequence[torch.Tensor],
    counted_BT: Counted = None,
) -> list[torch.Tensor]:
    """Cross-entropy of the model without the block in nats, summed over the T − 1 tokens that it
    predicts, as far as they count (SLEB, arXiv 2402.09025).
    """
    sums = _zeros(without)
    for row, part in _parts(len(ids_BT), ids_BT.shape[1] - 1):
        counted_n = None if counted_BT is None else counted_BT[row, 1:][part]
        for sum_B, without_BTD in zip(sums, without, strict=True):
            states_nD = without_BTD[row, part]
            next_n = ids_BT[row, 1:][part].clamp(min=0).to(states_nD.device)
            loss_n = cross_entropy(head(states_nD[None])[0].float(), next_n, reduction="none")
            sum_B[row] += _only(loss_n.double().clamp(min=0), counted_n).sum()
    return sums


def _log_probabilities(head: Head, states_nD: torch.Tensor) -> torch.Tensor:
    """Of the next token: [n, V] float32."""
    return head(states_nD[None])[0].float().log_softmax(dim=-1)


def _only(terms: torch.Tensor, counted: Counted) -> torch.Tensor:
    """The terms of tokens that count, and 0 for the others."""
    return terms if counted is None else terms.masked_fill(~counted.to(terms.device), 0)


def _zeros(without: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """A sum for each window of each candidate: [B] float64, where its states are."""
    return [torch.zeros(len(h), dtype=torch.float64, device=h.device) for h in without]


def _parts(windows: int, tokens: int) -> Iterator[tuple[int, slice]]:
    """Every window's tokens, so many at once. Never of two windows: a model may have learned no
    more positions than a window has.
    """
    for row in range(windows):
        for begin in range(0, tokens, AT_ONCE):
            yield row, slice(begin, min(begin + AT_ONCE, tokens))


METRICS: dict[str, Metric] = {
    "mi": Metric(METRIC_SPECS["mi"], _cosines),
    "kl": Metric(METRIC_SPECS["kl"], kl_divergence),
    "loss": Metric(METRIC_SPECS["loss"], token_loss),
    "bi": Metric(METRIC_SPECS["bi"], _cosines),
}
"""By name in the recipe."""
