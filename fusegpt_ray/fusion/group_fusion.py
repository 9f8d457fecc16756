"""Fusing one block into its group: what is built, what learns, to which states, and what is
saved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fusegpt_ray.fusion.group import group_span
from fusegpt_ray.fusion.student import (
    DonorCache,
    FusionConfig,
    all_layers,
    build_block,
    folded_tensors,
    is_coefficient,
    learned_tensors,
    terms_of,
)
from fusegpt_ray.model.architecture import build_meta_blocks
from fusegpt_ray.model.compiled import RunBlock
from fusegpt_ray.model.empty import EmptyBlock
from fusegpt_ray.model.recorder import Context, run_block
from fusegpt_ray.model.stack import Block, Stack, Terms
from fusegpt_ray.model.trunk import Trunk
from fusegpt_ray.recipe.cluster_section import Cluster
from fusegpt_ray.recipe.sections import Fusion
from fusegpt_ray.samples import Batch
from fusegpt_ray.store import storage
from fusegpt_ray.store.checkpoint import FileRecord, TensorRef
from fusegpt_ray.store.fence import Fence, nobody_else
from fusegpt_ray.store.writer import entries_of, write_safetensors
from fusegpt_ray.training.losses import LOSSES, Loss
from fusegpt_ray.training.partition import Partition
from fusegpt_ray.training.span import Learned, Span
from fusegpt_ray.training.states import StatesSource
from fusegpt_ray.training.stepper import TrainingConfig
from fusegpt_ray.training.task import SavedBlocks, TrainingTask


@dataclass(frozen=True)
class GroupFusion:
    """Block `donor` of `stack` is fused into its group; see `training.finetune.Trainable`."""

    stack: Stack
    dense: Stack
    donor: int
    """Dense number of the block to remove."""
    settings: Fusion
    fuse: bool
    """Without it, the group is only fine-tuned (method `mi+ft`)."""
    seed: int
    folder: str
    """Where the new blocks' files go."""
    fence: Fence = nobody_else
    """Called before every write, in whichever process: it raises if another run writes here."""
    start: Block | None = None
    """What a neighbour is before it is trained, if that is not the block of its number in `stack`
    (see `repair.py`). The states to train on are those of `stack` all the same."""

    @property
    def span(self) -> range:
        """Positions of the group in `stack`, the donor included."""
        position = self.stack.position(self.donor)
        return group_span(position, len(self.stack), self.settings.group_size)

    @property
    def group(self) -> tuple[Block, ...]:
        return tuple(self.stack.blocks[position] for position in self.span)

    @property
    def neighbours(self) -> tuple[Block, ...]:
        """The group without the donor, as it is before it is trained."""
        start = self.start
        return tuple(
            start if start and start.dense == block.dense else block
            for block in self.group
            if block.dense != self.donor
        )

    @property
    def donor_block(self) -> Block:
        return self.stack.blocks[self.stack.position(self.donor)]

    @property
    def fused(self) -> Block | None:
        """What is fused into the neighbours."""
        return self.donor_block if self.fuse else None

    def other_kinds(self) -> list[str]:
        """What to say of neighbours that cannot take in all of the donor's layers."""
        shapes = _shapes(self.donor_block)
        others = [block.dense for block in self.neighbours if _shapes(block) != shapes]
        if not (self.fuse and others):
            return []
        empty = build_meta_blocks(self.dense.config)
        given = all_layers(empty[self.donor].module)
        said = []
        for dense in others:
            own = all_layers(empty[dense].module)
            alike = sum(
                name in given and given[name].weight.shape == layer.weight.shape
                for name, layer in own.items()
            )
            said.append(
                f"block {dense} is of another kind than block {self.donor}: {alike} of its"
                f" {len(own)} layers take in that block's"
            )
        return said

    @property
    def source(self) -> StatesSource:
        """The states to train on.

        The dense teacher is taken at the depth where the next block left in the model stood in the
        dense one (or at its end): the group has to make up for blocks that were removed in between.
        """
        start, stop = self.span.start, self.span.stop
        if self.settings.teacher == "current":
            return StatesSource(self.stack, start, self.stack, stop)
        after = self.stack.blocks[stop:]
        end = self.dense.position(after[0].dense) if after else len(self.dense)
        return StatesSource(self.stack, start, self.dense, end)

    def task(self, windows: Batch, cluster: Cluster, origin: str, checkpoints: str) -> TrainingTask:
        """The training of this group.

        Args:
            origin: names what `stack` came of: another if any of its weights could be.
            checkpoints: the folder of its training checkpoints.
        """
        settings = self.settings
        config = TrainingConfig.of(settings, cluster, settings.loss)
        identity = {"after": origin, "donor": self.donor}
        return TrainingTask(self, self.source, windows, config, identity, checkpoints, self.fence)

    def fusion_config(self, dtype: torch.dtype) -> FusionConfig:
        """`dtype`: of the arithmetic."""
        trained = torch.float32 if self.settings.trained_dtype == "float32" else dtype
        ranks = self.settings.rank, self.settings.lora_rank
        return FusionConfig(*ranks, self.seed, dtype, trained)

    def build(
        self,
        meta_blocks: Sequence[EmptyBlock],
        contexts: Sequence[Context],
        device: torch.device,
        dtype: torch.dtype,
        recompute: bool = False,
        run: RunBlock = run_block,
        partition: Partition | None = None,
    ) -> Span:
        """Reads the group's blocks only. Of these, each worker holds all (the effective weights are
        formed of them)."""
        config, donors = self.fusion_config(dtype), DonorCache(meta_blocks, device, dtype)
        built = [
            build_block(
                meta_blocks[block.dense], block, self.fused, config, device, donors, self.donor
            )
            for block in self.neighbours
        ]
        blocks, learned = zip(*built, strict=True)
        own = [contexts[block.dense].to(device) for block in self.neighbours]
        numbers = [block.dense for block in self.neighbours]
        return Span(
            blocks,
            Learned(learned),
            own,
            recompute,
            run,
            meta_blocks=meta_blocks,
            numbers=numbers,
        )

    uses_head = False

    def loss(self, trunk: Trunk, teacher: Trunk | None = None) -> Loss:
        return LOSSES[self.settings.loss]

    def parameter_groups(self, span: Span) -> list[dict[str, Any]]:
        """Two learning rates: one for the fusion coefficients C, D and c, another for the rest."""
        named = list(span.learned.named_parameters())
        coefficients = [value for name, value in named if is_coefficient(name)]
        rest = [value for name, value in named if not is_coefficient(name)]
        return [
            {"params": coefficients, "lr": self.settings.learning_rate},
            {"params": rest, "lr": self.settings.lora_learning_rate},
        ]

    def save(self, span: Span, part: int = 0, parts: int = 1) -> SavedBlocks:
        """Write every `parts`-th of the trained blocks.

        Two files a block: its weights folded to plain ones (float32 where something learned, for
        scoring and publishing) and, unless every round is folded, what it learned, so that the next
        round goes on from there.
        """
        saved = SavedBlocks({}, {})
        pairs = list(zip(self.neighbours, span.learned.blocks, strict=True))
        for neighbour, learned in pairs[part::parts]:
            name = f"without-{self.donor:03d}-block-{neighbour.dense:03d}"
            saved.blocks[neighbour.dense] = self._save(
                storage.join(self.folder, name), neighbour, learned, span.meta_blocks, saved.files
            )
        return saved

    def _save(
        self,
        uri: str,
        neighbour: Block,
        learned: nn.Module,
        meta_blocks: Sequence[EmptyBlock],
        files: dict[str, FileRecord],
    ) -> Block:
        def write(file: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorRef]:
            entries = entries_of(tensors)
            self.fence()
            files[file], refs = write_safetensors(file, entries)
            return refs

        donor = self.fused
        folded = folded_tensors(learned, neighbour, donor, meta_blocks)
        stored = meta_blocks[neighbour.dense].stored(folded, neighbour.weights)
        weights = {**neighbour.weights, **write(f"{uri}.safetensors", stored)}
        terms = None
        if self.settings.fold == "at_end":
            refs = write(f"{uri}.learned.safetensors", learned_tensors(learned))
            terms = Terms(*terms_of(neighbour, donor), refs)
        return Block(neighbour.dense, weights, terms)


def _shapes(block: Block) -> dict[str, tuple[int, ...]]:
    return {name: ref.shape for name, ref in block.weights.items()}
