"""The workers of a Ray cluster, or of a local Ray where none runs."""

from __future__ import annotations

import importlib.metadata
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
import ray
import torch

from fusegpt_ray.distributed import images, monitor, text
from fusegpt_ray.distributed.connection import Connection, gpus_of
from fusegpt_ray.distributed.nodes import alive_nodes, check_paths, resources, wait_for_resources
from fusegpt_ray.distributed.process import JobConfig, RunnerConfig
from fusegpt_ray.distributed.replicas import Replicas
from fusegpt_ray.errors import Terminated
from fusegpt_ray.model.device import pick_dtype
from fusegpt_ray.recipe.text_sections import Text
from fusegpt_ray.report import Listener
from fusegpt_ray.store import storage
from fusegpt_ray.text.album import Album
from fusegpt_ray.text.calibration import PACKED, Reading
from fusegpt_ray.text.images import Processing
from fusegpt_ray.workers.base import News, Setup
from fusegpt_ray.workers.room import Held, Way, way_alone

R = TypeVar("R")
REPLICA_GPU = 0.6
"""Part of a GPU that a replica takes where a training worker takes the rest. Ray puts two processes
on one GPU only where both fit: so a replica and a worker, never two replicas."""


class RayWorkers:
    """See `workers.base.Workers`."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.replicas, self.training_workers = setup.cluster.replicas, setup.cluster.workers
        self._connection = Connection(False, False)
        self._job: Any = None

    def __enter__(self) -> Self:
        setup, cluster = self.setup, self.setup.cluster
        self._connection = Connection.open(cluster)
        self.gpus = gpus_of(cluster)
        least = Held.of(cluster, self.gpus, setup.trains, "shared" if self._shares else "turns")
        self.replicas, processes = least.replicas, max(least.replicas, least.workers)
        wait_for_resources(least.gpus, processes, cluster, grows=not self._connection.own)
        check_paths(setup)
        # Decided here, once, so that every process of the run computes alike.
        device = torch.device("cuda" if self.gpus else "cpu")
        self.dtype = pick_dtype(setup.dtype, setup.dense, device)
        self._pool = Replicas(
            setup.dense,
            self._runner_config(self.replicas, cluster.weights, min(1.0, self.gpus)),
            self.replicas,
            cpus=1,
            gpus=REPLICA_GPU if self._shares else self.gpus,
            labels=cluster.labels,
        )
        if self._fits_beside_reading:
            self._pool.start()  # while texts are read, they import what they need
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if ray.is_initialized():
            self._pool.close()
            if self._job:
                # A notice of preemption leaves seconds; Ray ends what is not waited for.
                self._job.close(wait=not self._connection.own and kind is not Terminated)
        self._connection.close()

    @property
    def description(self) -> str:
        where = f"{self.gpus:g} GPU each" if self.gpus else "CPUs"
        name = str(self.dtype).removeprefix("torch.")
        workers = f", training workers: {self.training_workers}" if self.setup.trains else ""
        return f"replicas: {self.replicas}{workers}, on {where}, {name}"

    @property
    def hardware(self) -> Mapping[str, str]:
        return self._pool.hardware if self.gpus else {}

    @property
    def device_bytes(self) -> int:
        return self._pool.device_bytes

    @property
    def gpus_held(self) -> float:
        way: Way = "shared"
        if not self._shares:
            way = "apart" if self._fits_beside_replicas else "turns"
        return Held.of(self.setup.cluster, self.gpus, self.setup.trains, way).gpus

    @property
    def streams(self) -> bool:
        return self._pool.streams

    @property
    def training_setup(self) -> Mapping[str, str | int]:
        return {
            "engine": f"deepspeed {importlib.metadata.version('deepspeed')}",
            "device": "cuda" if self.gpus else "cpu",
            "workers": self.training_workers,
            "zero_stage": self.setup.cluster.zero_stage,
        }

    def monitor(self, run: str) -> Listener:
        return monitor.listener(run)

    def tokens(
        self, text_of: Text, key: str, reading: Reading = PACKED
    ) -> Callable[[], Iterator[np.ndarray]]:
        self._make_room_for_reading()
        piece_bytes, tokenizer = self.setup.piece_mb * 1_000_000, self.setup.source.tokenizer()
        return text.token_stream(text_of, piece_bytes, tokenizer, key, reading)

    def album(self, text_of: Text, processing: Processing) -> Album:
        self._make_room_for_reading()
        return images.album(text_of, processing)

    def map(
        self,
        function: Callable[..., R],
        tasks: Sequence[tuple[Any, ...]],
        batch_size: int,
        costs: Sequence[float] | None = None,
    ) -> Iterator[tuple[int, R]]:
        if self._job and not self._fits_beside_replicas:
            self._job.close(wait=True)
            self._job = None
        return self._pool.map(function, tasks, batch_size, costs)

    def prepare_training(self) -> None:
        """The training job starts while replicas still score, if there is room for both."""
        if self._fits_beside_replicas:
            self._pool.start()  # before the workers: see `REPLICA_GPU`
            self._start_training()

    def spmd(
        self, function: Callable[..., R], *arguments: Any, news: Callable[[News], None]
    ) -> list[R]:
        if self._fits_beside_replicas:
            self._pool.offload()
        else:
            self._pool.close()
        self._start_training()
        found: list[R] = self._job.run(function, arguments, news)
        return found

    def _start_training(self) -> None:
        from fusegpt_ray.distributed.training_job import TrainingJob

        if self._job is None:
            setup, cluster = self.setup, self.setup.cluster
            assert setup.run_folder is not None, "nothing is trained outside of a run"
            config = JobConfig(
                count=cluster.workers,
                cpus=1,
                gpus=self._worker_gpu,
                zero_stage=cluster.zero_stage,
                runner=self._runner_config(cluster.workers, "streamed", 1.0),
                folder=storage.join(setup.run_folder, "blocks", "train"),
                labels=cluster.labels,
            )
            self._job = TrainingJob(setup.dense, config)

    @property
    def _worker_gpu(self) -> float:
        """A training worker's part: 0 or 1 GPU, or what a replica leaves of one."""
        if not self.gpus:
            return 0
        return 1 - REPLICA_GPU if self._shares else 1

    @property
    def _shares(self) -> bool:
        """Whether each training worker takes the rest of a replica's GPU; see `way_alone`."""
        return self.setup.trains and self.setup.sets == 1 and way_alone(self.gpus) == "shared"

    @property
    def _fits_beside_reading(self) -> bool:
        """Whether all replicas leave a CPU to Ray Data."""
        return self.replicas * self.setup.sets < resources(self.setup.cluster).get("CPU", 0)

    def _make_room_for_reading(self) -> None:
        """Replicas may have been asked for something before."""
        if not self._fits_beside_reading:
            self._pool.close()

    @cached_property
    def _fits_beside_replicas(self) -> bool:
        """Whether there is a place for all training workers while replicas live, and a CPU for Ray
        Data. Found out once, before the job takes its place.
        """
        if self.setup.sets > 1:
            return self.setup.roomy
        total, workers = resources(self.setup.cluster), self.setup.cluster.workers
        cpus = self.replicas + workers + 1
        gpus = self.replicas * self._pool.gpus + workers * self._worker_gpu
        return cpus <= total.get("CPU", 0) and gpus <= total.get("GPU", 0)

    def _runner_config(self, count: int, weights: Any, memory_share: float) -> RunnerConfig:
        """`count`: of such processes in the cluster."""
        setup, limit = self.setup, os.environ.get("OMP_NUM_THREADS")
        processes = math.ceil(count * setup.sets / len(alive_nodes(setup.cluster.labels)))
        return RunnerConfig(
            self.dtype,
            setup.importance.batch,
            weights,
            memory_share if self.gpus else 1 / processes,
            processes,
            int(limit) if limit else None,
            setup.cache_gb,
            setup.cluster.compile,
            setup.cluster.deterministic,
            setup.source if setup.source.on_hub else None,
        )
