"""The workers of a Ray cluster, or of a local Ray where none runs."""

from __future__ import annotations

import importlib.metadata
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
import ray
import torch

from fusegpt_ray.distributed import images, monitor, text
from fusegpt_ray.distributed.connection import Connection, gpus_of
from fusegpt_ray.distributed.nodes import (
    check_paths,
    free_gpus,
    gpus_of_nodes,
    most_on_a_node,
    resources,
    wait_for_resources,
)
from fusegpt_ray.distributed.process import JobConfig, RunnerConfig
from fusegpt_ray.distributed.replicas import Replicas
from fusegpt_ray.distributed.serve import OneGpuError
from fusegpt_ray.errors import Terminated
from fusegpt_ray.model.device import pick_dtype
from fusegpt_ray.recipe.text_sections import Text
from fusegpt_ray.store import storage
from fusegpt_ray.terminal.display import Listener
from fusegpt_ray.text.album import Album
from fusegpt_ray.text.calibration import PACKED, Reading
from fusegpt_ray.text.images import Processing
from fusegpt_ray.workers.base import News, Setup
from fusegpt_ray.workers.room import Allocation, Need, Way, begun, way_alone

R = TypeVar("R")
REPLICA_GPU, WORKER_GPU = 0.6, 0.4
"""Parts of a GPU that a replica and a training worker take where they share it. Ray puts two
processes on one GPU if both fit: never two replicas, but two workers where there is no replica. So
workers take a part only where `RayWorkers._come_apart` says so, and look at where they are."""
PLACED_SECONDS = 10.0
"""In which Ray has given replicas their GPUs, and tells what is left of them."""


