"""Healing: all blocks of a model are trained together, so that its next-token distributions are
again the dense model's, or to predict a text. What is built, what learns, and what is saved.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fusegpt_ray.fusion.linear import Experts, Linear
from fusegpt_ray.fusion.student import expert_layers, is_norm, linear_layers, seeded
from fusegpt_ray.healing.low_rank import LowRankExperts, LowRankLinear, start
from fusegpt_ray.model.compiled import RunBlock
from fusegpt_ray.model.empty import EmptyBlock
from fusegpt_ray.model.recorder import Context
from fusegpt_ray.model.stack import Block, Stack
from fusegpt_ray.model.trunk import Trunk
from fusegpt_ray.recipe.cluster_section import Cluster
from fusegpt_ray.recipe.sections import Heal
from fusegpt_ray.samples import Batch
from fusegpt_ray.store import storage
from fusegpt_ray.store.fence import Fence, nobody_else
from fusegpt_ray.store.writer import entries_of, write_safetensors
from fusegpt_ray.training.distillation import LogitsKL, NextToken
from fusegpt_ray.training.losses import Loss
from fusegpt_ray.training.masters import Masters
from fusegpt_ray.training.partition import Partition
from fusegpt_ray.training.span import ITSELF, Learned, Span
from fusegpt_ray.training.states import Source, StatesSource, TokensSource
from fusegpt_ray.training.stepper import TrainingConfig
from fusegpt_ray.training.task import SavedBlocks, TrainingTask


@dataclass(frozen=True)
class WholeModel:
    """All blocks of `stack`, trained to the dense model or to text; see `training.task`."""

    stack: Stack
    dense: Stack
    settings: Heal
    seed: int
    folder: str
    """Where the new blocks' files go."""
    fence: Fence = nobody_else
    """Called before every write, in whichever process: it raises if another run writes here."""
    frozen: frozenset[str] = frozenset()
    """Parameters that do not learn, by name in the block."""

    uses_head = True

    def task(
        self,
        windows: Batch,
        held_out: Batch,
        cluster: Cluster,
        identity: Mapping[str, Any],
        checkpoints: str,
    ) -> TrainingTask:
        """The training of the whole model, once over the windows.

        Args:
            identity: names what `stack` came of, and how it is healed.
            checkpoints: the folder of its training checkpoints.
        """
        settings = self.settings
        config = TrainingConfig(
            loss="logits_kl" if settings.loss == "kl" else "next_token",
            batch=settings.batch,
            epochs=1,
            parts=min(settings.looks, len(windows) // settings.batch),
            warmup=settings.warmup,
            betas=settings.betas,
            eps=settings.eps,
            micro_batch=cluster.micro_batch,
            recompute=cluster.recompute_activations,
            checkpoint_minutes=cluster.checkpoint_minutes,
        )
        return TrainingTask(
            self,
            self._source,
            windows,
            config,
            identity,
            checkpoints,
            self.fence,
            held_out,
            "healing",
            "heal.learning_rate",
        )

    @property
    def _source(self) -> Source:
        if self.settings.loss == "tokens":
            return TokensSource(self.stack)
        return StatesSource(self.stack, 0, self.dense, len(self.dense))

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
        built: list[tuple[nn.Module, dict[str, nn.Module]]] = []
        for block in self.stack.blocks:
            stored = meta_blocks[block.kind].read(block.weights)
            plain = meta_blocks[block.kind].filled(stored, device, dtype)
            learned = self._learned(plain, block, stored, device, dtype)
            if block.shares is not None:
                # What has a matrix is formed of the same masters, whose gradients are then sums.
                first = built[self.stack.position(block.shares)][1]
                learned |= {path: first[path] for path in learned if _has_matrix(first[path])}
            if partition:
                partition.keep(plain)
            built.append((plain, learned))
        blocks, learns = zip(*built, strict=True)
        own = [contexts[block.kind].to(device) for block in self.stack.blocks]
        around = {"gathering": partition.run} if partition else {}
        numbers = [block.kind for block in self.stack.blocks]
        return Span(
            blocks,
            Learned(learns),
            own,
            recompute,
            run,
            **around,
            meta_blocks=meta_blocks,
            numbers=numbers,
        )

    def _learned(
        self,
        plain: nn.Module,
        block: Block,
        stored: Mapping[str, torch.Tensor],
        device: torch.device,
        dtype: torch.dtype,
    ) -> dict[str, nn.Module]:
        """What learns in a block, by layer. The block loses these weights, or has low-rank layers
        put in; of those, a router has none.
        """
        learned: dict[str, nn.Module] = {}
        if self.settings.train == "new" and block.like is None:
            return learned
        low_rank = self.settings.train == "lora"
        layers = dict(linear_layers(plain)) if low_rank else {}
        experts = expert_layers(plain) if low_rank else {}

        def begin(path: str, layer: Linear | Experts) -> dict[str, torch.Tensor]:
            generator = seeded(self.seed, "heal", block.dense, path)
            return start(layer, self.settings.rank, generator)

        for path, module in list(plain.named_modules()):
            if layer := layers.get(path):
                learned[path] = Masters(begin(path, layer), dtype)
                plain.set_submodule(path, LowRankLinear(layer))
            elif own := experts.get(path):
                updates = {
                    f"{key}_{name}": value
                    for key, one in own.items()
                    for name, value in begin(f"{path}.{key}", one).items()
                }
                learned[path] = Masters(updates, dtype)
                plain.set_submodule(path, LowRankExperts(module, own))
            elif not low_rank or is_norm(module):
                values = _floating(path, module, stored, self.frozen)
                masters = {key: value.to(device, torch.float32) for key, value in values.items()}
                if masters:
                    learned[path] = Masters(masters, dtype)
                for key in masters:
                    setattr(module, key, nn.Parameter(torch.empty(0, device=device)))
        return learned

    def parameter_groups(self, span: Span) -> list[dict[str, Any]]:
        return [{"params": [*span.learned.parameters()], "lr": self.settings.rate}]

    def loss(self, trunk: Trunk, teacher: Trunk | None = None) -> Loss:
        if self.settings.loss == "tokens":
            return NextToken(trunk.head)
        return LogitsKL(trunk.head, self.settings.hidden, teacher=teacher.head if teacher else None)

    def save(self, span: Span, part: int, parts: int) -> SavedBlocks:
        """Write every `parts`-th of the blocks, in float32 where something learned."""
        saved = SavedBlocks({}, {})
        blocks = zip(self.stack.blocks, span.blocks, span.learned.blocks, strict=True)
        for block, plain, learned in list(blocks)[part::parts]:
            empty = span.meta_blocks[block.kind]
            tensors = _plain_tensors(block, plain, learned, empty)
            if not tensors:  # it stays what it is
                continue
            entries = entries_of(empty.stored(tensors, block.weights))
            self.fence()
            uri = storage.join(self.folder, f"block-{block.dense:03d}.safetensors")
            saved.files[uri], refs = write_safetensors(uri, entries)
            saved.blocks[block.dense] = replace(block, weights={**block.weights, **refs})
        return saved


def _has_matrix(learned: nn.Module) -> bool:
    return any(value.dim() > 1 for value in learned.parameters())


def _floating(
    path: str, module: nn.Module, stored: Mapping[str, torch.Tensor], frozen: Collection[str]
) -> dict[str, torch.Tensor]:
    """A module's own parameters, as they are stored, without those that cannot or do not learn."""
    names = {key: f"{path}.{key}".lstrip(".") for key, _ in module.named_parameters(recurse=False)}
    learn = {key: name for key, name in names.items() if name not in frozen}
    return {key: stored[name] for key, name in learn.items() if stored[name].is_floating_point()}


@torch.no_grad()
def _plain_tensors(
    block: Block, plain: nn.Module, learned: nn.Module, empty: EmptyBlock
) -> dict[str, torch.Tensor]:
    """The plain weights of all that healing changed. Low-rank updates are added to the weights as
    they are stored, not as the arithmetic rounded them.
    """
    tensors: dict[str, torch.Tensor] = {}
    for path, module in learned.named_modules():
        if not isinstance(module, Masters):
            continue
        path = "" if path == ITSELF else path
        values = {key: value.detach() for key, value in module.named_parameters(recurse=False)}
        layer = plain.get_submodule(path)
        if isinstance(layer, LowRankLinear | LowRankExperts):
            names = {key: f"{path}.{key}" for key in layer.keys}
            stored = empty.read(block.weights, names.values())
            weights = {key: stored[name] for key, name in names.items()}
            values = layer.folded(weights, values)
        tensors |= {f"{path}.{key}".lstrip("."): value for key, value in values.items()}
    return tensors
