"""Runs the trunk (embeddings, final norm, head) of a model without its blocks, and one block alone.

What a block is called with (masks, rotary embeddings, differing by layer) is recorded from the model's own forward pass.

Shapes: B rows (windows, or windows × candidates), T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import rename_source_key

from fusegpt_ray.model.anatomy import find_blocks
from fusegpt_ray.model.config import build_skeleton
from fusegpt_ray.model.stack import Refs, Stack
from fusegpt_ray.store.checkpoint import read_tensors

Read = Callable[[Refs], Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class Context:
    """What a model calls a block with besides the hidden states: masks, positions, rotary embeddings."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def to(self, device: torch.device | str) -> Context:
        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device)

        return Context(tree_map_only(torch.Tensor, move, self.args), tree_map_only(torch.Tensor, move, self.kwargs))


def run_block(block: nn.Module, h_BTD: torch.Tensor, context: Context) -> torch.Tensor:
    """One block's output hidden states [B, T, D]."""
    out = block(h_BTD, *context.args, **context.kwargs)
    return out[0] if isinstance(out, tuple) else out


class _Splice(nn.Module):
    """Stands in for a block: keeps what it is called with, hands the hidden states on (or others, `inject`)."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "_block", block)  # not a submodule: its weights are not the trunk's
        self.h_BTD: torch.Tensor | None = None
        self.context: Context | None = None
        self.inject: torch.Tensor | None = None
        self.returns_tuple = False

    def __getattr__(self, name: str) -> Any:  # models look at attributes of a block, such as its attention type
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not args:
            args = (kwargs.pop("hidden_states"),)
        self.h_BTD, self.context = args[0], Context(args[1:], kwargs)
        out = args[0] if self.inject is None else self.inject
        return (out,) if self.returns_tuple else out


def _returns_tuple(block: nn.Module, h_BTD: torch.Tensor, context: Context) -> bool:
    """Whether this architecture's blocks return a tuple, found by running one on the meta device (shapes only)."""
    at = context.to("meta")
    return isinstance(copy.deepcopy(block).to("meta")(h_BTD.to("meta"), *at.args, **at.kwargs), tuple)


class Trunk:
    """All of the model but its blocks, loaded: embeds tokens, tells the blocks' contexts, turns final states into logits."""

    def __init__(self, stack: Stack, device: torch.device, dtype: torch.dtype, read: Read = read_tensors) -> None:
        self.device, self.dtype = device, dtype
        self.model = build_skeleton(stack.config)
        path = find_blocks(self.model)
        self.moulds: list[nn.Module] = list(self.model.get_submodule(path))
        """The dense model's blocks, by dense number, without weights, for `load_block` to fill."""
        self.splices = [_Splice(block) for block in self.moulds]
        self.model.set_submodule(path, nn.ModuleList(self.splices))
        expected = self.model.state_dict()
        renamings = get_model_conversion_mapping(self.model)
        weights = {
            rename_source_key(name, renamings, [], self.model.base_model_prefix, expected)[0]: tensor
            for name, tensor in read(stack.trunk).items()
        }
        _assign(self.model, weights, dtype)
        self.model.tie_weights()
        self.model.to(device)
        self._contexts: dict[tuple[int, int], list[Context]] = {}

    @torch.no_grad()
    def embed(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, T, D] entering the first block."""
        self._forward(ids_BT, logits_to_keep=1)
        h_BTD = self.splices[0].h_BTD
        assert h_BTD is not None
        return h_BTD

    @torch.no_grad()
    def contexts(self, rows: int, length: int) -> list[Context]:
        """By dense block number, what each block is called with for `rows` rows of `length` tokens without padding."""
        if (rows, length) not in self._contexts:
            self._forward(torch.zeros(rows, length, dtype=torch.int64), logits_to_keep=1)
            contexts = [splice.context for splice in self.splices if splice.context is not None]
            self._contexts[rows, length] = contexts
        return self._contexts[rows, length]

    @torch.no_grad()
    def logits(self, h_BTD: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, V] of the states after the last block (before the final norm)."""
        self.splices[-1].inject = h_BTD
        try:
            ids_BT = torch.zeros(h_BTD.shape[:2], dtype=torch.int64)
            return self._forward(ids_BT)
        finally:
            self.splices[-1].inject = None

    def _forward(self, ids_BT: torch.Tensor, **options: Any) -> torch.Tensor:
        first = self.splices[0]
        if first.context is None:  # the first pass finds out what blocks return, then stops: later ones rely on it
            hook = first.register_forward_hook(_stop)
            try:
                self.model(input_ids=ids_BT[:1, :2].to(self.device), use_cache=False)
            except _Stop:
                pass
            finally:
                hook.remove()
            assert first.h_BTD is not None and first.context is not None
            as_tuple = _returns_tuple(self.moulds[0], first.h_BTD, first.context)
            for splice in self.splices:
                splice.returns_tuple = as_tuple
        return self.model(input_ids=ids_BT.to(self.device), use_cache=False, **options).logits


class _Stop(Exception):
    pass


def _stop(*_: Any) -> None:
    raise _Stop


def load_block(mould: nn.Module, weights: Mapping[str, torch.Tensor], device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A block of its own with these weights: `mould` is `Trunk.moulds[dense]`."""
    block = copy.deepcopy(mould)
    _assign(block, weights, dtype)
    return block.to(device)


def _assign(module: nn.Module, weights: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Put weights in place of meta parameters, cast to `dtype` where they are floating."""
    known = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    module.load_state_dict(known, strict=False, assign=True)
    module.requires_grad_(False)
