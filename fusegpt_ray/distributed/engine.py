"""The engine of a Ray cluster, or of a local Ray where none runs."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Self, TypeVar

import numpy as np
import ray
import torch
from ray._private import ray_constants

from fusegpt_ray.distributed import data, scoring, states, training
from fusegpt_ray.distributed.nodes import alive_nodes, check_paths
from fusegpt_ray.distributed.replicas import Replica, Replicas
from fusegpt_ray.distributed.training import Workers
from fusegpt_ray.errors import UserError
from fusegpt_ray.fusion.round import Round, Saved
from fusegpt_ray.importance.ranking import Ranking
from fusegpt_ray.importance.sums import Sums
from fusegpt_ray.model.memory import find_batch_size
from fusegpt_ray.model.recorder import Context
from fusegpt_ray.model.runner import pick_dtype
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.publishing.plain import Plain
from fusegpt_ray.publishing.proof import Proof
from fusegpt_ray.sections import Text
from fusegpt_ray.store import storage
from fusegpt_ray.training.checkpoints import Savepoints, Say
from fusegpt_ray.workers.base import Epoch, Setup, Tuned

T = TypeVar("T")


class RayEngine:
    """See `engine.Engine`."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.source, self.dense = setup, setup.source, setup.dense
        self._started = False
        self._contexts: dict[tuple[int, int], list[Context]] = {}

    def __enter__(self) -> Self:
        cluster = self.setup.cluster
        if not ray.is_initialized():
            self._start()
        total = ray.cluster_resources()
        gpus = (
            cluster.gpus_per_replica
            if cluster.gpus_per_replica is not None
            else min(1, total.get("GPU", 0))
        )
        processes = max(cluster.replicas, cluster.workers)
        if gpus * processes > total.get("GPU", 0):
            problem = f"{processes} × {gpus:g} GPUs wanted, the cluster has {total.get('GPU', 0):g}"
            raise UserError(
                "cluster.gpus_per_replica",
                gpus,
                problem,
                "lower it, cluster.replicas or cluster.workers",
            )
        if processes > total.get("CPU", 0):
            problem = f"{processes} processes of one CPU each wanted, the cluster has {total.get('CPU', 0):g} CPUs"
            raise UserError(
                "cluster.replicas",
                cluster.replicas,
                problem,
                "lower cluster.replicas and cluster.workers",
            )
        check_paths(self.setup)
        # Decided here, once: every process of the run computes alike.
        self.dtype = pick_dtype(
            self.setup.dtype, self.dense, torch.device("cuda" if gpus else "cpu")
        )
        cores = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
        threads, batch = max(1, cores // cluster.replicas), self.setup.importance.batch
        here = 1 / math.ceil(cluster.replicas / len(alive_nodes()))
        share = min(1.0, gpus) if gpus else here
        disk = self.setup.cache_gb
        hub = self.source if self.source.on_hub else None
        self.replica = Replica(
            cluster.replicas, 1, gpus, threads, self.dtype, batch, cluster.weights, share, disk, hub
        )
        self.replicas = Replicas(self.dense, self.replica)
        threads, share = (
            max(1, cores // cluster.workers),
            (self.setup.loss_batch or cluster.workers) // cluster.workers,
        )
        rows, recompute = cluster.micro_batch or share, cluster.recompute_activations
        self.workers = Workers(
            cluster.workers, 1, gpus, threads, self.dtype, cluster.zero_stage, rows, recompute, hub
        )
        return self

    @property
    def description(self) -> str:
        where = f"{self.replica.gpus:g} GPU each" if self.replica.gpus else "CPUs"
        name = str(self.dtype).removeprefix("torch.")
        return f"replicas: {self.replica.count}, training workers: {self.workers.count}, on {where}, {name}"

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if ray.is_initialized():
            self.replicas.close()
        if self._started:
            ray.shutdown()

    def tokens(self, text: Text, key: str) -> Callable[[], Iterator[np.ndarray]]:
        piece_bytes = self.setup.piece_mb * 1_000_000
        return data.token_stream(text, piece_bytes, self.source.tokenizer(), key)

    def score(
        self,
        stack: Stack,
        windows_WT: np.ndarray,
        last: Ranking | None = None,
        sums: Sums | None = None,
    ) -> Ranking:
        settings = self.setup.importance

        def attempt(rows: int) -> Ranking:
            return scoring.score(
                stack, windows_WT, settings, self.replicas, rows, last, sums or Sums()
            )

        ranking, rows = self._find_batch_size(attempt, "scoring")
        return replace(ranking, rows=rows)

    def finetune(
        self, job: Round, windows_WT: np.ndarray, epoch: Epoch, say: Say = lambda _: None
    ) -> Tuned:
        """States are lost with the node that holds them: then they are computed again, as often as nodes get lost."""
        while True:
            nodes = alive_nodes()
            try:
                return self._finetune(job, windows_WT, epoch, say)
            except Exception:
                if nodes <= alive_nodes():
                    raise

    def _finetune(self, job: Round, windows_WT: np.ndarray, epoch: Epoch, say: Say) -> Tuned:
        begin = time.monotonic()
        count = self.workers.count

        def walk(rows: int) -> list[list[ray.ObjectRef]]:
            return states.group_states_of_workers(job, windows_WT, count, self.replicas, rows)

        tables, rows = self._find_batch_size(walk, "walking to the group")
        states_done = time.monotonic()
        folder = storage.join(job.folder, "train")
        asked, minutes = self.workers.micro_batch, self.setup.cluster.savepoint_minutes
        kept = Savepoints.of(job, minutes, asked, states_rows=rows, **training.setup(self.workers))

        def learn(micro_batch: int) -> tuple[Saved, list[float]]:
            contexts = self._contexts_of(micro_batch, windows_WT.shape[1])
            self._make_way()
            workers = replace(self.workers, micro_batch=micro_batch)
            savepoints, inputs = kept.trying(micro_batch), states.datasets(tables)
            return training.finetune(
                job, contexts, len(windows_WT), inputs, workers, folder, epoch, savepoints, say
            )

        share = job.settings.batch // count
        (saved, losses), micro_batch = find_batch_size(
            learn, kept.micro_batch, share, "fine-tuning the group"
        )
        return Tuned(
            saved,
            losses,
            rows,
            micro_batch,
            states_done - begin,
            kept.seconds + time.monotonic() - states_done,
        )

    def _contexts_of(self, rows: int, length: int) -> list[Context]:
        """Asked of a replica once: no round changes them."""
        if (rows, length) not in self._contexts:
            self._contexts[rows, length] = scoring.contexts(rows, length, self.replicas)
        return self._contexts[rows, length]

    def _make_way(self) -> None:
        """Replicas stay while a group is trained, unless the training workers need their place now."""
        free, workers = ray.available_resources(), self.workers
        spare = free.get("CPU", 0) - workers.count * workers.cpus
        if (
            spare < 1 or free.get("GPU", 0) < workers.count * workers.gpus
        ):  # a CPU is left for Ray Data
            self.replicas.close()

    def perplexity(self, stack: Stack, windows_WT: np.ndarray) -> float:
        return self._find_batch_size(
            lambda rows: scoring.evaluate(stack, windows_WT, self.replicas, rows), "evaluation"
        )[0]

    def compare_source(self, windows_WT: np.ndarray) -> Plain:
        """On one replica, which is where a model is held."""
        folder = self.source.folder

        def attempt(rows: int) -> Plain:
            return scoring.compare_source(folder, self.dense, windows_WT, self.replicas, rows)

        return self._find_batch_size(attempt, "comparing with from_pretrained")[0]

    def prove(self, published: Stack, folder: str, stack: Stack, windows_WT: np.ndarray) -> Proof:
        return self._find_batch_size(
            lambda rows: scoring.prove(published, folder, stack, windows_WT, self.replicas, rows),
            "the proof",
        )[0]

    def _find_batch_size(self, attempt: Callable[[int], T], what: str) -> tuple[T, int]:
        """See `memory.find_batch_size`; on all replicas alike."""
        rows = self.replica.rows
        return find_batch_size(attempt, rows, rows, what)

    def _start(self) -> None:
        """Join the cluster the recipe or RAY_ADDRESS names, else start a local Ray on the loopback interface."""
        cluster = self.setup.cluster
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # our display is the one display
        address = cluster.address or os.environ.get("RAY_ADDRESS")
        quiet = {"logging_level": logging.ERROR, "log_to_driver": False, "configure_logging": True}
        if address:
            try:
                ray.init(address=address, **quiet)
            except (ConnectionError, ValueError) as error:
                fix = "check that the cluster runs there, or leave cluster.address out"
                raise UserError(
                    "cluster.address", address, f"no Ray cluster answers ({error})", fix
                ) from error
        else:
            with _loopback():
                ray.init(
                    address="local",
                    _node_ip_address="127.0.0.1",
                    # Waiting is most of what a coordinator does: never let it hold up the work on a machine with few cores.
                    num_cpus=max(4, os.cpu_count() or 1, cluster.replicas + cluster.workers + 1),
                    include_dashboard=False,
                    object_store_memory=int(cluster.object_store_gb * 1e9)
                    if cluster.object_store_gb
                    else None,
                    **quiet,
                )
        self._started = True


@contextmanager
def _loopback() -> Iterator[None]:
    """A Ray that starts here may call its node 127.0.0.1, and then has all its ports there.

    Else ray.init takes that name for the machine's own address, and its ports are open on every interface: it must be told, as it is
    on laptops that are no Linux, that this Ray will never be joined by other machines.
    """
    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
