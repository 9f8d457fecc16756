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
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
import ray.train
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fusegpt_ray.distributed.mailbox import Mailbox, Outcome
from fusegpt_ray.distributed.meeting import TIMEOUT, Meeting, lost_worker
from fusegpt_ray.distributed.process import RunnerConfig
from fusegpt_ray.errors import UserError
from fusegpt_ray.model.memory import empty_cache, is_out_of_memory
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.store import storage
from fusegpt_ray.workers.base import News, TrainingWorker

MAX_RESTARTS = 100
"""Of the job, in a whole run. How often one task is attempted is counted by the mailbox."""


@dataclass(frozen=True)
class JobConfig:
    """The training workers of a run."""

    count: int
    cpus: float
    gpus: float
    """That each takes of the cluster: a GPU, or the part of one that a replica leaves; 0 on CPUs.
    """
    zero_stage: int
    runner: RunnerConfig
    folder: str
    """Where Ray Train keeps files of its own, in reach of all nodes."""
    timeout: float = TIMEOUT
    """Seconds that a worker may be silent before the others give it up."""


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
            _serve,
            torch_config=TorchConfig(timeout_s=math.ceil(config.timeout)),
            train_loop_config={"dense": dense, "config": config, "mailbox": self._mailbox},
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


def _serve(job: dict[str, Any]) -> None:
    """A training worker: take tasks until there are no more."""
    config, mailbox = job["config"], job["mailbox"]
    rank, process = ray.train.get_context().get_world_rank(), secrets.token_hex(8)
    with Meeting.of_group(config.timeout) as meeting:
        worker: TrainingWorker | None = None
        last = 0
        while taken := ray.get(mailbox.take.remote(last, rank, process)):
            last, (task,) = taken
            try:
                worker = worker or _worker(job, rank, meeting)
                function, arguments = ray.get(task)
                result = function(worker, *arguments)
            except Exception as error:
                if _fails(error, partial(mailbox.fail.remote, last), config.timeout):
                    raise
            else:
                ray.get(mailbox.finish.remote(last, rank, result))
            if worker:
                worker.runner.offload()  # replicas need the GPU now
            empty_cache()


def _worker(job: dict[str, Any], rank: int, meeting: Meeting) -> TrainingWorker:
    config, mailbox, device = job["config"], job["mailbox"], get_device()

    def report(news: News) -> None:
        mailbox.report.remote(news)

    return TrainingWorker(
        rank=rank,
        count=config.count,
        device=device,
        zero_stage=config.zero_stage,
        runner=config.runner.runner(job["dense"], device),
        report=report,
        meet=meeting.wait,
        timeout=config.timeout,
    )


def _fails(error: Exception, fail: Callable[..., Any], timeout: float) -> bool:
    """Tell the driver what a task raised; whether the workers must start again.

    A loss that is not finite is the same on all workers, which go on to the next task. After
    anything else, others may wait in a collective.
    """
    if isinstance(error, FloatingPointError):
        ray.get(fail(pickle.dumps(error), True))
        return False
    if is_out_of_memory(error):
        ray.get(fail(pickle.dumps(MemoryError(str(error))), True))
        return True
    if lost := lost_worker(error, timeout):
        ray.get(fail(pickle.dumps(lost), False))
        return True
    ray.get(fail(_pickled(error), isinstance(error, UserError)))
    return True


def _pickled(error: Exception) -> bytes:
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
    except Exception:  # an exception of a library may not survive it
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
    return data


def _place(folder: str) -> dict[str, Any]:
    """Where Ray Train keeps its own files: anywhere fsspec reaches."""
    fs, path = storage.filesystem(folder)
    if "file" in fs.protocol:
        return {"storage_path": path}
    return {"storage_path": path, "storage_filesystem": PyFileSystem(FSSpecHandler(fs))}
