"""What an architecture does with its blocks, found on an empty model: before any weight is read.

A checkpoint can be walked block by block only if its class calls every block once, in order, each
with the hidden states of the one before and otherwise with what no other block has changed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten
from transformers import PreTrainedModel

from fusegpt_ray.errors import UserError, first_line, reading_users_file
from fusegpt_ray.model.architecture import find_blocks
from fusegpt_ray.model.config import KEY, build_skeleton
from fusegpt_ray.model.operations import Operations
from fusegpt_ray.model.recorder import Context, Recorded, empty_call, states_of, stopped_at

TOKENS = 8
"""Tokens a row of the passes through an empty model."""
_ROWS = 10_000_000
"""More than any vocabulary has."""
_NO_VALUES = ("meta tensor", "torch.nonzero()", "expected device meta")
"""In what torch says where the values of an empty tensor are asked for."""
LOOKS_AT_VALUES = (
    "its blocks look at values while they run, such as how many tokens go to an expert, so that"
    " what they compute cannot be checked before weights are read"
)
"""The problem with such a model."""
_FIX = "use a decoder-only model that transformers runs block after block (LLaMA, Mistral, Qwen, …)"


@dataclass(frozen=True)
class Structure:
    """A model's blocks without weights, and what its forward pass calls them with."""

    name: str
    """Of the model's class."""
    blocks: list[nn.Module]
    contexts: list[Context]
    """By block, for two rows of `TOKENS` tokens; real values, but for what comes of weights."""
    h_BTD: torch.Tensor
    """States as they enter a block."""
    trunk: dict[str, tuple[int, ...]]
    """The shapes of all tensors that are not a block's, by name."""
    after: list[Any]
    """The operations between the last block and the head, as `Operations` notes them."""
    by_sample: bool
    """Whether blocks are called with what depends on the tokens (see `rows.py`)."""

    @property
    def calls(self) -> list[tuple[nn.Module, torch.Tensor, Context]]:
        """By block, what it is called with."""
        return [
            (block, self.h_BTD, context)
            for block, context in zip(self.blocks, self.contexts, strict=True)
        ]


def observe(raw: Mapping[str, Any]) -> Structure:
    """The structure of the model that a config.json describes.

    Raises:
        UserError: it cannot be built, or not be walked block by block; the message says why.
    """
    model = build_skeleton(raw)
    name = type(model).__name__
    path = find_blocks(model)
    _check_untied(model, path)
    with running(name):
        recorded = Recorded(model, path)
        trunk = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        filled_without_memory(model)
        zeros = torch.zeros(2, TOKENS, dtype=torch.int64)
        with _of_text(recorded):
            after = _pass(recorded, zeros)
        if problem := recorded.not_in_a_row():
            raise UserError(KEY, name, f"its forward pass {problem}", _FIX)
        contexts = recorded.contexts
        h_BTD = recorded.recorders[0].h_BTD
        assert h_BTD is not None
        if h_BTD.dim() != 3 or h_BTD.shape[:2] != zeros.shape:
            problem = f"what passes from block to block is {list(h_BTD.shape)}, not the hidden"
            problem += f" states of {zeros.shape[0]} rows of {zeros.shape[1]} tokens"
            raise UserError(KEY, name, problem, _FIX)
        _pass(recorded, 3 + torch.arange(2 * TOKENS).reshape(2, TOKENS))
        if by_sample := not all(map(same, contexts, recorded.contexts)):
            _check_alone(name, recorded.blocks, h_BTD, contexts)
    return Structure(name, recorded.blocks, contexts, h_BTD, trunk, after, by_sample)


def _check_untied(model: PreTrainedModel, path: str) -> None:
    """
    Raises:
        UserError: blocks share weights with one another, which a checkpoint holds once.
    """
    in_block = re.compile(rf"{re.escape(path)}\.(\d+)\.")
    for pair in model.all_tied_weights_keys.items():
        first, second = map(in_block.match, pair)
        if first and second and first[1] != second[1]:
            problem = f"its blocks {second[1]} and {first[1]} share weights, so that neither can be"
            problem += " removed or trained alone"
            fix = "use an architecture whose blocks have weights of their own"
            raise UserError(KEY, type(model).__name__, problem, fix)


