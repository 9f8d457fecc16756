"""One block in place of a run of blocks, trained to give what the run gave (LLM-Streamline, Chen et
al., arXiv 2403.19135, "layer replacement").

Shapes: b windows of a loss batch on this worker, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fusegpt_ray.healing.whole_model import WholeModel
from fusegpt_ray.model.compiled import RunBlock
from fusegpt_ray.model.empty import EmptyBlock
from fusegpt_ray.model.recorder import Context
from fusegpt_ray.model.stack import Refs, Stack
from fusegpt_ray.model.trunk import Trunk
from fusegpt_ray.recipe.cluster_section import Cluster
from fusegpt_ray.recipe.sections import Fusion, Heal
from fusegpt_ray.samples import Batch
from fusegpt_ray.store.fence import Fence, nobody_else
from fusegpt_ray.training.losses import Loss, mse
from fusegpt_ray.training.partition import Partition
from fusegpt_ray.training.span import Span
from fusegpt_ray.training.states import StatesSource
from fusegpt_ray.training.stepper import TrainingConfig
from fusegpt_ray.training.task import SavedBlocks, TrainingTask


@dataclass(frozen=True)
class LightBlock:
    """Block `first` of the dense model, trained to do what the blocks `first` … `last` do; see
    `training.finetune.Trainable`. Every weight learns, in float32, but for those that are to stay
    zero.
    """

    dense: Stack
    first: int
    last: int
    settings: Fusion
    """`learning_rate`, `epochs`, `batch`, `betas` and `eps` count."""
    seed: int
    folder: str
    """Where the new block's file goes."""
    fence: Fence = nobody_else
    """Called before the write, in whichever process: it raises if another run writes here."""

    zeros: Refs = field(default_factory=dict)
    """Weights of it that are zero and stay so, instead of the block's own: those of its attention's
    last layer, where it is to be an MLP."""
    frozen: frozenset[str] = frozenset()
    """The parameters that these make."""

    uses_head = False

    @property
    def source(self) -> StatesSource:
        """The states entering and leaving the run, by one walk of the dense model."""
        return StatesSource(self.dense, self.first, self.dense, self.last + 1)

    def task(self, windows: Batch, cluster: Cluster, origin: str, checkpoints: str) -> TrainingTask:
        """The training of this block.

        Args:
            origin: names the rounds before.
            checkpoints: the folder of its training checkpoints.
        """
        settings = self.settings
        config = TrainingConfig.of(settings, cluster, "mse")
        identity = {"after": origin, "first": self.first, "last": self.last}
        identity["light"] = settings.light
        return TrainingTask(
            self,
            self.source,
            windows,
            config,
            identity,
            checkpoints,
            self.fence,
            what="training the light block",
        )

    @property
    def _alone(self) -> WholeModel:
        """It is built and saved as the only block of a model all of whose weights learn."""
        block = self.dense.blocks[self.first]
        one = replace(self.dense, blocks=(replace(block, weights={**block.weights, **self.zeros}),))
        all_weights = Heal(train="all", learning_rate=self.settings.learning_rate)
        own = (self.seed, self.folder, self.fence, self.frozen)
        return WholeModel(one, self.dense, all_weights, *own)

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
        return self._alone.build(meta_blocks, contexts, device, dtype, recompute, run, partition)

    def loss(self, trunk: Trunk, teacher: Trunk | None = None) -> Loss:
        return mse

    def parameter_groups(self, span: Span) -> list[dict[str, Any]]:
        return self._alone.parameter_groups(span)

    def save(self, span: Span, part: int, parts: int) -> SavedBlocks:
        return self._alone.save(span, part, parts)
