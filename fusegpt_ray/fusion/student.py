"""The student of a round: the group without the donor, its linear layers fused; and its way back to
plain weights.

Notable: everything that learns starts from a generator seeded by (seed, donor, block), never by the
order in which things are built.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fusegpt_ray.fusion.linear import (
    Experts,
    Frozen,
    FusedExperts,
    FusedLinear,
    Linear,
    bias_of,
)
from fusegpt_ray.model.empty import EmptyBlock, in_arithmetic
from fusegpt_ray.model.recorder import has_experts
from fusegpt_ray.model.stack import Block, Refs
from fusegpt_ray.store.checkpoint import read_tensors
from fusegpt_ray.training.masters import Masters

_ROUTER = re.compile(r"(^|\.)(router|gate|shared_expert_gate)(\.|$)")
"""What the layers are called that decide which experts a token goes to, and with what weight."""


@dataclass(frozen=True)
class FusionConfig:
    """How a student is made: ranks, dtypes and seed."""

    rank: int
    lora_rank: int
    seed: int
    compute_dtype: torch.dtype
    trained_dtype: torch.dtype


def terms_of(neighbour: Block, donor: Block | None) -> tuple[Refs, tuple[Block, ...]]:
    """A neighbour's frozen weights and its donors in order, `donor` last. A donor that was itself
    fused counts as plain weights.
    """
    base = neighbour.terms.base if neighbour.terms else neighbour.weights
    donors = neighbour.terms.donors if neighbour.terms else ()
    if donor is not None:
        donors = (*donors, Block(donor.dense, donor.weights))
    return base, donors


def build_block(
    meta_block: EmptyBlock,
    neighbour: Block,
    donor: Block | None,
    config: FusionConfig,
    device: torch.device,
    donors: DonorCache,
    label: object,
) -> tuple[nn.Module, dict[str, nn.Module]]:
    """One neighbour as a plain block, and what learns in it by layer: LoRA, fused terms and norm
    weights. What it learned before is kept. A router stays as it is.

    Args:
        donor: the block to fuse into it.
        label: seeds what learns, beside the neighbour's number.
    """
    base, donor_blocks = terms_of(neighbour, donor)
    stored = meta_block.read(base)
    block = meta_block.filled(stored, device, config.compute_dtype)
    held = [donors.get(one) for one in donor_blocks]

    def fused(name: str, own: Linear | Experts, weight: str, bias: str) -> FusedLinear:
        return FusedLinear(
            own,
            [_given(tensors, weight, bias, own) for tensors in held],
            config.rank,
            config.lora_rank,
            config.trained_dtype,
            seeded(config.seed, label, neighbour.dense, name),
        )

    learned: dict[str, nn.Module] = {}
    for name, own in linear_layers(block):
        learned[name] = fused(name, own, f"{name}.weight", f"{name}.bias")
    for path, layers in expert_layers(block).items():
        names = {key: f"{path}.{key}" for key in layers}
        learned[path] = FusedExperts(
            {key: fused(name, layers[key], name, bias_of(name)) for key, name in names.items()}
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
    for path, module in learned.items():
        for key, parameter in module.named_parameters():
            if (value := values.get(f"{path}.{key}")) is not None:
                parameter.copy_(value)


def _given(
    donor: Mapping[str, torch.Tensor], weight: str, bias: str, own: Linear | Experts
) -> Frozen | None:
    """The layer that a donor gives to the one of the same name.

    None where its own is missing or of another shape. The blocks of a hybrid model differ in kind
    (attention in some, a recurrence in others; experts in some, none in others), and only layers
    alike can be fused.
    """
    if weight not in donor or donor[weight].shape != own.weight.shape:
        return None
    return donor[weight], None if own.bias is None else donor.get(bias)


class DonorCache:
    """Donor blocks' tensors by where they lie: neighbours fused with one donor share one copy of
    it.
    """

    def __init__(
        self, meta_blocks: Sequence[EmptyBlock], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.meta_blocks, self.device, self.dtype = meta_blocks, device, dtype
        self._blocks: dict[tuple[object, ...], dict[str, torch.Tensor]] = {}

    def get(self, donor: Block) -> Mapping[str, torch.Tensor]:
        """Its parameters."""
        key = tuple(donor.weights[name] for name in sorted(donor.weights))
        if key not in self._blocks:
            stored = self.meta_blocks[donor.dense].read(donor.weights)
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
    learned: nn.Module,
    neighbour: Block,
    donor: Block | None,
    meta_blocks: Sequence[EmptyBlock],
) -> dict[str, torch.Tensor]:
    """The plain weights of all that fine-tuning changed, what was learned folded in, on the CPU.

    What is learned is added to the weights as they are stored, not as the arithmetic rounded them
    (and in the wider of both dtypes): a float16 checkpoint fine-tuned in bfloat16 keeps its own
    weights' precision. `donor`: of this round, if it is fused.
    """
    base, donors = terms_of(neighbour, donor)
    blocks = [Block(neighbour.dense, base), *donors]
    out = {}
    for path, module in learned.named_modules():
        if isinstance(module, FusedLinear):
            names = module.names(path)
            stored = _stored_layers(module, names, blocks, meta_blocks)
            weight, bias = module.effective(stored)
            out[names[0]] = weight.cpu()
            if bias is not None:
                out[names[1]] = bias.cpu()
        elif isinstance(module, Masters):
            out |= {
                f"{path}.{key}": value.detach().cpu()
                for key, value in module.named_parameters(recurse=False)
            }
    return out


def _stored_layers(
    layer: FusedLinear,
    names: tuple[str, str],
    blocks: Sequence[Block],
    meta_blocks: Sequence[EmptyBlock],
) -> list[Frozen | None] | None:
    """A layer's weight and bias as they are stored, in the block itself and in each donor.

    Nothing if those that the layer holds are no less exact.
    """
    held = layer.weight.dtype
    wanted = [
        None if frozen is None else [*names[: 1 + (frozen[1] is not None)]]
        for frozen in layer.frozen()
    ]
    empty = [meta_blocks[block.dense] for block in blocks]
    stored = [
        block.weights[key]
        for one, block, keys in zip(empty, blocks, wanted, strict=True)
        if keys
        for key in one.sources(block.weights, keys)
    ]
    if all(torch.promote_types(ref.dtype, held) == held for ref in stored):
        return None
    found = [
        one.read(block.weights, keys) if keys else None
        for one, block, keys in zip(empty, blocks, wanted, strict=True)
    ]
    return [
        None if tensors is None else (tensors[names[0]], tensors.get(names[1])) for tensors in found
    ]


def linear_layers(block: nn.Module) -> Iterator[tuple[str, Linear]]:
    """All but those that are part of a router (see `expert_layers`)."""
    routed = bool(expert_layers(block))
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and not (routed and _ROUTER.search(name)):
            yield name, module


def expert_layers(block: nn.Module) -> dict[str, dict[str, Experts]]:
    """The linear layers of a block's experts: by the path of the module that holds them and the
    name of their weights in it.
    """
    found = {}
    for path, module in block.named_modules():
        if has_experts(module):
            layers = {
                key: Experts(value, getattr(module, bias_of(key), None), module.is_transposed)
                for key, value in module.named_parameters(recurse=False)
                if value.dim() == 3
            }
            found[path] = layers
    return found


def all_layers(block: nn.Module) -> dict[str, Linear | Experts]:
    """All that is fused in a block, by the name of the weight."""
    layers: dict[str, Linear | Experts] = {
        f"{path}.weight": layer for path, layer in linear_layers(block)
    }
    for path, experts in expert_layers(block).items():
        layers |= {f"{path}.{key}": layer for key, layer in experts.items()}
    return layers


def is_coefficient(name: str) -> bool:
    """Whether a parameter of a student is one of C0, D0, c0, C1, …"""
    last = name.rsplit(".", 1)[-1]
    return last[0] in "CDc" and last[1:].isdigit()


def is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def seeded(seed: int, *labels: object) -> torch.Generator:
    digest = hashlib.sha256(repr((seed, *labels)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
