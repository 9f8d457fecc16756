"""The student of a round: the group without the donor, its linear layers fused; and its way back to
plain weights.

Notable: everything that learns starts from a generator seeded by (seed, donor, block), never by the
order in which things are built.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fusegpt_ray.fusion.linear import Frozen, FusedLinear, Linear
from fusegpt_ray.model.stack import Block, Refs
from fusegpt_ray.model.empty import EmptyBlock, in_arithmetic
from fusegpt_ray.store.checkpoint import read_tensors
from fusegpt_ray.training.masters import Masters


@dataclass(frozen=True)
class FusionConfig:
    """How a student is made: ranks, dtypes and seed."""

    rank: int
    lora_rank: int
    seed: int
    compute_dtype: torch.dtype
    trained_dtype: torch.dtype


def terms_of(neighbour: Block, donor: Block | None) -> tuple[Refs, tuple[Refs, ...]]:
    """A neighbour's frozen weights and its donors' in order, `donor` last. A donor that was itself
    fused counts as plain weights.
    """
    base = neighbour.terms.base if neighbour.terms else neighbour.weights
    donors = neighbour.terms.donors if neighbour.terms else ()
    return base, (*donors, donor.weights) if donor is not None else donors


def build_block(
    meta_block: nn.Module,
    neighbour: Block,
    donor: Block | None,
    config: FusionConfig,
    device: torch.device,
    donors: DonorCache,
    label: object,
) -> tuple[nn.Module, dict[str, nn.Module]]:
    """One neighbour as a plain block, and what learns in it by layer: LoRA, fused terms and norm
    weights.

    What it learned before is kept.

    Args:
        donor: the block to fuse into it.
        label: seeds what learns, beside the neighbour's number.
    """
    base, donor_refs = terms_of(neighbour, donor)
    stored = read_tensors(base)
    block = load_block(meta_block, stored, device, config.compute_dtype)
    learned: dict[str, nn.Module] = {}
    for name, own in linear_layers(block):
        learned[name] = FusedLinear(
            own,
            [_layer(name, like(name, base, refs), donors.get(refs)) for refs in donor_refs],
            config.rank,
            config.lora_rank,
            config.trained_dtype,
            seeded(config.seed, label, neighbour.dense, name),
        )
    for name, norm in block.named_modules():
        if is_norm(norm) and (keys := [key for key, _ in norm.named_parameters(recurse=False)]):
            values = {key: stored[f"{name}.{key}"] for key in keys}
            masters = {key: v.to(device, config.trained_dtype) for key, v in values.items()}
            learned[name] = Masters(masters, config.compute_dtype)
    if neighbour.terms:
        _load(learned, read_tensors(neighbour.terms.learned))
    return block, learned


@torch.no_grad()
def _load(learned: Mapping[str, nn.Module], values: Mapping[str, torch.Tensor]) -> None:
    """Go on from what was learned before; terms that are new keep their start."""
    for name, value in values.items():
        path, _, key = name.rpartition(".")
        learned[path].get_parameter(key).copy_(value)


def like(name: str, base: Refs, donor: Refs) -> tuple[str, ...]:
    """The tensors of the linear layer `name` that a donor can give to the one in `base`.

    None where its own is missing or of another shape. The blocks of a hybrid model differ in kind
    (attention in some, a recurrence in others), and only layers alike can be fused.
    """
    weight, bias = f"{name}.weight", f"{name}.bias"
    if weight not in donor or donor[weight].shape != base[weight].shape:
        return ()
    return (weight, bias) if bias in base and bias in donor else (weight,)


def _layer(name: str, keys: Sequence[str], tensors: Mapping[str, torch.Tensor]) -> Frozen | None:
    bias = f"{name}.bias"
    return (tensors[f"{name}.weight"], tensors[bias] if bias in keys else None) if keys else None


class DonorCache:
    """Donor blocks' tensors by where they lie: neighbours fused with one donor share one copy of
    it.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._blocks: dict[tuple[object, ...], dict[str, torch.Tensor]] = {}

    def get(self, refs: Refs) -> Mapping[str, torch.Tensor]:
        key = tuple(refs[name] for name in sorted(refs))
        if key not in self._blocks:
            stored = read_tensors(refs)
            self._blocks[key] = {
                name: in_arithmetic(value.to(self.device), self.dtype)
                for name, value in stored.items()
            }
        return self._blocks[key]


def learned_tensors(learned: nn.Module) -> dict[str, torch.Tensor]:
    """Everything that learns in a block, by parameter name, on the CPU."""
    return {name: value.detach().cpu() for name, value in learned.named_parameters()}


@torch.no_grad()
def folded_tensors(
    learned: nn.Module, neighbour: Block, donor: Block | None
) -> dict[str, torch.Tensor]:
    """The plain weights of all that fine-tuning changed, what was learned folded in, on the CPU.

    What is learned is added to the weights as they are stored, not as the arithmetic rounded them
    (and in the wider of both dtypes): a float16 checkpoint fine-tuned in bfloat16 keeps its own
    weights' precision. `donor`: of this round, if it is fused.
    """
    base, donors = terms_of(neighbour, donor)
    out = {}
    for name, module in learned.named_modules():
        if isinstance(module, FusedLinear):
            stored = _stored_layers(name, base, donors, module.weight.dtype)
            weight, bias = module.effective(stored)
            out[f"{name}.weight"] = weight.cpu()
            if bias is not None:
                out[f"{name}.bias"] = bias.cpu()
        elif isinstance(module, Masters):
            out |= {
                f"{name}.{key}": value.detach().cpu()
                for key, value in module.named_parameters(recurse=False)
            }
    return out


def _stored_layers(
    name: str, base: Refs, donors: Sequence[Refs], held: torch.dtype
) -> list[Frozen | None] | None:
    """A layer's weight and bias as they are stored, in `base` and in each donor.

    Nothing if those held in the dtype `held` are no less exact.
    """
    blocks = [(refs, like(name, base, refs)) for refs in (base, *donors)]
    stored = [refs[key] for refs, keys in blocks for key in keys]
    if all(torch.promote_types(ref.dtype, held) == held for ref in stored):
        return None
    return [
        _layer(name, keys, read_tensors({key: refs[key] for key in keys})) for refs, keys in blocks
    ]


def linear_layers(block: nn.Module) -> Iterator[tuple[str, Linear]]:
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            yield name, module


def is_coefficient(name: str) -> bool:
    """Whether a parameter of a student is one of C0, D0, c0, C1, …"""
    last = name.rsplit(".", 1)[-1]
    return last[0] in "CDc" and last[1:].isdigit()


def is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def seeded(seed: int, *labels: object) -> torch.Generator:
    digest = hashlib.sha256(repr((seed, *labels)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
