"""The loss of a whole model: how far its next-token distributions are from the teacher's, or from
the tokens that follow in the text.

Distributions are computed from last hidden states through the frozen norm and head, a few hundred
tokens at a time. So the teacher is kept as D numbers a token and nothing of it is cut off, and
logits of the full vocabulary exist for one chunk only.

Shapes: b windows of a loss batch on this worker, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fusegpt_ray.training.losses import normalized_mse

Head = Callable[[torch.Tensor], torch.Tensor]
"""Last hidden states [n, t, D] → logits [n, t, V]; of each token alone."""
CHUNK = 512
"""Tokens whose logits exist at once: with a vocabulary of 128,000, 0.26 GB in float32 each for the
teacher, the student and the gradient."""


@dataclass(frozen=True)
class LogitsKL:
    """KL(P‖Q) in nats, the mean over all tokens: P the teacher's distribution of the next token,
    Q the student's (Hinton et al., arXiv 1503.02531, at temperature 1).
    """

    head: Head
    hidden: float = 0.0
    """Weight of a second term, `normalized_mse` of the last hidden states."""
    chunk: int = CHUNK
    teacher: Head | None = None
    """Of the teacher, whose hidden size may be another; None: `head`."""

    def __call__(
        self,
        student_bTD: torch.Tensor,
        teacher_bTD: torch.Tensor,
        shared: bool,
        weights_bT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `losses.Loss`; a mean over rows."""
        against = partial(_kl, head=self.teacher or self.head)
        kl = _by_token(student_bTD, teacher_bTD, weights_bT, self.head, self.chunk, against)
        if not self.hidden:
            return kl
        return kl + self.hidden * normalized_mse(student_bTD, teacher_bTD, shared, weights_bT)


@dataclass(frozen=True)
class NextToken:
    """−log q(x_{t+1}) in nats, the mean over all tokens that are targets: Q the student's
    distribution of the next token, x the text.
    """

    head: Head
    chunk: int = CHUNK

    def __call__(
        self,
        student_bTD: torch.Tensor,
        targets_bT: torch.Tensor,
        shared: bool,
        weights_bT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `losses.Loss`; a mean over rows. `targets_bT`: the token after each one. Where there
        is none, or it does not count, the weight is 0 (see `batch.target_weights`).
        """
        return _by_token(student_bTD, targets_bT, weights_bT, self.head, self.chunk, _cross_entropy)


Compare = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Of log q [n, t, V], which may be overwritten, and of the aim of these tokens: the loss of each
token [n, t], and its gradient by the logits [n, t, V]."""


def _kl(
    log_q: torch.Tensor, teacher_ntD: torch.Tensor, head: Head
) -> tuple[torch.Tensor, torch.Tensor]:
    log_p = head(teacher_ntD).float().log_softmax(-1)
    p = log_p.exp()
    terms_nt = (p * (log_p - log_q)).sum(-1)
    return terms_nt, log_q.exp_() - p


def _cross_entropy(
    log_q: torch.Tensor, targets_nt: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    terms_nt = -log_q.gather(-1, targets_nt[..., None])[..., 0]
    # Not scattered: a comparison has the same bits on every device.
    vocabulary = torch.arange(log_q.shape[-1], device=log_q.device)
    hit = (vocabulary == targets_nt[..., None]).to(log_q.dtype)
    return terms_nt, log_q.exp_().sub_(hit)


def _by_token(
    student_bTD: torch.Tensor,
    aim: torch.Tensor,
    weights_bT: torch.Tensor | None,
    head: Head,
    chunk: int,
    compare: Compare,
) -> torch.Tensor:
    found: torch.Tensor = _ByToken.apply(student_bTD, aim, weights_bT, head, chunk, compare)
    return found


class _ByToken(torch.autograd.Function):
    """The gradient by the student's states is found together with the value, chunk by chunk, so
    that no logits have to be kept or computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student_bTD: torch.Tensor,
        aim: torch.Tensor,
        weights_bT: torch.Tensor | None,
        head: Head,
        chunk: int,
        compare: Compare,
    ) -> torch.Tensor:
        tokens = student_bTD[..., 0].numel()
        total = torch.zeros((), dtype=torch.float64, device=student_bTD.device)
        grad_bTD = torch.empty_like(student_bTD) if ctx.needs_input_grad[0] else None
        for at in _chunks(student_bTD, chunk):
            with torch.set_grad_enabled(grad_bTD is not None):
                h_ntD = student_bTD[at].detach().requires_grad_(grad_bTD is not None)
                logits_ntV = head(h_ntD)
            log_q = logits_ntV.detach().float().log_softmax(-1)
            terms_nt, by_logits = compare(log_q, aim[at])
            terms_nt = terms_nt.double()
            if weights_bT is not None:
                terms_nt = terms_nt * weights_bT[at]
            total += terms_nt.sum()
            if grad_bTD is not None:
                by_logits.div_(tokens)
                if weights_bT is not None:
                    by_logits *= weights_bT[at][..., None]
                by_logits = by_logits.to(logits_ntV.dtype)
                logits_ntV.backward(by_logits)  # the head is frozen: it reaches the states only
                assert h_ntD.grad is not None
                grad_bTD[at] = h_ntD.grad
        ctx.grad_bTD = grad_bTD
        return (total / tokens).float()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.grad_bTD * grads[0].to(ctx.grad_bTD.dtype), None, None, None, None, None


def _chunks(h_bTD: torch.Tensor, tokens: int) -> Iterator[tuple[slice, slice]]:
    """Windows and tokens of each chunk: several whole windows, or a piece of one."""
    windows, length, _ = h_bTD.shape
    rows = max(1, tokens // length)
    for row in range(0, windows, rows):
        for first in range(0, length, tokens):
            yield slice(row, row + rows), slice(first, first + tokens)
