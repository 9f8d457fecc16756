"""The engine of a Ray cluster, or of a local Ray where none runs."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

import numpy as np
import ray

from fusegpt_ray import storage
from fusegpt_ray.distributed import data, scoring, training
from fusegpt_ray.distributed.scoring import Replica
from fusegpt_ray.distributed.states import state_datasets
from fusegpt_ray.distributed.training import Workers
from fusegpt_ray.engine import Epoch, Tuned
from fusegpt_ray.errors import UserError
from fusegpt_ray.fusion.round import Round
from fusegpt_ray.importance.ranking import Ranking
from fusegpt_ray.proof import Proof
from fusegpt_ray.recipe import Recipe, Text
from fusegpt_ray.source import Source
from fusegpt_ray.stack import Stack


class RayEngine:
    """See `engine.Engine`."""

    def __init__(self, recipe: Recipe, source: Source, dense: Stack) -> None:
        self.recipe, self.source, self.dense = recipe, source, dense
        self._started = False

    def __enter__(self) -> Self:
        cluster = self.recipe.cluster
        if not ray.is_initialized():
            self._start()
        total = ray.cluster_resources()
        gpus = cluster.gpus_per_replica if cluster.gpus_per_replica is not None else min(1, total.get("GPU", 0))
        wanted = gpus * max(cluster.replicas, cluster.workers)
        if wanted > total.get("GPU", 0):
            problem = f"{max(cluster.replicas, cluster.workers)} × {gpus:g} GPUs wanted, the cluster has {total.get('GPU', 0):g}"
            raise UserError("cluster.gpus_per_replica", gpus, problem, "lower it, cluster.replicas or cluster.workers")
        cores = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
        self.replica = Replica(
            cluster.replicas, 1, gpus, max(1, cores // cluster.replicas), self.recipe.model.dtype, self.recipe.importance.batch
        )
        threads = max(1, cores // cluster.workers)
        micro_batch = cluster.micro_batch or self.recipe.fusion.batch // cluster.workers
        self.workers = Workers(cluster.workers, 1, gpus, threads, self.recipe.model.dtype, cluster.zero_stage, micro_batch)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._started:
            ray.shutdown()

    def tokens(self, text: Text, key: str) -> Callable[[], Iterator[np.ndarray]]:
        piece_bytes = self.recipe.calibration.piece_mb * 1_000_000
        return data.token_stream(text, piece_bytes, self.source.tokenizer(), key)

    def score(self, stack: Stack, windows_WT: np.ndarray, last: Ranking | None = None) -> Ranking:
        return scoring.score(stack, windows_WT, self.recipe.importance, self.replica, last)

    def finetune(self, job: Round, windows_WT: np.ndarray, epoch: Epoch) -> Tuned:
        begin = time.monotonic()
        contexts = scoring.contexts(self.dense, self.workers.micro_batch, windows_WT.shape[1], self.replica)
        datasets = state_datasets(job, windows_WT, self.workers.count, self.replica)
        states_done = time.monotonic()
        folder = storage.join(job.folder, "train")
        saved, losses = training.finetune(job, contexts, len(windows_WT), datasets, self.workers, folder, epoch)
        return Tuned(saved, losses, states_done - begin, time.monotonic() - states_done)

    def perplexity(self, stack: Stack, windows_WT: np.ndarray) -> float:
        return scoring.evaluate(stack, windows_WT, self.replica)

    def prove(self, published: Stack, folder: str, stack: Stack, windows_WT: np.ndarray) -> Proof:
        return scoring.prove(published, folder, stack, windows_WT, self.replica)

    def _start(self) -> None:
        """Join the cluster the recipe or RAY_ADDRESS names, else start a local Ray on the loopback interface."""
        cluster = self.recipe.cluster
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # our display is the one display
        address = cluster.address or os.environ.get("RAY_ADDRESS")
        quiet = {"logging_level": logging.ERROR, "log_to_driver": False, "configure_logging": True}
        if address:
            try:
                ray.init(address=address, **quiet)
            except (ConnectionError, ValueError) as error:
                fix = "check that the cluster runs there, or leave cluster.address out"
                raise UserError("cluster.address", address, f"no Ray cluster answers ({error})", fix) from error
        else:
            ray.init(
                address="local",
                # Waiting is most of what a coordinator does: never let it hold up the work on a machine with few cores.
                num_cpus=max(4, os.cpu_count() or 1, cluster.replicas + 1, cluster.workers + 1),
                include_dashboard=False,
                object_store_memory=int((cluster.object_store_gb or 1) * 1e9),
                **quiet,
            )
        self._started = True
