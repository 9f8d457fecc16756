"""A block without weights, and the two forms of its weights: the tensors that a checkpoint keeps,
and the parameters that its class has.

They differ where transformers rearranges tensors on loading: mixtures of experts mostly have a
tensor for each expert on disk and one of all experts, [E, …], in the class. A stack refers to what
is on disk, so that blocks are dropped and published as they are. Tensors become parameters where a
block is read, and parameters become tensors again where a trained block is saved.

Notable: a tensor that stays what it is goes by its parameter's name in the block, as in most
models all do. One that is converted goes by the name that it has before that, such as
`mlp.experts.0.up_proj.weight`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from fusegpt_ray.model.names import Names, Tensors
from fusegpt_ray.model.stack import Refs
from fusegpt_ray.store.checkpoint import read_tensors


@dataclass(frozen=True)
class Conversion:
    """One run of a converter within a block."""

    pattern: str
    keys: tuple[str, ...]
    """Of the tensors that it takes."""
    makes: Tensors
    """The parameters that it makes, without values."""


@dataclass(frozen=True)
class EmptyBlock:
    """A block of the dense model on the meta device, and how it is stored."""

    module: nn.Module
    path: str
    """Of the block in the model, such as `model.layers.3`."""
    names: Names
    reading: Callable[[Refs], Tensors] = read_tensors
    """Reads all tensors of a block: to wherever blocks are needed (see `Runner.meta_blocks`)."""

    def parameters(self, stored: Tensors) -> Tensors:
        """Its parameters by name in the block, of tensors as they are stored."""
        if not self.names.converters:
            return stored
        whole = {f"{self.path}.{key}": value for key, value in stored.items()}
        return self._own(self.names.convert(whole, self.names.renamed_destination))

    def read(self, refs: Refs, wanted: Collection[str] | None = None) -> Tensors:
        """Its parameters, in their stored dtypes; or only the `wanted` ones, then on the CPU."""
        if wanted is None:
            return self.parameters(self.reading(refs))
        keys = self.sources(refs, wanted)
        made = self.parameters(read_tensors({key: refs[key] for key in keys}))
        return {name: made[name] for name in wanted}

    def sources(self, refs: Refs, wanted: Collection[str]) -> list[str]:
        """The stored tensors that these parameters are made of."""
        keys: dict[str, tuple[str, ...]] = {name: (name,) for name in refs}
        for conversion in self.conversions(refs):
            keys |= dict.fromkeys(conversion.makes, conversion.keys)
        return list(dict.fromkeys(key for name in wanted for key in keys[name]))

    def stored(self, parameters: Tensors, refs: Refs) -> Tensors:
        """The tensors of which these parameters are made, by the names they have in `refs`: what
        the block is stored as now. Of a tensor that holds other parameters too, those are read.
        """
        left, tensors = dict(parameters), dict[str, torch.Tensor]()
        for conversion in self.conversions(refs):
            if not left.keys() & conversion.makes.keys():
                continue
            others = conversion.makes.keys() - left.keys()
            made = {
                **self.read(refs, others),
                **{key: left.pop(key) for key in conversion.makes if key in left},
            }
            whole = {f"{self.path}.{name}": value for name, value in made.items()}
            found = self._own(self.names.revert(conversion.pattern, whole))
            assert found.keys() == {*conversion.keys}, (sorted(found), conversion.keys)
            tensors |= found
        assert left.keys() <= refs.keys(), sorted(left.keys() - refs.keys())
        return {**left, **tensors}

    def conversions(self, refs: Refs) -> Iterator[Conversion]:
        """What is done with tensors of these shapes before they are the block's parameters."""
        groups: dict[str, tuple[str, list[str]]] = {}
        for key in refs if self.names.converters else ():
            where = self.names.renamed_destination(f"{self.path}.{key}")
            if where.pattern is not None:
                groups.setdefault(where.inside, (where.pattern, []))[1].append(key)
        for pattern, keys in groups.values():
            empty = {key: torch.empty(refs[key].shape, device="meta") for key in keys}
            yield Conversion(pattern, tuple(keys), self.parameters(empty))

    def filled(self, parameters: Tensors, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """A block of its own with these parameters: themselves where they are on `device` in
        `dtype` already.
        """
        block = copy.deepcopy(self.module)  # of empty tensors: a millisecond
        assign(block, parameters, device, dtype)
        return block.to(device)

    def _own(self, tensors: Tensors) -> Tensors:
        return {name.removeprefix(f"{self.path}."): value for name, value in tensors.items()}


def empty_blocks(names: Names, path: str, blocks: Collection[nn.Module]) -> list[EmptyBlock]:
    """The blocks of the ModuleList at `path`, by number."""
    return [EmptyBlock(block, f"{path}.{number}", names) for number, block in enumerate(blocks)]


def load_block(
    empty: EmptyBlock,
    stored: Tensors,
    device: torch.device,
    dtype: torch.dtype,
) -> nn.Module:
    """A block of its own with these tensors, as they are stored: `empty` is
    `Trunk.meta_blocks[dense]`.

    Weights that are on `device` in `dtype` already are not copied, unless they are converted.
    """
    there = {name: in_arithmetic(value.to(device), dtype) for name, value in stored.items()}
    return empty.filled(empty.parameters(there), device, dtype)


def in_arithmetic(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A weight in the dtype to compute in; what is not floating stays as it is."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def assign(
    module: nn.Module,
    weights: Mapping[str, torch.Tensor],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Put weights on `device` in place of meta parameters: themselves where they are there in the
    right dtype.
    """
    known = {
        name: in_arithmetic(tensor.to(device), dtype)  # cast there, where it takes no time
        for name, tensor in weights.items()
    }
    module.load_state_dict(known, strict=False, assign=True)
    module.requires_grad_(False)
