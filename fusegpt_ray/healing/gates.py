"""Gates that learn which blocks a model can do without (after FoldGPT, arXiv 2407.00928).

A gate g_l weighs what block l adds: with block l as f_l,

    h_l+1 = h_l + g_l · (f_l(h_l) − h_l),

so at 1 the model is the dense one, and at 0 the block is gone. All weights are frozen, and the
gates of all blocks are trained together, from 1 on, to the least of

    KL(dense ‖ gated) + P · mean over l of g_l (1 − g_l) + B · (Σ_l s_l · g_l − k)².

The KL divergence is that of healing, in nats a token. The second term draws each gate to 0 or 1.
The third is the budget: s_l is the block's share of all blocks' parameters, and k what may stay of
them. A block's gate so falls while others may fall too, and is held up where these make it needed.

FoldGPT has no public code, and its abstract leaves open what is in capitals here, that one gate
weighs a whole block, that gates lie between 0 and 1 by being cut off there, and that the least ones
go: these choices are ours.

Shapes: B windows, T tokens, D hidden size, N blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, gcd, prod
from typing import Any

import torch
from torch import nn

from fusegpt_ray.model.compiled import RunBlock
from fusegpt_ray.model.empty import EmptyBlock
from fusegpt_ray.model.memory import empty_cache
from fusegpt_ray.model.recorder import Context
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.model.trunk import Trunk
from fusegpt_ray.samples import Batch
from fusegpt_ray.training.distillation import LogitsKL
from fusegpt_ray.training.finetune import learn
from fusegpt_ray.training.losses import Loss
from fusegpt_ray.training.partition import Partition
from fusegpt_ray.training.span import Learned, Span
from fusegpt_ray.training.states import StatesSource
from fusegpt_ray.training.stepper import TrainingConfig
from fusegpt_ray.training.task import SavedBlocks, TrainingTask
from fusegpt_ray.workers.base import News, TrainingWorker

STEPS = 64
"""At least so many; whole passes over the windows."""
BATCH = 4
"""Windows a step, or fewer where that does not divide them."""
RATE = 0.05
"""Adam's at the beginning; it falls to 0 on a cosine."""
POLARISE, BUDGET = 1.0, 8.0
"""P and B, in nats."""


def batch_of(windows: int) -> int:
    """Windows of a step."""
    return gcd(windows, BATCH)


def passes_over(windows: int) -> int:
    """Passes over so many windows."""
    return ceil(STEPS * batch_of(windows) / windows)


class _Pulled(torch.autograd.Function):
    """A gate cut off at 0 and 1, with a gradient of its own beside the loss's."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, pull: torch.Tensor) -> torch.Tensor:
        ctx.pull = pull
        return gate.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0] + ctx.pull, None


class Gate(nn.Module):
    """One block's gate. The gradients of the two penalties are added where the loss batch's
    gradient enters it, once a step.
    """

    def __init__(
        self,
        number: int,
        shares: torch.Tensor,
        keep: float,
        all_gates: list[nn.Parameter],
        dtype: torch.dtype,
    ) -> None:
        """
        Args:
            shares: s [N], of all blocks, of which this is the one at `number`.
            keep: k.
            all_gates: of all blocks, in order; this one is added.
        """
        super().__init__()
        self.gate = nn.Parameter(torch.ones((), device=shares.device))
        self.number, self.shares_N, self.keep, self.dtype = number, shares, keep, dtype
        self.all_gates = all_gates
        all_gates.append(self.gate)

    def forward(self) -> dict[str, torch.Tensor]:
        gates_N = torch.stack([gate.detach() for gate in self.all_gates]).clamp(0, 1)
        over = (self.shares_N * gates_N).sum() - self.keep
        polarise = POLARISE * (1 - 2 * gates_N[self.number]) / len(gates_N)
        pull = polarise + 2 * BUDGET * over * self.shares_N[self.number]
        gate: torch.Tensor = _Pulled.apply(self.gate, pull)
        return {"gate": gate.to(self.dtype)}


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
        keep, gates = 1 - self.remove / len(blocks), list[nn.Parameter]()
        learned = [{"": Gate(place, shares_N, keep, gates, dtype)} for place in range(len(blocks))]
        own = [contexts[number].to(device) for number in numbers]
        return Span(
            plain, Learned(learned), own, recompute, run, _gated, meta_blocks, list(numbers)
        )

    def loss(self, trunk: Trunk) -> Loss:
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
    worker = TrainingWorker(0, 1, runner.device, None, runner, _unheard)
    try:
        span = learn(worker, model.task(windows), runner.batch_size, runner.batch_size).span
        return [gate.item() for gate in span.learned.parameters()]
    finally:
        worker.memory.clear()
        empty_cache()


def _unheard(news: News) -> None:
    """Nobody waits for an epoch of the gates."""
