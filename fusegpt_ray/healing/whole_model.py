"""Healing: all blocks of a shallower model are trained together, so that the model's next-token
distributions are again the dense model's. What is built, what learns, and what is saved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from fusegpt_ray.fusion.student import DonorCache, FusionConfig, build_block, folded_tensors
from fusegpt_ray.model.compiled import RunBlock
from fusegpt_ray.model.recorder import Context
from fusegpt_ray.model.stack import Block, Stack
from fusegpt_ray.model.trunk import Trunk, load_block
from fusegpt_ray.sections import Cluster, Heal
from fusegpt_ray.store import storage
from fusegpt_ray.store.checkpoint import read_tensors
from fusegpt_ray.store.fence import Fence, nobody_else
from fusegpt_ray.store.writer import Entry, write_safetensors
from fusegpt_ray.training.distillation import LogitsKL
from fusegpt_ray.training.finetune import SavedBlocks, TrainingTask
from fusegpt_ray.training.losses import Loss
from fusegpt_ray.training.masters import Masters
from fusegpt_ray.training.span import Learned, Span
from fusegpt_ray.training.states import StatesSource
from fusegpt_ray.training.stepper import TrainingConfig


@dataclass(frozen=True)
class WholeModel:
    """All blocks of `stack`, trained to the dense model; see `training.finetune.Trainable`."""

    stack: Stack
    dense: Stack
    settings: Heal
    seed: int
    folder: str
    """Where the new blocks' files go."""
    fence: Fence = nobody_else
    """Called before every write, in whichever process: it raises if another run writes here."""

    uses_head = True

    @property
    def blocks(self) -> list[Block]:
        """Plain ones: terms that went on learning in the rounds are folded now."""
        return [replace(block, terms=None) for block in self.stack.blocks]

    def task(
        self,
        windows_WT: np.ndarray,
        held_out_WT: np.ndarray,
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
            loss="logits_kl",
            batch=settings.batch,
            epochs=1,
            parts=min(settings.looks, len(windows_WT) // settings.batch),
            warmup=settings.warmup,
            betas=settings.betas,
            eps=settings.eps,
            micro_batch=cluster.micro_batch,
            recompute=cluster.recompute_activations,
            checkpoint_minutes=cluster.checkpoint_minutes,
        )
        return TrainingTask(
            self,
            StatesSource(self.stack, 0, self.dense, len(self.dense)),
            windows_WT,
            config,
            identity,
            checkpoints,
            self.fence,
            held_out_WT,
            "healing",
            "heal.learning_rate",
        )

    def build(
        self,
        meta_blocks: Sequence[nn.Module],
        contexts: Sequence[Context],
        device: torch.device,
        dtype: torch.dtype,
        recompute: bool,
        run: RunBlock,
    ) -> Span:
        build = self._low_rank if self.settings.train == "lora" else self._all
        built = [build(meta_blocks[block.dense], block, device, dtype) for block in self.blocks]
        blocks, learned = zip(*built, strict=True)
        own = [contexts[block.dense].to(device) for block in self.blocks]
        return Span(blocks, Learned(learned), own, recompute, run)

    def _low_rank(
        self, meta_block: nn.Module, block: Block, device: torch.device, dtype: torch.dtype
    ) -> tuple[nn.Module, dict[str, nn.Module]]:
        """LoRA on every linear layer, and the norms' weights."""
        rank = self.settings.rank
        config = FusionConfig(rank, rank, self.seed, dtype, torch.float32)
        donors = DonorCache(device, dtype)
        return build_block(meta_block, block, None, config, device, donors, "heal")

    def _all(
        self, meta_block: nn.Module, block: Block, device: torch.device, dtype: torch.dtype
    ) -> tuple[nn.Module, dict[str, nn.Module]]:
        """Every parameter of the block."""
        stored = read_tensors(block.weights)
        plain = load_block(meta_block, stored, device, dtype)
        learned: dict[str, nn.Module] = {}
        for path, module in plain.named_modules():
            keys = [key for key, _ in module.named_parameters(recurse=False)]
            names = {key: f"{path}.{key}".lstrip(".") for key in keys}
            values = {
                key: stored[name].to(device, torch.float32)
                for key, name in names.items()
                if stored[name].is_floating_point()
            }
            if values:
                learned[path] = Masters(values, dtype)
            for key in values:  # the masters take their place
                setattr(module, key, nn.Parameter(torch.empty(0, device=device)))
        return plain, learned

    def parameter_groups(self, span: Span) -> list[dict[str, Any]]:
        return [{"params": [*span.learned.parameters()], "lr": self.settings.rate}]

    def loss(self, trunk: Trunk) -> Loss:
        return LogitsKL(trunk.head, self.settings.hidden)

    def save(self, span: Span, part: int, parts: int) -> SavedBlocks:
        """Write every `parts`-th of the blocks, in float32 where something learned."""
        saved = SavedBlocks({}, {})
        pairs = list(zip(self.blocks, span.learned.blocks, strict=True))
        for block, learned in pairs[part::parts]:
            tensors = folded_tensors(learned, block, None)
            assert set(tensors) <= set(block.weights), sorted(set(tensors) - set(block.weights))
            entries = [
                Entry(name, value.dtype, tuple(value.shape), partial(torch.Tensor.cpu, value))
                for name, value in tensors.items()
            ]
            self.fence()
            uri = storage.join(self.folder, f"block-{block.dense:03d}.safetensors")
            saved.files[uri], refs = write_safetensors(uri, entries)
            saved.blocks[block.dense] = Block(block.dense, {**block.weights, **refs})
        return saved
