"""The run's Ray Train job, and what its workers do: they take tasks from the mailbox until there
are no more.

The mailbox's process and Ray Train's controller import this module, too, and need little of what a
worker needs: so what is heavy is imported where a worker begins.
"""

from __future__ import annotations

import math
import os
import pickle
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import ray

if TYPE_CHECKING:
    from fusegpt_ray.distributed.meeting import Meeting
    from fusegpt_ray.distributed.process import JobConfig
    from fusegpt_ray.model.stack import Stack
    from fusegpt_ray.workers.base import News, Notices, TrainingWorker


class OneGpuError(RuntimeError):
    """Two training workers are on the same GPU, where they cannot train: NCCL refuses it."""


@dataclass(frozen=True)
class Job:
    """All that the job's start takes."""

    mailbox: Any
    task: Any
    """A reference to (dense stack, `JobConfig`), so that only workers read, and thereby import,
    these."""
    workers: int
    resources: dict[str, float]
    """Of each worker."""
    timeout: float
    """Seconds that a worker may be silent before the others give it up."""
    max_failures: int
    folder: str
    """Where Ray Train keeps files of its own, in reach of all nodes."""
    labels: dict[str, str]
    """Of the nodes on which workers run."""

    def fit(self) -> None:
        """Run the job to its end."""
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
        TorchTrainer(
            serve,
            torch_config=TorchConfig(timeout_s=math.ceil(self.timeout)),
            train_loop_config={"mailbox": self.mailbox, "task": self.task},
            scaling_config=ScalingConfig(
                num_workers=self.workers,
                use_gpu=self.resources.get("GPU", 0) > 0,
                resources_per_worker=self.resources,
                label_selector=self.labels or None,
            ),
            run_config=RunConfig(
                name=f"training-{secrets.token_hex(4)}",  # a known name would be gone on from
                failure_config=FailureConfig(max_failures=self.max_failures),
                **_place(self.folder),
            ),
        ).fit()


def serve(job: dict[str, Any]) -> None:
    """The loop of a training worker.

    What becomes of a task is told once the worker has made room: the driver goes on at once, and
    replicas need the GPU. After an error that ends the process, its memory goes with it: before
    that it must not wait for the GPU, where a collective may wait for a worker that is lost.
    """
    import ray.train

    from fusegpt_ray.distributed.meeting import Meeting
    from fusegpt_ray.errors import Terminated
    from fusegpt_ray.model.memory import empty_cache

    mailbox = job["mailbox"]
    dense, config = ray.get(job["task"])
    rank, process = ray.train.get_context().get_world_rank(), secrets.token_hex(8)
    with Meeting.of_group(config.timeout) as meeting:
        worker: TrainingWorker | None = None
        last = 0
        while taken := ray.get(mailbox.take.remote(last, rank, process)):
            last, (task,) = taken
            tell: Callable[[], Any]
            try:
                worker = worker or _worker(dense, config, mailbox, rank, meeting)
                function, arguments = ray.get(task)
                result = function(worker, *arguments)
            except Terminated as told:  # all of them, at the same step
                tell = partial(mailbox.fail.remote, last, pickle.dumps(told), True)
            except (FloatingPointError, OneGpuError) as error:  # the same on all, which go on
                tell = partial(mailbox.fail.remote, last, pickle.dumps(error), True)
            except Exception as error:  # others may wait in a collective: all start again
                ray.get(mailbox.fail.remote(last, *_told(error, config.timeout)))
                raise
            else:
                tell = partial(mailbox.finish.remote, last, rank, result)
            if worker:
                worker.runner.offload()
            empty_cache()  # here, where no error holds the frames in which it was raised
            ray.get(tell())


def _worker(
    dense: Stack, config: JobConfig, mailbox: Any, rank: int, meeting: Meeting
) -> TrainingWorker:
    from ray.train.torch import get_device

    from fusegpt_ray.workers.base import TrainingWorker

    _check_own_gpu(meeting)  # before anything uses it
    device = get_device()

    def report(news: News) -> None:
        mailbox.report.remote(news)

    return TrainingWorker(
        rank=rank,
        count=config.count,
        device=device,
        zero_stage=config.zero_stage,
        runner=config.runner.runner(dense, device),
        report=report,
        meet=meeting.wait,
        timeout=config.timeout,
        notices=_notices(mailbox),
    )


def _check_own_gpu(meeting: Meeting) -> None:
    """
    Raises:
        OneGpuError: two workers are on one GPU. All of them raise it.
    """
    context = ray.get_runtime_context()
    gpus = ",".join(context.get_accelerator_ids().get("GPU", []))
    places = meeting.told(f"GPU {gpus} of node {context.get_node_id()}" if gpus else "")
    twice = [place for place in places if place and places.count(place) > 1]
    if twice:
        ranks = [str(rank) for rank, place in enumerate(places) if place == twice[0]]
        raise OneGpuError(
            f"training workers {' and '.join(ranks)} were given {twice[0]}, and each needs one of "
            "its own: check that Ray counts each GPU once (`ray list nodes --detail`)"
        )


def _notices(mailbox: Any) -> Notices:
    """From the driver, and from Ray, which tells all workers of a node that is being drained."""
    import ray.train

    from fusegpt_ray.workers.base import Notices

    told = mailbox.told_to_end.remote()
    about: Any = None

    def ended() -> bool:
        return bool(ray.wait([told], timeout=0)[0])

    def leaving() -> bool:
        nonlocal about
        before, about = about, ray.train.get_preemption_info()
        return about not in (None, before)

    # Older versions of Ray Train tell nothing.
    return Notices(ended, leaving) if hasattr(ray.train, "get_preemption_info") else Notices(ended)


def _told(error: Exception, timeout: float) -> tuple[bytes, bool]:
    """An error as the driver is told of it, and whether it ends the task for good."""
    from fusegpt_ray.distributed.meeting import lost_worker
    from fusegpt_ray.errors import UserError
    from fusegpt_ray.model.memory import is_out_of_memory

    if is_out_of_memory(error):
        return pickle.dumps(MemoryError(str(error))), True
    if lost := lost_worker(error, timeout):
        return pickle.dumps(lost), False
    return _pickled(error), isinstance(error, UserError)


def _pickled(error: Exception) -> bytes:
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
    except Exception:  # an exception of a library may not survive it
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
    return data


def _place(folder: str) -> dict[str, Any]:
    """Where Ray Train keeps its own files: anywhere fsspec reaches."""
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    from fusegpt_ray.store import storage

    class WithoutFolders(FSSpecHandler):
        """An object store has none, and s3fs makes the bucket where it may not look at it."""

        def create_dir(self, path: str, recursive: bool) -> None:
            pass

    fs, path = storage.filesystem(folder)
    if "file" in fs.protocol:
        return {"storage_path": path}
    return {"storage_path": path, "storage_filesystem": PyFileSystem(WithoutFolders(fs))}
