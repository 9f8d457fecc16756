"""A training worker of the run's Ray Train job: it takes tasks from the mailbox until there are no
more.

Ray Train's controller imports this module, too, and needs nothing of what a worker needs: so what
is heavy is imported where a worker begins.
"""

from __future__ import annotations

import pickle
import secrets
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import ray
import ray.train
from ray.train.torch import get_device

if TYPE_CHECKING:
    from fusegpt_ray.distributed.meeting import Meeting
    from fusegpt_ray.distributed.process import JobConfig
    from fusegpt_ray.model.stack import Stack
    from fusegpt_ray.workers.base import News, TrainingWorker


def serve(job: dict[str, Any]) -> None:
    """The loop of a training worker."""
    from fusegpt_ray.distributed.meeting import Meeting
    from fusegpt_ray.model.memory import empty_cache

    mailbox = job["mailbox"]
    dense, config = ray.get(job["job"])
    rank, process = ray.train.get_context().get_world_rank(), secrets.token_hex(8)
    with Meeting.of_group(config.timeout) as meeting:
        worker: TrainingWorker | None = None
        last = 0
        while taken := ray.get(mailbox.take.remote(last, rank, process)):
            last, (task,) = taken
            try:
                worker = worker or _worker(dense, config, mailbox, rank, meeting)
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


def _worker(
    dense: Stack, config: JobConfig, mailbox: Any, rank: int, meeting: Meeting
) -> TrainingWorker:
    from fusegpt_ray.workers.base import TrainingWorker

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
    )


def _fails(error: Exception, fail: Callable[..., Any], timeout: float) -> bool:
    """Tell the driver what a task raised; whether the workers must start again.

    A loss that is not finite is the same on all workers, which go on to the next task. After
    anything else, others may wait in a collective.
    """
    from fusegpt_ray.distributed.meeting import lost_worker
    from fusegpt_ray.errors import UserError
    from fusegpt_ray.model.memory import is_out_of_memory

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
