"""A span of consecutive blocks whose weights are made of what learns: of low-rank terms, of float32
masters, or of whatever a method invents.

For each loss batch the weights are formed once. All micro-batches then run the plain blocks with
these weights as leaves, and the gradients that arrive at the leaves go back through the forming
once. So what forming costs does not grow with the number of micro-batches, and the blocks that
learn are the very blocks that are scored, evaluated and published.

Shapes: B windows, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fusegpt_ray.model.compiled import CompiledBlock, RunBlock, rehearse
from fusegpt_ray.model.empty import EmptyBlock
from fusegpt_ray.model.recorder import Context, moved, run_block
from fusegpt_ray.model.rows import Own, Owns, all_alike, each

Weights = dict[str, torch.Tensor]
"""Of a block, by parameter name, in the dtype of the arithmetic."""


ITSELF = "_block"
"""What learns of a block's own parameters, which belong to no layer in it, has this path."""


class Learned(nn.Module):
    """All that learns in a span. Called, it forms the weights of each block."""

    def __init__(self, blocks: Sequence[Mapping[str, nn.Module]]) -> None:
        """
        Args:
            blocks: for each block, by the path of a layer in it, a module without inputs that
                returns this layer's parameters by name. It holds its own parameters (ZeRO-3
                gathers what a module itself holds), and they are named as the layer is.
        """
        super().__init__()
        self.blocks = nn.ModuleList(map(_tree, blocks))
        self._paths = [list(block) for block in blocks]

    def forward(self) -> list[Weights]:
        return [
            {
                f"{path}.{key}".lstrip("."): value
                for path in paths
                for key, value in block.get_submodule(path or ITSELF)().items()
            }
            for block, paths in zip(self.blocks, self._paths, strict=True)
        ]