@contextmanager
def running(name: str) -> Iterator[None]:
    """While blocks run without weights.

    Raises:
        UserError: one cannot.
    """
    try:
        with reading_users_file(KEY, name, "its blocks cannot be run one by one", _FIX):
            yield
    except UserError as error:
        if not _asks_for_values(error.__cause__):
            raise
        raise UserError(KEY, name, LOOKS_AT_VALUES, _FIX) from error


@contextmanager
def _of_text(recorded: Recorded) -> Iterator[None]:
    """While a model sees a text's tokens for the first time.

    Raises:
        UserError: it asks for more, such as images, before it comes to its blocks.
    """
    try:
        yield
    except Exception as error:  # whatever a class raises is its word on what it is given
        if recorded.recorders[0].calls or _asks_for_values(error):
            raise
        name = type(recorded.model).__name__
        problem = f"it does not run on the tokens of a text alone ({first_line(error)})"
        fix = "use a model that runs on text by itself, as LLaVA does"
        raise UserError(KEY, name, problem, fix) from error


def _asks_for_values(error: BaseException | None) -> bool:
    return any(said in str(error) for said in _NO_VALUES)


def _check_alone(
    name: str, blocks: list[nn.Module], h_BTD: torch.Tensor, contexts: list[Context]
) -> None:
    """Blocks that are called with what depends on the tokens (see `rows.py`) may take in it what
    only the blocks before them have put there.

    Raises:
        UserError: a block does not run without the others, or does not return states.
    """
    for number, (block, context) in enumerate(zip(blocks, contexts, strict=True)):
        problem = f"block {number} cannot be run without those before it"
        with reading_users_file(KEY, name, problem, _FIX):
            out = empty_call(block, h_BTD, context)()
        out_BTD = states_of(out)
        if out_BTD.shape != h_BTD.shape:
            problem = f"block {number} makes {list(out_BTD.shape)} of {list(h_BTD.shape)}"
            raise UserError(KEY, name, problem, _FIX)


@torch.no_grad()
def _pass(recorded: Recorded, ids_BT: torch.Tensor) -> list[Any]:
    """One pass up to the head, whose product would need memory as large as its weight; returns the
    operations that follow the last block.
    """
    head, operations = recorded.head, Operations()
    with ExitStack() as until_head:

        def begin(*_: object) -> None:
            until_head.enter_context(operations)

        hook = recorded.recorders[-1].register_forward_hook(begin)
        until_head.callback(hook.remove)
        if head is None:
            recorded(ids_BT)
        else:
            stopped_at(head, lambda: recorded(ids_BT), before=True)
    return operations.seen


def filled_without_memory(model: nn.Module, scale: float = 1.0) -> None:
    """Values for the empty parameters: one random number a row, which stands for the whole row.

    So each token has an embedding of its own, and what comes of it can be told from that of others.
    """
    generator = torch.Generator().manual_seed(0)
    for name, empty in list(model.named_parameters()):
        owner, _, key = name.rpartition(".")
        many = (
            empty.shape[:1] if empty.shape[:1].numel() <= _ROWS else (1,)
        )  # or it would need memory
        rows = torch.randn((*many, *(1,) * (empty.dim() - 1)), generator=generator)
        filled = (scale * rows).expand(empty.shape)
        setattr(model.get_submodule(owner), key, nn.Parameter(filled, requires_grad=False))


def same(first: object, second: object) -> bool:
    """Whether two contexts, or parts of them, hold equal values."""
    if isinstance(first, Context) and isinstance(second, Context):
        mine, other = ((each.args, each.kwargs, each.added) for each in (first, second))
        return same(mine, other)
    (left, form), (right, other_form) = tree_flatten(first), tree_flatten(second)
    return form == other_form and all(map(_same_leaf, left, right))


def _same_leaf(first: object, second: object) -> bool:
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        if first.is_meta or second.is_meta or first.shape != second.shape:
            return first.shape == second.shape and first.dtype == second.dtype
        return torch.equal(first, second)
    plain = isinstance(first, bool | int | float | str | None)
    return type(first) is type(second) and (not plain or first == second)
