"""Gates that learn which blocks a model can do without (after FoldGPT, arXiv 2407.00928).

A gate g_l weighs what block l adds: with block l as f_l,

    h_l+1 = h_l + g_l · (f_l(h_l) − h_l),

so at 1 the block is the dense model's, and at 0 it is gone. All weights are frozen, and the gates
of all blocks are trained together to the least of

    F(g) = KL(dense ‖ gated) + P · mean over l of g_l (1 − g_l)
    where  0 ≤ g_l ≤ 1  and  Σ_l s_l · g_l = k.

The KL divergence is that of healing, in nats a token. The second term draws each gate to 0 or 1.
The last condition is the budget: s_l is the block's share of all blocks' parameters, and k what may
stay of them. It is true in every step, by gradient projection (Rosen, 1960). What learns are
numbers r_l, 1 at first, and the gates are the nearest point of the budget,

    g_l = min(max(r_l − ν · s_l, 0), 1),    ν such that Σ_l s_l · g_l = k.

Adam is given v_l − λ · s_l, where v is the gradient of F at g and λ the multiplier of the budget,
by least squares over the gates that are neither 0 nor 1 (over all of them, if not two are):

    λ = Σ s_l · v_l / Σ s_l².

So a gate falls that costs less than the others do for its parameters, and these rise for it.

FoldGPT has no public code, and its abstract leaves open what P is, that one gate weighs a whole
block, how the budget is kept, and that the least ones go: these choices are ours.

Shapes: B windows, T tokens, D hidden size, N blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, gcd, prod
from typing import Any

import torch
from torch import nn

from fusegpt_ray.healing.trial import learning_alone
from fusegpt_ray.model.compiled import RunBlock
from fusegpt_ray.model.empty import EmptyBlock
from fusegpt_ray.model.recorder import Context
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.model.trunk import Trunk
from fusegpt_ray.samples import Batch
from fusegpt_ray.training.distillation import LogitsKL
from fusegpt_ray.training.finetune import learn
from fusegpt_ray.training.losses import Loss
from fusegpt_ray.training.partition import Partition
from fusegpt_ray.training.span import Learned, Span, Weights
from fusegpt_ray.training.states import StatesSource
from fusegpt_ray.training.stepper import TrainingConfig
from fusegpt_ray.training.task import SavedBlocks, TrainingTask

STEPS = 64
"""At least so many; whole passes over the windows."""
BATCH = 4
"""Windows a step, or fewer where that does not divide them."""
RATE = 0.05
"""Adam's at the beginning; it falls to 0 on a cosine."""
POLARISE = 1.0
"""P, in nats."""
HALVINGS = 64
"""Of the interval in which ν lies: more than float64 can tell."""


def batch_of(windows: int) -> int:
    """Windows of a step."""
    return gcd(windows, BATCH)


def passes_over(windows: int) -> int:
    """Passes over so many windows."""
    return ceil(STEPS * batch_of(windows) / windows)


def within(raw_N: torch.Tensor, shares_N: torch.Tensor, keep: float) -> torch.Tensor:
    """r − ν · s, in float64 on the CPU: cut off at 0 and 1, these are the gates that keep the
    budget.

    Args:
        raw_N, shares_N, keep: r, s and k of the formula.
    """
    raw_N, shares_N = raw_N.detach().double().cpu(), shares_N.double().cpu()
    # Between all gates at 1 and all at 0; what they add up to falls as ν grows.
    low, high = ((raw_N - 1) / shares_N).min(), (raw_N / shares_N).max()
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if (shares_N * (raw_N - middle * shares_N).clamp(0, 1)).sum() > keep:
            low = middle
        else:
            high = middle
    return raw_N - high * shares_N


