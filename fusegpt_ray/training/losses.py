"""What a span is trained to: its output states should stay what the teacher's are.

Shapes: B windows of one loss batch, b of them on this worker, T tokens, D hidden size.

The paper's loss is a KL divergence between softmaxes *over the batch*: the batch is a dimension of
the loss. Workers that split a loss batch therefore share the softmax's normaliser, by two
all-reduces of [T, D], instead of gathering the batch's states.

The states of a beginning-of-sequence token stay in the loss, for all later tokens attend to them.
They are often hundreds of times larger than others. They outweigh none in `normalized_mse`, which
divides each token's by its own size, and for `batch_kl` they are the same in every window, and so
add nothing; in `mse` they do.
Padding is no part of any loss: its weight is 0 (see `batch.token_weights`).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist

_NOWHERE = -1e30
"""A state whose share of a softmax is 0; an infinity would make a place without tokens NaN."""


class Loss(Protocol):
    """Of a student's states, by what they should be or lead to."""

    def __call__(
        self,
        student_bTD: torch.Tensor,
        aim: torch.Tensor,
        /,
        shared: bool,
        weights_bT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """A scalar.

        Args:
            aim: the teacher's states, or the tokens that follow [b, T].
            shared: the batch is split over the workers of the default process group, and the mean
                over workers is the loss.
            weights_bT: of each token; None: 1.
        """


class _LogSumExp(torch.autograd.Function):
    """log Σ_B exp(h) over the whole batch, of which this worker holds b rows: [T, D], with the
    gradient to every worker's rows.
    """

    @staticmethod
    def forward(ctx: Any, h_bTD: torch.Tensor, shared: bool) -> torch.Tensor:
        high_TD = h_bTD.amax(dim=0)
        if shared:
            dist.all_reduce(high_TD, dist.ReduceOp.MAX)
        total_TD = (h_bTD - high_TD).exp().sum(dim=0)
        if shared:
            dist.all_reduce(total_TD)
        out_TD = total_TD.log() + high_TD
        ctx.save_for_backward(h_bTD, out_TD)
        ctx.shared = shared
        return out_TD

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        h_bTD, out_TD = ctx.saved_tensors
        grad_TD = grads[0].contiguous()
        if ctx.shared:  # every worker's loss depends on the shared normaliser
            grad_TD = grad_TD.clone()
            dist.all_reduce(grad_TD)
        return (h_bTD - out_TD).exp() * grad_TD, None


def batch_kl(
    student_bTD: torch.Tensor,
    teacher_bTD: torch.Tensor,
    shared: bool,
    weights_bT: torch.Tensor | None = None,
) -> torch.Tensor:
    """KL(P‖Q), P and Q softmaxes over the batch of teacher's and student's states; summed, divided
    by B (paper's code).

    With `shared`, the workers of the default process group each hold b = B / workers rows, and the
    mean over workers of what they return is the loss (data-parallel training averages gradients, so
    its gradient is the loss's too).

    At each place of the windows, the softmaxes are over those that have a token there. As this is a
    sum over tokens, padding is left out of it and the weights are no factors.
    """
    student, teacher = student_bTD.float(), teacher_bTD.float()
    padding_bT1 = None if weights_bT is None else weights_bT[..., None] == 0
    if padding_bT1 is not None:
        student = student.masked_fill(padding_bT1, _NOWHERE)
        teacher = teacher.masked_fill(padding_bT1, _NOWHERE)
    log_q = student - _LogSumExp.apply(student, shared)
    log_p = teacher - _LogSumExp.apply(teacher, shared)
    terms_bTD = log_p.exp() * (log_p - log_q)
    if padding_bT1 is not None:
        terms_bTD = terms_bTD.masked_fill(padding_bT1, 0)
    return terms_bTD.sum() / student.shape[0]


def normalized_mse(
    student_bTD: torch.Tensor,
    teacher_bTD: torch.Tensor,
    shared: bool,
    weights_bT: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean squared error between the states, each divided by its root mean square over D, as the
    next norm will see them.
    """

    def normalize(h: torch.Tensor) -> torch.Tensor:
        return h * torch.rsqrt(h.pow(2).mean(dim=-1, keepdim=True) + 1e-6)

    error_bTD = (normalize(student_bTD.float()) - normalize(teacher_bTD.float())).pow(2)
    if weights_bT is None:
        return error_bTD.mean()
    return (error_bTD.mean(dim=-1) * weights_bT).mean()


def mse(
    student_bTD: torch.Tensor,
    teacher_bTD: torch.Tensor,
    shared: bool,
    weights_bT: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean squared error between the states as they are (LLM-Streamline, arXiv 2403.19135): here
    the large states of a first token outweigh others.
    """
    error_bTD = (student_bTD.float() - teacher_bTD.float()).pow(2)
    if weights_bT is None:
        return error_bTD.mean()
    return (error_bTD.mean(dim=-1) * weights_bT).mean()


LOSSES: dict[str, Loss] = {"batch_kl": batch_kl, "normalized_mse": normalized_mse}


def is_mean_over_rows(loss: Loss) -> bool:
    """Whether the loss of a batch is the mean of its equal parts' losses."""
    return loss is not batch_kl
