"""One round of fusing, as data and as the steps every engine runs: states → student → (fine-tuning) → new blocks on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import nn

from fusegpt_ray.fusion.group import group_span
from fusegpt_ray.fusion.student import (
    DonorCache,
    Plan,
    Student,
    build_block,
    folded_tensors,
    learned_tensors,
    terms_of,
)
from fusegpt_ray.model.recorder import Context
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.model.stack import Block, Stack, Terms
from fusegpt_ray.sections import Fusion
from fusegpt_ray.store import storage
from fusegpt_ray.store.checkpoint import Entry, FileRecord, TensorRef, write_safetensors


def _nothing() -> None:
    """Nobody else writes."""


@dataclass(frozen=True)
class Round:
    """What one round does: fuse block `donor` of `stack` into its group."""

    stack: Stack
    dense: Stack
    donor: int
    """Dense number of the block to remove."""
    settings: Fusion
    fuse: bool
    """False for the method `mi+ft`: the group is fine-tuned, nothing is fused into it."""
    seed: int
    folder: str
    """Where the new blocks' files go."""
    origin: str = ""
    """What `stack` came of: another if any of its weights could be. A savepoint of another origin is not gone on from."""
    fence: Callable[[], None] = _nothing
    """Called before every write, in whichever process: it raises if another run writes here."""

    @property
    def span(self) -> range:
        """Positions of the group in `stack`, the donor included."""
        return group_span(
            self.stack.position(self.donor), len(self.stack), self.settings.group_size
        )

    @property
    def group(self) -> tuple[Block, ...]:
        return tuple(self.stack.blocks[position] for position in self.span)

    @property
    def neighbours(self) -> tuple[Block, ...]:
        return tuple(block for block in self.group if block.dense != self.donor)

    @property
    def donor_block(self) -> Block:
        return self.stack.blocks[self.stack.position(self.donor)]

    def plan(self, compute_dtype: torch.dtype) -> Plan:
        trained = torch.float32 if self.settings.trained_dtype == "float32" else compute_dtype
        return Plan(
            self.fuse,
            self.settings.rank,
            self.settings.lora_rank,
            self.seed,
            compute_dtype,
            trained,
        )


def teacher(job: Round) -> tuple[Stack, int]:
    """The teacher's stack and the position whose entering states the group's output should equal.

    The dense teacher is taken at the depth where the next block left in the model stood in the dense one (or at its end): blocks
    removed in between belong to what the group has to make up for.
    """
    if job.settings.teacher == "current":
        return job.stack, job.span.stop
    after = job.stack.blocks[job.span.stop :]
    return job.dense, job.dense.position(after[0].dense) if after else len(job.dense)


@torch.no_grad()
def group_states(
    runner: Runner, job: Round, windows_WT: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """States entering the group and the teacher's leaving it, [W, T, D] each. One walk where both lie on the same blocks."""
    model, stop = teacher(job)
    start = job.span.start
    entering = None
    if job.stack.blocks[:start] != model.blocks[:start]:
        for entering in runner.walk(job.stack, windows_WT, start):  # noqa: B007 - the last one is wanted
            pass
    h_WTD = None
    for position, h_WTD in enumerate(runner.walk(model, windows_WT, stop)):
        if position == start and entering is None:
            entering = h_WTD
    assert entering is not None and h_WTD is not None
    return entering, h_WTD


def build_student(
    job: Round,
    meta_blocks: Sequence[nn.Module],
    contexts: Sequence[Context],
    plan: Plan,
    device: torch.device,
    recompute: bool = False,
) -> Student:
    """The student of a round; `meta_blocks` and `contexts` by dense block number (see `Trunk`). Reads the group's blocks only."""
    donors = DonorCache(device, plan.compute_dtype)
    blocks = [
        build_block(meta_blocks[block.dense], block, job.donor_block, plan, device, donors)
        for block in job.neighbours
    ]
    return Student(
        blocks,
        [contexts[block.dense].to(device) for block in job.neighbours],
        plan.compute_dtype,
        recompute,
    )


@dataclass(frozen=True)
class Saved:
    """A learned group on disk."""

    blocks: dict[int, Block]
    """The new blocks, by dense number."""
    files: dict[str, FileRecord]
    """What was written, by URI."""

    def to_json(self) -> dict[str, Any]:
        files = {uri: file.to_json() for uri, file in self.files.items()}
        return {"blocks": [block.to_json() for block in self.blocks.values()], "files": files}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        blocks = {row["dense"]: Block.from_json(row) for row in data["blocks"]}
        return cls(blocks, {uri: FileRecord.from_json(file) for uri, file in data["files"].items()})


def save_group(job: Round, student: Student) -> Saved:
    """Write the learned group.

    Two files a block: its weights folded to plain ones (float32 where something learned, for scoring and publishing) and, unless every
    round is folded, what it learned, so that the next round goes on from there.
    """
    blocks: dict[int, Block] = {}
    files: dict[str, FileRecord] = {}

    def write(file: str, tensors: dict[str, torch.Tensor]) -> dict[str, TensorRef]:
        entries = [
            Entry(name, value.dtype, tuple(value.shape), partial(torch.Tensor.cpu, value))
            for name, value in tensors.items()
        ]
        job.fence()
        files[file], refs = write_safetensors(file, entries)
        return refs

    for neighbour, block in zip(job.neighbours, student.blocks, strict=True):
        name = storage.join(job.folder, f"without-{job.donor:03d}-block-{neighbour.dense:03d}")
        folded = folded_tensors(block, neighbour, job.donor_block if job.fuse else None)
        assert set(folded) <= set(neighbour.weights), sorted(set(folded) - set(neighbour.weights))
        weights = {**neighbour.weights, **write(f"{name}.safetensors", folded)}
        terms = None
        if job.settings.fold == "at_end":
            base, donors = terms_of(neighbour, job.donor_block if job.fuse else None)
            terms = Terms(
                base, donors, write(f"{name}.learned.safetensors", learned_tensors(block))
            )
        blocks[neighbour.dense] = Block(neighbour.dense, weights, terms)
    return Saved(blocks, files)