class _Projected(torch.autograd.Function):
    """r → g. The gradient of the polarising term is added where the loss batch's gradient enters,
    once a step, and what of both would change the budget is taken out.
    """

    @staticmethod
    def forward(ctx: Any, raw_N: torch.Tensor, shares_N: torch.Tensor, keep: float) -> torch.Tensor:
        gates_N = within(raw_N, shares_N, keep).clamp(0, 1).to(raw_N)
        ctx.gates_N, ctx.shares_N = gates_N, shares_N
        return gates_N

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        gates_N, shares_N = ctx.gates_N, ctx.shares_N
        slope_N = grads[0] + POLARISE * (1 - 2 * gates_N) / len(gates_N)
        free_N = (gates_N > 0) & (gates_N < 1)
        over_N = shares_N * free_N if free_N.sum() > 1 else shares_N
        multiplier = (over_N * slope_N).sum() / over_N.square().sum()
        return slope_N - multiplier * shares_N, None, None


class Gates(Learned):
    """The gates of all blocks."""

    def __init__(self, shares: torch.Tensor, keep: float, dtype: torch.dtype) -> None:
        """
        Args:
            shares: s [N].
            keep: k.
            dtype: of the arithmetic.
        """
        super().__init__([{} for _ in shares])
        self.raw_N = nn.Parameter(torch.ones_like(shares))
        self.shares_N, self.keep, self.dtype = shares, keep, dtype

    def forward(self) -> list[Weights]:
        gates_N: torch.Tensor = _Projected.apply(self.raw_N, self.shares_N, self.keep)
        return [{"gate": gate} for gate in gates_N.to(self.dtype)]


def _gated(run: RunBlock) -> RunBlock:
    def through(block: nn.Module, h_BTD: torch.Tensor, context: Context) -> torch.Tensor:
        return torch.lerp(h_BTD, run(block, h_BTD, context), block.gate)  # type: ignore[arg-type]

    return through


@dataclass(frozen=True)
class GatedModel:
    """All blocks of the dense model behind gates; see `training.finetune.Trainable`. One process
    trains it, and writes nothing.
    """

    dense: Stack
    remove: int
    """How many blocks are to go."""

    uses_head = True

    def task(self, windows: Batch) -> TrainingTask:
        """The training of the gates on these windows."""
        size = len(windows)
        config = TrainingConfig("logits_kl", batch_of(size), passes_over(size))
        source = StatesSource(self.dense, 0, self.dense, len(self.dense))
        return TrainingTask(
            self, source, windows, config, {}, "", lambda: None, what="training the gates"
        )

    def build(
        self,
        meta_blocks: Sequence[EmptyBlock],
        contexts: Sequence[Context],
        device: torch.device,
        dtype: torch.dtype,
        recompute: bool,
        run: RunBlock,
        partition: Partition | None = None,
    ) -> Span:
        assert partition is None, "one process trains it"
        blocks, numbers = self.dense.blocks, self.dense.kept
        sizes = [sum(prod(ref.shape) for ref in block.weights.values()) for block in blocks]
        shares_N = torch.tensor(sizes, dtype=torch.float64, device=device)
        shares_N = (shares_N / shares_N.sum()).float()
        plain = [
            meta_blocks[block.dense].filled(
                meta_blocks[block.dense].read(block.weights), device, dtype
            )
            for block in blocks
        ]
        learned = Gates(shares_N, 1 - self.remove / len(blocks), dtype)
        own = [contexts[number].to(device) for number in numbers]
        return Span(plain, learned, own, recompute, run, _gated, meta_blocks, list(numbers))

    def loss(self, trunk: Trunk, teacher: Trunk | None = None) -> Loss:
        return LogitsKL(trunk.head)

    def parameter_groups(self, span: Span) -> list[dict[str, Any]]:
        return [{"params": [*span.learned.parameters()], "lr": RATE}]

    def save(self, span: Span, part: int, parts: int) -> SavedBlocks:
        raise AssertionError("no block has changed")


def train_gates(runner: Runner, model: GatedModel, windows: Batch) -> list[float]:
    """The task of a replica: the gates of all blocks, in order, as they are before they are cut
    off. As many windows pass a block at once as the runner is set to.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    with learning_alone(runner) as worker:
        span = learn(worker, model.task(windows), runner.batch_size, runner.batch_size).span
        learned = span.learned
        assert isinstance(learned, Gates)
        return within(learned.raw_N, learned.shares_N, learned.keep).tolist()
