"""A model's own forward pass with its decoder blocks replaced by recorders of what they are called
with.

Shapes: B rows, T tokens, D hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Context:
    """What a model calls a block with besides the hidden states: masks, positions, rotary
    embeddings.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    added: torch.Tensor | None = None
    """What the model adds to the states that the block returns, [B, T, D], before the next one:
    features of an image (Qwen3-VL's deep stack). None: nothing."""

    def to(self, device: torch.device | str) -> Context:
        return moved([self], device)[0]


def moved(contexts: Sequence[Context], device: torch.device | str) -> list[Context]:
    """Several contexts on the device. Tensors that they share are shared there, too."""
    known: dict[int, torch.Tensor] = {}

    def move(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in known:
            known[id(tensor)] = tensor.to(device)
        return known[id(tensor)]

    return [
        Context(
            tree_map_only(torch.Tensor, move, context.args),
            tree_map_only(torch.Tensor, move, context.kwargs),
            None if context.added is None else move(context.added),
        )
        for context in contexts
    ]


def states_of(returned: Any) -> torch.Tensor:
    """The hidden states [B, T, D] among what a block returns."""
    h_BTD: torch.Tensor = returned[0] if isinstance(returned, tuple | list) else returned
    return h_BTD


def run_block(block: nn.Module, h_BTD: torch.Tensor, context: Context) -> torch.Tensor:
    """One block's output hidden states [B, T, D], and what the model adds to them."""
    out_BTD = states_of(block(h_BTD, *context.args, **context.kwargs))
    return out_BTD if context.added is None else out_BTD + context.added


class Recorder(nn.Module):
    """Keeps what it is called with; hands the hidden states on, or others instead (`inject`)."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        object.__setattr__(
            self, "_block", block
        )  # not a submodule: its weights are not the trunk's
        self.h_BTD: torch.Tensor | None = None
        self.context: Context | None = None
        self.inject: torch.Tensor | None = None
        self.also: tuple[Any, ...] | None = None
        """What follows the states in the tuple that is returned; None: they are no tuple."""
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        """Models look at attributes of a block, such as its attention type."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not args:
            args = (kwargs.pop("hidden_states"),)
        self.h_BTD, self.context = args[0], Context(args[1:], kwargs)
        self.calls += 1
        out = args[0] if self.inject is None else self.inject
        return out if self.also is None else (out, *self.also)


class Recorded:
    """A model whose blocks are replaced, in place, by recorders."""

    def __init__(self, model: PreTrainedModel, path: str) -> None:
        """`path`: of the blocks' ModuleList in the model."""
        self.model = model
        self.blocks: list[nn.Module] = [*model.get_submodule(path).children()]
        """The model's own blocks, which it no longer holds."""
        self.recorders = [Recorder(block) for block in self.blocks]
        model.set_submodule(path, nn.ModuleList(self.recorders))
        self._knows_returns = False

    def __call__(self, ids_BT: torch.Tensor, **options: Any) -> Any:
        """The model's output; what its blocks would have been called with is in the recorders."""
        if not self._knows_returns:
            self._learn_returns(ids_BT)
        for recorder in self.recorders:
            recorder.calls = 0
        return self.model(input_ids=ids_BT, use_cache=False, **options)

    @property
    def contexts(self) -> list[Context]:
        """By block number, what each was called with in the last pass."""
        found = [recorder.context for recorder in self.recorders]
        assert all(context is not None for context in found)
        return [context for context in found if context is not None]

    @property
    def head(self) -> nn.Module | None:
        """What turns the final states into logits."""
        head = self.model.get_output_embeddings()
        assert head is None or isinstance(head, nn.Module)
        return head

    def not_in_a_row(self) -> str:
        """What the last pass did that running block after block does not; nothing if they agree.

        They do where every block was called once, with just what the one before returned, or with
        that and what is `added` to it.
        """
        for number, recorder in enumerate(self.recorders):
            if not recorder.calls:
                return f"leaves block {number} out where there is text alone"
            if recorder.calls > 1:
                return f"calls block {number} {recorder.calls} times"
            before, context = self.recorders[number - 1], recorder.context
            known = before.context is not None and before.context.added is not None
            if number and recorder.h_BTD is not before.h_BTD and not known:
                return f"changes the hidden states between blocks {number - 1} and {number}"
            if context and any(
                leaf is _MORE for leaf in tree_leaves((context.args, context.kwargs))
            ):
                return f"hands block {number} more of what an earlier block returns than its states"
        return ""

    def learn_added(self, again: Callable[[], object]) -> None:
        """Where the last pass changed the states between two blocks, by an addition, the first of
        the two has it in its context from now on (see `Context.added`).

        What is added is seen where all blocks return zeros: in `again`, the same pass once more.
        """
        entering = [recorder.h_BTD for recorder in self.recorders]
        changed = [n for n, (h, after) in enumerate(pairwise(entering)) if after is not h]
        first = entering[0]
        if not changed or first is None or any(recorder.calls != 1 for recorder in self.recorders):
            return
        contexts, zeros_BTD = self.contexts, torch.zeros_like(first)
        for recorder in self.recorders:
            recorder.inject = zeros_BTD
        try:
            again()
        finally:
            for recorder in self.recorders:
                recorder.inject = None
        for number in changed:
            before, after = entering[number : number + 2]
            added = self.recorders[number + 1].h_BTD
            assert before is not None and after is not None and added is not None
            if torch.equal(before + added, after):
                contexts[number] = replace(contexts[number], added=added)
        for recorder, h_BTD, context in zip(self.recorders, entering, contexts, strict=True):
            recorder.h_BTD, recorder.context = h_BTD, context

    def _learn_returns(self, ids_BT: torch.Tensor) -> None:
        """A pass that stops at the first block finds out what blocks return: later ones rely on
        it.
        """
        first = self.recorders[0]
        stopped_at(first, lambda: self.model(input_ids=ids_BT[:1], use_cache=False))
        assert first.h_BTD is not None and first.context is not None
        returned = empty_call(self.blocks[0], first.h_BTD, first.context)()
        if isinstance(returned, tuple | list):
            also = tuple(item if item is None else _MORE for item in returned[1:])
            for recorder in self.recorders:
                recorder.also = also
        self._knows_returns = True


class _More:
    """Stands for what a block returns besides the states, such as attention weights."""


_MORE = _More()


class _Stop(Exception):
    pass


def stopped_at(module: nn.Module, run: Callable[[], object], before: bool = False) -> None:
    """Run, but only until `module` has been called; or, with `before`, until it would be."""

    def stop(*_: Any) -> None:
        raise _Stop

    register = module.register_forward_pre_hook if before else module.register_forward_hook
    hook = register(stop)
    try:
        run()
    except _Stop:
        pass
    finally:
        hook.remove()


def empty_call(block: nn.Module, h_BTD: torch.Tensor, context: Context) -> Callable[[], Any]:
    """A call of a copy of a block on the meta device: it returns shapes only.

    In bfloat16, for which nearly every kernel has a meta version, or in float32 where a block
    insists; of experts, those that do not depend on which token goes to which.
    """

    def call() -> Any:
        try:
            return _empty(block, h_BTD, context, torch.bfloat16)()
        except RuntimeError:
            return _empty(block, h_BTD, context, torch.float32)()

    return call


def _empty(
    block: nn.Module, h_BTD: torch.Tensor, context: Context, dtype: torch.dtype
) -> Callable[[], Any]:
    def as_meta(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to("meta", dtype if tensor.is_floating_point() else tensor.dtype)

    given = tree_map_only(torch.Tensor, as_meta, (h_BTD, context.args, context.kwargs))
    states, args, kwargs = given
    empty = copy.deepcopy(block).to("meta", dtype)
    for module in empty.modules():
        if has_experts(module):
            module.config._experts_implementation = "batched_mm"

    def call() -> Any:
        with _OneHit():
            return empty(states, *args, **kwargs)

    return call


class _OneHit(TorchDispatchMode):
    """Where a mixture without a kernel for all experts together asks which of them have tokens, the
    first has all: on the meta device there are no values to tell, and it could not be asked.
    """

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is not torch.ops.aten.nonzero.default or not args[0].is_meta:
            return function(*args, **(kwargs or {}))
        mask = args[0]
        if mask.dim() == 1:  # of experts, whose number is looked at
            return torch.zeros(1, 1, dtype=torch.int64)
        return torch.empty(mask.numel(), mask.dim(), dtype=torch.int64, device="meta")


def has_experts(module: nn.Module) -> TypeGuard[Any]:
    """Whether it holds a mixture's experts as transformers keeps them: weights of all in one tensor
    (what its decorator `use_experts_implementation` gives to such a class).
    """
    return hasattr(module, "is_transposed") and hasattr(module, "has_gate")