class RayWorkers:
    """See `workers.base.Workers`."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.replicas, self.training_workers = setup.cluster.replicas, setup.cluster.workers
        self._connection = Connection(False, False)
        self._job: Any = None
        self._inside = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as opened:  # an error on the way closes what was opened until then
            self._open(opened)
            self._inside = opened.pop_all()
        return self

    def _open(self, opened: ExitStack) -> None:
        setup, cluster = self.setup, self.setup.cluster
        self._connection = Connection.open(cluster)
        opened.callback(self._connection.close)
        self.gpus = gpus_of(cluster)
        least = Allocation.of(cluster, self.gpus, setup.trains, "turns")
        processes = max(least.replicas, least.workers)
        wait_for_resources(least.gpus, processes, cluster, grows=not self._connection.own)
        check_paths(setup)
        self.way = self.way_in(gpus_of_nodes(cluster.labels), resources(cluster).get("CPU", 0))
        self.replicas = Allocation.of(cluster, self.gpus, setup.trains, self.way).replicas
        # Decided here, once, so that every process of the run computes alike.
        device = torch.device("cuda" if self.gpus else "cpu")
        self.dtype = pick_dtype(setup.dtype, setup.dense, device)
        self._pool = Replicas(
            setup.dense,
            self._runner_config(self.replicas, cluster.weights, self.gpus),
            self.replicas,
            cpus=1,
            gpus=REPLICA_GPU if self.way == "shared" else self.gpus,
            labels=cluster.labels,
        )
        opened.push(self._end_processes)
        if self._fits_beside_reading:
            self._pool.start()  # while texts are read, they import what they need

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._inside.__exit__(kind, error, trace)

    def _end_processes(
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
        return Allocation.of(self.setup.cluster, self.gpus, self.setup.trains, self.way).gpus

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
        if self.way == "turns":
            self._end_training()
        return self._pool.map(function, tasks, batch_size, costs)

    def prepare_training(self) -> None:
        """The training job starts while replicas still score, if there is room for both."""
        if self.way != "turns":
            self._pool.start()
            if self.way == "apart" or self._come_apart(0):
                self._start_training()

    def spmd(
        self, function: Callable[..., R], *arguments: Any, news: Callable[[News], None]
    ) -> list[R]:
        while True:
            self._make_room_for_training()
            self._start_training()
            try:
                found: list[R] = self._job.run(function, arguments, news)
                return found
            except OneGpuError:  # replicas were lost, and Ray Train has started workers again
                if self.way != "shared":
                    raise
                self._take_turns()

    def _make_room_for_training(self) -> None:
        if self.way == "shared" and self._job is None:
            self._pool.start()
        if self.way != "turns":
            self._pool.offload()
        if self.way == "shared" and self._job is None and not self._come_apart(PLACED_SECONDS):
            self._take_turns()
        if self.way == "turns":
            self._pool.close()

    def _take_turns(self) -> None:
        """From now on, whole GPUs."""
        self._end_training()
        self._pool.close()
        self.way, self._pool.gpus = "turns", self.gpus

    def _come_apart(self, seconds: float) -> bool:
        """Whether each training worker will be on a GPU of its own beside the replicas, known at
        the latest after so many seconds.

        Ray uses up GPUs that are begun before others of their node; which node it takes, nobody
        knows. So there may be no more room than replicas leave, or it must be on one node.
        """
        cluster, until = self.setup.cluster, time.monotonic() + seconds
        while True:
            rooms = [gpus for gpus in free_gpus(cluster.labels) if gpus > WORKER_GPU - 1e-3]
            left = self.replicas * WORKER_GPU
            if cluster.workers == 1 or len(rooms) == 1 or sum(rooms) < left + 1e-3:
                return True
            if time.monotonic() >= until:
                return False
            time.sleep(0.2)

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
                runner=self._runner_config(cluster.workers, "streamed", 1 if self.gpus else 0),
                folder=storage.join(setup.run_folder, "blocks", "train"),
                labels=cluster.labels,
            )
            self._job = TrainingJob(setup.dense, config)

    def _end_training(self) -> None:
        if self._job:
            self._job.close(wait=True)
            self._job = None

    @property
    def _worker_gpu(self) -> float:
        """A training worker's part: 0 or 1 GPU, or what a replica leaves of one."""
        if not self.gpus:
            return 0
        return WORKER_GPU if self.way == "shared" else 1

    def way_in(self, nodes: Sequence[float], cpus: float) -> Way:
        """Of a cluster whose nodes have so many GPUs, and so many CPUs in all. Each process takes a
        CPU, and Ray Data one.
        """
        setup = self.setup
        if setup.sets > 1:
            return "apart" if setup.roomy else "turns"
        if not setup.trains:
            return "turns"
        way = way_alone(self.gpus)
        held = Allocation.of(setup.cluster, self.gpus, True, way)
        gpus = held.gpus
        if way == "apart" and self.gpus:
            gpus = begun(nodes, held.replicas, self.gpus) + held.workers
        need = Need(gpus, held.replicas + held.workers + 1)
        return way if need.within(Need(sum(nodes), cpus)) else "turns"

    @property
    def _fits_beside_reading(self) -> bool:
        """Whether all replicas leave a CPU to Ray Data."""
        return self.replicas * self.setup.sets < resources(self.setup.cluster).get("CPU", 0)

    def _make_room_for_reading(self) -> None:
        """Replicas may have been asked for something before."""
        if not self._fits_beside_reading:
            self._pool.close()

    def _runner_config(self, count: int, weights: Any, gpus: float) -> RunnerConfig:
        """Of so many processes in the cluster, each with so much of a GPU, or so many."""
        setup, limit = self.setup, os.environ.get("OMP_NUM_THREADS")
        processes = min(count * setup.sets, most_on_a_node(setup.cluster.labels, gpus))
        return RunnerConfig(
            self.dtype,
            setup.importance.batch,
            weights,
            min(1.0, gpus) if gpus else 1 / processes,
            processes,
            int(limit) if limit else None,
            setup.cache_gb,
            setup.cluster.compile,
            setup.cluster.deterministic,
            setup.source if setup.source.on_hub else None,
        )
