"""Runs the trunk (embeddings, final norm, head) of a model without its blocks.

What a block is called with (masks, rotary embeddings, differing by layer) is recorded from the
model's own forward pass.

Shapes: B rows (windows, or windows × candidates), T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fusegpt_ray.errors import UserError
from fusegpt_ray.model.architecture import find_blocks
from fusegpt_ray.model.config import KEY, build_skeleton
from fusegpt_ray.model.device import deterministic_or_not
from fusegpt_ray.model.empty import assign, empty_blocks, in_arithmetic
from fusegpt_ray.model.names import Names
from fusegpt_ray.model.recorder import Context, Recorded
from fusegpt_ray.model.stack import Refs, Stack
from fusegpt_ray.model.structure import TOKENS, same
from fusegpt_ray.store.checkpoint import read_tensors

Read = Callable[[Refs], Mapping[str, torch.Tensor]]


class Trunk:
    """All of the model but its blocks, loaded: embeds tokens, tells the blocks' contexts, turns
    final states into logits.
    """

    def __init__(
        self, stack: Stack, device: torch.device, dtype: torch.dtype, read: Read = read_tensors
    ) -> None:
        self.device, self.dtype = device, dtype
        self._config = stack.config
        self.model = build_skeleton(stack.config)
        names, path = Names.of(self.model), find_blocks(self.model)
        self._recorded = Recorded(self.model, path)
        self.meta_blocks = empty_blocks(names, path, self._recorded.blocks)
        """The dense model's blocks, by dense number, without weights, for `load_block` to fill."""
        assign(self.model, names.convert(read(stack.trunk)), device, dtype)
        # As from_pretrained does it: what is tied is decided by the tensors that are there, too.
        missing = {name for name, value in self.model.named_parameters() if value.is_meta}
        self.model.tie_weights(missing_keys=missing, recompute_mapping=False)
        self.model.to(device)
        self._contexts: dict[tuple[int, int], list[Context]] = {}
        self._by_sample: bool | None = None

    @torch.no_grad()
    def embed(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, T, D] entering the first block. Those of padding are any token's."""
        self._forward(ids_BT.clamp(min=0), logits_to_keep=1)
        h_BTD = self._recorded.recorders[0].h_BTD
        assert h_BTD is not None
        return h_BTD

    @torch.no_grad()
    def contexts(self, rows: int, length: int) -> list[Context]:
        """By dense block number, what each block is called with for `rows` rows of `length` tokens
        without padding.
        """
        if (rows, length) not in self._contexts:
            self._forward(torch.zeros(rows, length, dtype=torch.int64), logits_to_keep=1)
            self._contexts[rows, length] = self._recorded.contexts
        return self._contexts[rows, length]

    @property
    def by_sample(self) -> bool:
        """Whether blocks are called with something that depends on the tokens themselves, so that
        `contexts` is not what they are called with.
        """
        if self._by_sample is None:
            passes = []
            for first in (0, 1):
                ids_1n = torch.arange(first, first + TOKENS)[None] % self._vocabulary
                passes.append(self.enter(ids_1n, {})[1])
            self._by_sample = not all(map(same, *passes))
        return self._by_sample

    @torch.no_grad()
    def enter(
        self, ids_1n: torch.Tensor, inputs: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, list[Context]]:
        """For one sample without padding, the states [1, n, D] that enter the first block, and by
        dense block number what each block is called with.

        Args:
            inputs: what else the model's class takes, such as pixels.

        Raises:
            UserError: with such inputs, the class does not call block after block.
        """
        given = {
            name: in_arithmetic(value.to(self.device), self.dtype) for name, value in inputs.items()
        }
        run = partial(self._forward, ids_1n, logits_to_keep=1, **given)
        run()
        self._recorded.learn_added(run)
        if problem := self._recorded.not_in_a_row():
            name = type(self.model).__name__
            fix = "calibrate it on text alone"
            which = "with images, its" if inputs else "its"
            raise UserError(KEY, name, f"{which} forward pass {problem}", fix)
        h_1nD = self._recorded.recorders[0].h_BTD
        assert h_1nD is not None
        return h_1nD, self._recorded.contexts

    @property
    def _vocabulary(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)

    @torch.no_grad()
    def logits(self, h_BTD: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, V] of the states after the last block (before the final norm)."""
        return self.head(h_BTD)

    def head(self, h_BTD: torch.Tensor) -> torch.Tensor:
        """As `logits`, with the graph that leads back to the states."""
        last = self._recorded.recorders[-1]
        last.inject = h_BTD.to(self.device)  # states of a walk may wait on the host
        try:
            return self._forward(torch.zeros(h_BTD.shape[:2], dtype=torch.int64))
        finally:
            last.inject = None

    def with_blocks(self, blocks: Sequence[nn.Module]) -> PreTrainedModel:
        """The whole model as transformers has it, for what it does itself, such as `generate`. Its
        weights are the trunk's and the blocks' own, not copies.
        """
        model = build_skeleton(self._config)
        model.set_submodule(find_blocks(model), nn.ModuleList(blocks))
        assign(model, self.model.state_dict(), self.device, self.dtype)
        return model.to(self.device)

    def _forward(self, ids_BT: torch.Tensor, **options: Any) -> torch.Tensor:
        ids_BT = ids_BT.to(self.device)
        return deterministic_or_not(lambda: self._recorded(ids_BT, **options)).logits
