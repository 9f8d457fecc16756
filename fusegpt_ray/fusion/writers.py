"""The layers by which a block writes to the residual stream, and a block in which they are zero: it
hands on the states that enter it.

They are found by trying. An empty block is filled with random values, and all its linear layers
with as many outputs as the hidden size are set to zero. If it then returns exactly what enters it,
the layers get their values back one after another, in the order in which they are called, as long
as that stays so. Those that stay zero are the last of each branch: o_proj and down_proj, say,
whatever an architecture calls them.

In the same way those are found that have to be zero for a block to treat each token by itself: the
last of its attention.

Shapes: B rows, T tokens, D hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from fusegpt_ray.errors import UserError, reading_users_file
from fusegpt_ray.fusion.linear import bias_of, sizes
from fusegpt_ray.fusion.student import expert_layers, linear_layers
from fusegpt_ray.model.config import KEY
from fusegpt_ray.model.empty import EmptyBlock
from fusegpt_ray.model.recorder import Context, has_experts, run_block
from fusegpt_ray.model.stack import Refs
from fusegpt_ray.model.structure import Structure, filled_without_memory

SCALE = 0.02
"""Of the random values: small, so that nothing overflows in a wide block."""
_FIX = "use method: dus, whose new blocks are copies as they are"
_NO_MLP = "use fusion.light: block"

Run = Callable[[torch.Tensor], torch.Tensor]
"""States that enter a block → those that leave it."""
Kept = Callable[[Run, torch.Tensor], bool]
"""What is to be so of a block, tried with these states."""


def writers(structure: Structure, numbers: Sequence[int]) -> dict[int, list[str]]:
    """The parameters of the layers by which these blocks write to the residual stream, by number.

    Raises:
        UserError: a block does not hand on its states with these at zero, whichever they are; as
            where a norm follows the sum.
    """
    known: dict[str, list[str]] = {}
    found = {}
    for number in sorted({*numbers}):
        block, h_BTD, context = structure.calls[number]
        kind = f"{block} {[(name, tuple(p.shape)) for name, p in block.named_parameters()]}"
        if kind not in known:
            what = f"block {number} cannot be tried with output layers at zero"
            with reading_users_file(KEY, structure.name, what, _FIX):
                names = _least_zero(block, h_BTD, context, _hands_on)
            if not names:
                problem = (
                    f"with its linear layers at zero, block {number} does not hand on its states"
                    " as they are, so no new block can begin as nothing"
                )
                raise UserError(KEY, structure.name, problem, _FIX)
            known[kind] = names
        found[number] = known[kind]
    return found


def mixers(structure: Structure, number: int) -> list[str]:
    """The parameters of the layers by which this block adds to a token's states what it read of
    others: the last of its attention. With these at zero, an MLP is left.

    Raises:
        UserError: there are none, or nothing is left with them at zero.
    """
    block, h_BTD, context = structure.calls[number]
    what = f"block {number} cannot be tried with its attention's output at zero"
    with reading_users_file(KEY, structure.name, what, _NO_MLP):
        names = _least_zero(block, h_BTD, context, _token_by_token)
        every = _least_zero(block, h_BTD, context, _hands_on)
    if not names or {*names} >= {*every} != set():
        problem = (
            f"no layers were found in block {number} that leave an MLP when they are zero, and an"
            " MLP is what fusion.light asks for"
        )
        raise UserError(KEY, structure.name, problem, _NO_MLP)
    return names


def zeros(empty: EmptyBlock, names: Sequence[str], refs: Refs) -> Mapping[str, torch.Tensor]:
    """Of these parameters, as the block is stored."""
    shapes = {name: value.shape for name, value in empty.module.named_parameters()}
    parameters = {}
    for name in names:
        dtype = refs[empty.sources(refs, [name])[0]].dtype
        parameters[name] = torch.zeros(shapes[name], dtype=dtype)
    return empty.stored(parameters, refs)


@torch.no_grad()
def _least_zero(block: nn.Module, h_BTD: torch.Tensor, context: Context, kept: Kept) -> list[str]:
    """The parameters of the last layers that have to be zero for this to be so; nothing, if it is
    not so with all of them at zero.
    """
    tried = copy.deepcopy(block)
    filled_without_memory(tried, SCALE)
    for module in tried.modules():
        if has_experts(module):
            module.config._experts_implementation = "eager"
    h_BTD = torch.randn(h_BTD.shape, generator=torch.Generator().manual_seed(1))
    layers = _candidates(tried, h_BTD.shape[-1])
    order = _call_order(tried, layers, lambda: run_block(tried, h_BTD, context))
    values = {name: tried.get_parameter(name).data for names in layers.values() for name in names}

    def so() -> bool:
        return kept(lambda entering_BTD: run_block(tried, entering_BTD, context), h_BTD)

    def set_to(names: Sequence[str], zero: bool) -> None:
        for name in names:
            data = values[name]
            tried.get_parameter(name).data = torch.zeros(()).expand(data.shape) if zero else data

    for layer in order:
        set_to(layers[layer], zero=True)
    if not so():
        return []
    stay = []
    for layer in order:
        set_to(layers[layer], zero=False)
        if not so():
            set_to(layers[layer], zero=True)
            stay += layers[layer]
    return stay


def _hands_on(run: Run, h_BTD: torch.Tensor) -> bool:
    """Whether what leaves is what entered, to the last bit."""
    return torch.equal(run(h_BTD), h_BTD)


def _token_by_token(run: Run, h_BTD: torch.Tensor) -> bool:
    """Whether the states of the other tokens do not depend on those of the first."""
    other_BTD = h_BTD.clone()
    other_BTD[:, 0] = -h_BTD[:, 0]
    return torch.equal(run(h_BTD)[:, 1:], run(other_BTD)[:, 1:])


def _candidates(block: nn.Module, width: int) -> dict[str, list[str]]:
    """The names of each layer's parameters, of layers with so many outputs; of experts' by the path
    of the module and their name in it.
    """
    found = {}
    for path, layer in linear_layers(block):
        if sizes(layer)[0] == width:
            found[path] = [f"{path}.{key}" for key, _ in layer.named_parameters(recurse=False)]
    for path, experts in expert_layers(block).items():
        for key, one in experts.items():
            if sizes(one)[1] == width:
                keys = [key] if one.bias is None else [key, bias_of(key)]
                found[f"{path}.{key}"] = [f"{path}.{name}".lstrip(".") for name in keys]
    return found


def _call_order(
    block: nn.Module, layers: Mapping[str, Sequence[str]], run: Callable[[], object]
) -> list[str]:
    """The layers in the order of their first calls; those of one module of experts in that of their
    definition.
    """
    called: list[str] = []
    owners = {names[0].rpartition(".")[0] for names in layers.values()}

    def note(owner: str) -> Callable[..., None]:
        return lambda *_: called.append(owner)

    hooks = [block.get_submodule(path).register_forward_hook(note(path)) for path in owners]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    first = {owner: place for place, owner in reversed([*enumerate(called)])}
    used = [name for name in layers if layers[name][0].rpartition(".")[0] in first]
    return sorted(used, key=lambda name: first[layers[name][0].rpartition(".")[0]])
