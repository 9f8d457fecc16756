"""One Ray Train job for the whole run: its workers train span after span, each time with DeepSpeed.

- The job starts once. Its workers take tasks from a mailbox and keep their process, their process
  group and their CUDA context in between.
- Where a worker's memory runs out, the others may wait for it in a collective. So it leaves the
  error in the mailbox and fails; Ray Train starts all of them again, and they take the next task.
- A lost worker ends the attempt within `timeout` seconds, and slow work of a single one does not
  (see `meeting.py`).
"""

from __future__ import annotations

import math
import pickle
import secrets
import threading
from collections.abc import Callable
from typing import Any

import ray
import ray.train
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fusegpt_ray.distributed.mailbox import Mailbox, Outcome
from fusegpt_ray.distributed.process import JobConfig
from fusegpt_ray.distributed.serve import serve
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.store import storage
from fusegpt_ray.workers.base import News

MAX_RESTARTS = 100
"""Of the job, in a whole run. How often one task is attempted is counted by the mailbox."""


class TrainingJob:
    """The driver's side."""

    def __init__(self, dense: Stack, config: JobConfig) -> None:
        self.config = config
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        mailbox = Mailbox.options(scheduling_strategy=here)  # type: ignore[attr-defined]
        self._mailbox = mailbox.remote(config.count)
        self._ended: Exception | None = None
        trainer = self._trainer(dense)
        self._thread = threading.Thread(target=self._fit, args=(trainer,), daemon=True)
        self._thread.start()

    def run(
        self,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        news: Callable[[News], None],
    ) -> list[Any]:
        """See `workers.base.Workers.spmd`."""
        task = ray.put((function, arguments))
        ray.get(self._mailbox.post.remote([task]))
        while True:
            alive = self._thread.is_alive()
            outcome: Outcome = ray.get(self._mailbox.outcome.remote(1.0))
            for item in outcome.news:
                news(item)
            if outcome.error:
                raise pickle.loads(outcome.error)
            if outcome.results is not None:
                return outcome.results
            if not alive:
                raise RuntimeError("the training job ended before its task") from self._ended

    def close(self, wait: bool) -> None:
        """Let the workers end; with `wait`, until Ray Train has given back what they took."""
        ray.get(self._mailbox.close.remote())
        if wait:
            self._thread.join(60)
        storage.remove(self.config.folder, recursive=True)

    def _trainer(self, dense: Stack) -> TorchTrainer:
        config = self.config
        resources = {"CPU": config.cpus} | ({"GPU": config.gpus} if config.gpus else {})
        return TorchTrainer(
            serve,
            torch_config=TorchConfig(timeout_s=math.ceil(config.timeout)),
            # By reference, so that Ray Train's controller does not read, and thereby import, it.
            train_loop_config={"job": ray.put((dense, config)), "mailbox": self._mailbox},
            scaling_config=ScalingConfig(
                num_workers=config.count,
                use_gpu=config.gpus > 0,
                resources_per_worker=resources,
            ),
            run_config=RunConfig(
                name=f"training-{secrets.token_hex(4)}",  # a known name would be gone on from
                failure_config=FailureConfig(max_failures=MAX_RESTARTS),
                **_place(config.folder),
            ),
        )

    def _fit(self, trainer: TorchTrainer) -> None:
        try:
            trainer.fit()
        except Exception as error:  # of whatever kind: `run` raises it in the driver's main thread
            self._ended = error


def _place(folder: str) -> dict[str, Any]:
    """Where Ray Train keeps its own files: anywhere fsspec reaches."""
    fs, path = storage.filesystem(folder)
    if "file" in fs.protocol:
        return {"storage_path": path}
    return {"storage_path": path, "storage_filesystem": PyFileSystem(FSSpecHandler(fs))}