class Span:
    """The blocks, and what learns in them."""

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        learned: Learned,
        contexts: Sequence[Context],
        recompute: bool = False,
        run: RunBlock = run_block,
        gathering: Callable[[RunBlock], RunBlock] = lambda run: run,
        meta_blocks: Sequence[EmptyBlock] = (),
        numbers: Sequence[int] = (),
    ) -> None:
        """
        Args:
            blocks: plain, in eval mode; nothing in them needs a gradient. They lose the weights
                that `learned` forms.
            contexts: what each block is called with besides the states.
            recompute: whether a block's activations are computed again for the backward pass.
            run: runs a block (see `model/compiled.py`).
            gathering: what has to be done around it (see `Partition.run`).
            meta_blocks: of the dense model, which tell how blocks are saved.
            numbers: the blocks' dense numbers, for windows with contexts of their own.
        """
        self.blocks, self.learned, self.contexts = tuple(blocks), learned, contexts
        self.recompute, self._run, self._gathering = recompute, run, gathering
        self.meta_blocks, self._numbers = meta_blocks, numbers
        self.formed: list[torch.Tensor] = []
        """The weights of this loss batch, with the graph that leads to what learns."""
        self.weights: list[nn.Parameter] = []
        """The blocks' own, without it: leaves. Empty between two loss batches."""
        self._gradients: list[torch.Tensor | None] = []

    def form(self, learned: Callable[[], list[Weights]]) -> None:
        """Give the blocks the weights of a loss batch, formed by `learned` (or what wraps it)."""
        self.release()
        weights = learned()
        self.weights = self.weights or self._make_leaves(weights)
        self.formed = [value for block in weights for value in block.values()]
        for leaf, value in zip(self.weights, self.formed, strict=True):
            leaf.data = value.detach()
        self._gradients = [None] * len(self.weights)

    def __call__(self, h_BTD: torch.Tensor, owns: Owns | None = None) -> torch.Tensor:
        """States entering the first block → states leaving the last, with the weights of the loss
        batch; between two of them with those of this moment.

        `owns`: see `Batch`.
        """
        if not self.formed:
            with torch.no_grad():
                self.form(self.learned)
                out_BTD = self(h_BTD, owns)
                self.release()
            return out_BTD
        if owns is not None and not all_alike(owns):
            return each(self._one, h_BTD, owns)
        return self._through(self._run, h_BTD, self.contexts)

    def _one(self, h_1nD: torch.Tensor, own: Own) -> torch.Tensor:
        contexts = moved([own.contexts[number] for number in self._numbers], h_1nD.device)
        return self._through(run_block, h_1nD, contexts)  # of any length: not compiled

    def _through(
        self, run: RunBlock, h_BTD: torch.Tensor, contexts: Sequence[Context]
    ) -> torch.Tensor:
        run = self._gathering(run)
        for block, context in zip(self.blocks, contexts, strict=True):
            if self.recompute and torch.is_grad_enabled():
                # Blocks are in eval mode, so no random state has to be preserved.
                h_BTD = checkpoint(
                    run, block, h_BTD, context, use_reentrant=False, preserve_rng_state=False
                )
            else:
                h_BTD = run(block, h_BTD, context)
        return h_BTD

    def collect(self) -> None:
        """Add the gradients of a micro-batch to those of the loss batch, in float32. The sum is
        rounded to the arithmetic's dtype once, where it enters the forming.
        """
        for number, leaf in enumerate(self.weights):
            gradient, sum_before = leaf.grad, self._gradients[number]
            leaf.grad = None
            if gradient is not None and sum_before is not None:
                gradient = sum_before.float().add_(gradient)
            self._gradients[number] = sum_before if gradient is None else gradient

    def root(self) -> torch.Tensor:
        """A scalar whose backward pass hands the loss batch's gradients to what learns. The blocks
        lose their weights, which the next step changes.
        """
        root = _Root.apply(self._gradients, *self.formed)
        assert isinstance(root, torch.Tensor)
        self.release()
        return root

    def rehearse(self, h_BTD: torch.Tensor, owns: Owns | None = None) -> str:
        """A pass there and back on a GPU before the first step: what has to be compiled is compiled
        now. What cannot be, or has no deterministic kernel, is found out while no other worker
        waits. Returns what there is to tell, or nothing.

        Args:
            h_BTD: states of a micro-batch, of any values.
            owns: see `Batch`.
        """
        told = ""
        if h_BTD.device.type == "cuda" or isinstance(self._run, CompiledBlock):
            rehearse(self._run, lambda: self._there_and_back(h_BTD, owns))
            if isinstance(self._run, CompiledBlock):
                told = self._run.gave_up
        return told

    def _there_and_back(self, h_BTD: torch.Tensor, owns: Owns | None) -> None:
        self.form(self.learned)
        self(h_BTD, owns).sum().backward()
        self.release()

    def _make_leaves(self, weights: Sequence[Weights]) -> list[nn.Parameter]:
        """Parameters in place of the weights that are formed, the same ones in every step."""
        leaves = []
        for block, formed in zip(self.blocks, weights, strict=True):
            for name, value in formed.items():
                path, _, key = name.rpartition(".")
                leaf = nn.Parameter(value.new_empty(0))
                setattr(block.get_submodule(path), key, leaf)
                leaves.append(leaf)
        return leaves

    def release(self) -> None:
        """Let go of the weights, so that the next ones have their memory."""
        for leaf in self.weights:
            leaf.data, leaf.grad = leaf.data.new_empty(0), None
        self.formed, self._gradients = [], []


class _Root(torch.autograd.Function):
    """Zero; its gradient by each tensor is given."""

    @staticmethod
    def forward(
        ctx: Any, gradients: Sequence[torch.Tensor | None], *formed: torch.Tensor
    ) -> torch.Tensor:
        ctx.gradients = gradients
        return torch.zeros((), device=formed[0].device)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (None, *ctx.gradients)


def _tree(modules: Mapping[str, nn.Module]) -> nn.Module:
    """A module with these at their paths."""
    root = nn.Module()
    for path, module in sorted(modules.items()):
        parent = root
        *parents, name = (path or ITSELF).split(".")
        for step in parents:
            if not hasattr(parent, step):
                parent.add_module(step, nn.Module())
            parent = getattr(parent, step)
        parent.add_module(name, module)
    return root
