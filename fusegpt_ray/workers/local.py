"""The engine of one process: a laptop, a notebook, a bare GPU box. Imports neither ray nor deepspeed."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property, partial
from types import TracebackType
from typing import Self, TypeVar

import numpy as np
import torch

from fusegpt_ray.fusion.round import Round, build_student, group_states, save_group
from fusegpt_ray.fusion.student import Student
from fusegpt_ray.importance.ranking import Ranking
from fusegpt_ray.importance.search import Job, search
from fusegpt_ray.importance.sums import Sums
from fusegpt_ray.importance.sweep import Part, sweep
from fusegpt_ray.model.cache import BlockCache
from fusegpt_ray.model.memory import find_batch_size, free_bytes, is_out_of_memory
from fusegpt_ray.model.perplexity import perplexity, window_losses
from fusegpt_ray.model.runner import Runner, pick_device, pick_dtype, state_bytes
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.publishing.plain import Plain, compare_plain
from fusegpt_ray.publishing.proof import Proof, prove
from fusegpt_ray.sections import Text
from fusegpt_ray.text import calibration
from fusegpt_ray.training.checkpoints import Savepoints, Say
from fusegpt_ray.training.loop import TorchStepper, batches_of, train
from fusegpt_ray.workers.base import Epoch, Setup, Tuned

T = TypeVar("T")


class LocalEngine:
    """See `engine.Engine`."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.source, self.dense = setup, setup.source, setup.dense
        self.device = pick_device()
        self.dtype = pick_dtype(setup.dtype, setup.dense, self.device)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.__dict__.pop("runner", None)

    @property
    def description(self) -> str:
        return f"one process on {self.device.type}, {str(self.dtype).removeprefix('torch.')}"

    @cached_property
    def runner(self) -> Runner:
        cache = BlockCache.open(self.setup.cache_gb)
        batch, weights = self.setup.importance.batch, self.setup.cluster.weights
        return Runner(self.dense, self.device, self.dtype, batch, weights, cache=cache)

    def tokens(self, text: Text, key: str) -> Callable[[], Iterator[np.ndarray]]:
        piece_bytes = self.setup.piece_mb * 1_000_000
        return calibration.token_stream(text, piece_bytes, self.source.tokenizer(), key)

    def score(
        self,
        stack: Stack,
        windows_WT: np.ndarray,
        last: Ranking | None = None,
        sums: Sums | None = None,
    ) -> Ranking:
        settings, known = self.setup.importance, sums or Sums()
        batches = torch.from_numpy(windows_WT).split(settings.batch)

        def attempt(rows: int) -> Ranking:
            runner = self.runner.with_batch_size(rows)

            def measure(jobs: list[Job]) -> Iterator[tuple[Job, np.ndarray]]:
                for share in [[job] for job in jobs] if runner.keeps else [jobs]:
                    parts = [Part(batches[batch], positions) for batch, positions in share]
                    for job, sums_WC in zip(share, sweep(runner, stack, parts), strict=True):
                        yield job, sums_WC.numpy()

            recalled = known.recalled(rows, measure)
            return search(
                recalled, stack.kept, list(map(len, batches)), windows_WT.shape[1], settings, last
            )

        ranking, rows = find_batch_size(attempt, settings.batch, settings.batch, "scoring")
        return replace(ranking, rows=rows)

    def finetune(
        self, job: Round, windows_WT: np.ndarray, epoch: Epoch, say: Say = lambda _: None
    ) -> Tuned:
        begin = time.monotonic()
        settings, cluster, trunk, batch = (
            job.settings,
            self.setup.cluster,
            self.runner.trunk,
            self.setup.importance.batch,
        )
        windows, length = windows_WT.shape

        def walk(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
            runner = self.runner.with_batch_size(rows)
            kept = [_room_for_states(job.dense, windows, length, self.dtype) for _ in range(2)]
            done = 0
            for part in runner.chunks(job.dense, torch.from_numpy(windows_WT)):
                for all_WTD, part_WTD in zip(kept, group_states(runner, job, part), strict=True):
                    all_WTD[done : done + len(part)] = part_WTD
                done += len(part)
            return kept[0], kept[1]

        (entering, leaving), rows = find_batch_size(walk, batch, batch, "walking to the group")
        states_done = time.monotonic()
        setup: dict[str, str | int] = {
            "engine": "local",
            "device": self.device.type,
            "states_rows": rows,
        }
        kept = Savepoints.of(
            job, cluster.savepoint_minutes, cluster.micro_batch or settings.batch, **setup
        )

        @self._rather_forgetting
        def learn(micro_batch: int) -> tuple[Student, list[float]]:
            savepoints = kept.trying(micro_batch)
            contexts = trunk.contexts(micro_batch, windows_WT.shape[1])
            student = build_student(
                job,
                trunk.meta_blocks,
                contexts,
                job.plan(self.dtype),
                self.device,
                cluster.recompute_activations,
            )
            steps = settings.epochs * len(entering) // settings.batch
            stepper = TorchStepper.make(student, settings, steps, self.device, micro_batch)
            batches = partial(batches_of, entering, leaving, settings.batch)
            return student, train(stepper, batches, settings.epochs, epoch, savepoints, say)

        (student, losses), micro_batch = find_batch_size(
            learn, kept.micro_batch, settings.batch, "fine-tuning the group"
        )
        saved = save_group(job, student)
        return Tuned(
            saved,
            losses,
            rows,
            micro_batch,
            states_done - begin,
            kept.seconds + time.monotonic() - states_done,
        )

    def perplexity(self, stack: Stack, windows_WT: np.ndarray) -> float:
        runner, windows = self.runner.for_trunk_of(stack), torch.from_numpy(windows_WT)
        batch = self.setup.importance.batch
        losses_W, _ = find_batch_size(
            lambda rows: window_losses(runner.with_batch_size(rows), stack, windows),
            batch,
            batch,
            "evaluation",
        )
        return perplexity(losses_W)

    def compare_source(self, windows_WT: np.ndarray) -> Plain:
        windows, batch = torch.from_numpy(windows_WT[:1]), self.setup.importance.batch
        folder = self.source.folder

        def attempt(rows: int) -> Plain:
            return compare_plain(folder, self.dense, self.runner.with_batch_size(rows), windows)

        return find_batch_size(attempt, batch, batch, "comparing with from_pretrained")[0]

    def prove(self, published: Stack, folder: str, stack: Stack, windows_WT: np.ndarray) -> Proof:
        here, there = self.runner, self.runner.for_trunk_of(published)
        windows, batch = torch.from_numpy(windows_WT), self.setup.importance.batch

        def attempt(rows: int) -> Proof:
            return prove(
                published,
                folder,
                stack,
                here.with_batch_size(rows),
                there.with_batch_size(rows),
                windows,
            )

        return find_batch_size(attempt, batch, batch, "the proof")[0]

    def _rather_forgetting(self, attempt: Callable[[int], T]) -> Callable[[int], T]:
        """Where memory runs out while blocks are kept in it, the same again without them, before the work is made smaller."""

        def attempts(rows: int) -> T:
            if self.runner.weights.kept:
                try:
                    return attempt(rows)
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                self.runner.weights.forget()
            return attempt(rows)

        return attempts


def _room_for_states(stack: Stack, windows: int, length: int, dtype: torch.dtype) -> torch.Tensor:
    """[W, T, D], empty: in memory, or in a temporary file if it would take more than a quarter of what is free.

    The file is read in order, epoch after epoch; it has no name any more, so that it ends with the process.
    """
    taken = windows * state_bytes(stack, length, dtype)
    shape = (windows, length, state_bytes(stack, 1, dtype) // dtype.itemsize)
    if taken <= free_bytes(torch.device("cpu")) / 4:
        return torch.empty(shape, dtype=dtype)
    with tempfile.NamedTemporaryFile(prefix="fusegpt-states-") as file:
        return torch.from_file(file.name, shared=True, size=math.prod(shape), dtype=dtype).reshape(
            shape
        )
