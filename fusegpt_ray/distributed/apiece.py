"""A function for each of several things, side by side: every call is a Ray task of its own, in a
process that holds its share of the cluster.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import ray
import torch
from ray.exceptions import OutOfMemoryError, RayTaskError, WorkerCrashedError

from fusegpt_ray.distributed.connection import Connection, gpus_of
from fusegpt_ray.distributed.nodes import alive_nodes, wait_for_resources
from fusegpt_ray.errors import UserError
from fusegpt_ray.recipe.cluster_section import Cluster

R = TypeVar("R")


def apiece(
    function: Callable[..., R], calls: Sequence[tuple[Any, ...]], cluster: Cluster
) -> Iterator[tuple[int, R]]:
    """Yield (number, `function(device, *call)`) as calls end. `device` is "cuda" where the cluster
    has GPUs, of which each call takes one (or `cluster.gpus_per_replica`), else "cpu".

    A call whose process is lost is made again a few times, so `function` must be safe to repeat.
    What a call raises is raised as it is, and ends the others.

    Raises:
        UserError: the cluster is not there, has no place for a single call, or loses the process
            of one again and again.
    """
    connection = Connection.open(cluster)
    waiting: list[ray.ObjectRef] = []
    try:
        gpus = gpus_of(cluster)
        try:
            wait_for_resources(gpus, 1, cluster, grows=not connection.own)
        except UserError as error:  # it names keys of runs, which have replicas and workers
            raise _unfit(error.problem) from error
        where = {"label_selector": cluster.labels} if cluster.labels else {}
        task = ray.remote(_call).options(num_cpus=1, num_gpus=gpus, **where)
        threads = _threads(len(calls))
        numbers = {
            task.remote(function, gpus, threads, call): number for number, call in enumerate(calls)
        }
        waiting = list(numbers)
        while waiting:
            (done,), waiting = ray.wait(waiting, num_returns=1)
            yield numbers[done], ray.get(done)
    except RayTaskError as error:
        if isinstance(error.cause, Exception):
            raise error.cause from error  # as the function raised it, not wrapped in Ray's
        raise
    except (OutOfMemoryError, WorkerCrashedError) as error:
        raise _unfit("a process was lost, probably for want of memory") from error
    finally:
        for ref in waiting:
            ray.cancel(ref, force=True)
        connection.close()


def _unfit(problem: str) -> UserError:
    """What is said of a cluster on which the calls cannot be made."""
    fix = "use local, where one call follows another, or a larger cluster"
    return UserError("cluster.engine", "ray", problem, fix)


def _threads(calls: int) -> int:
    """Of torch, for each of so many calls: they share the cores of the nodes."""
    cores = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
    return max(1, cores // math.ceil(calls / len(alive_nodes())))


def _call(function: Callable[..., R], gpus: float, threads: int, call: tuple[Any, ...]) -> R:
    if gpus and not torch.cuda.is_available():
        raise RuntimeError(
            "Ray gave this task a GPU, and torch cannot use it: check the driver and torch's CUDA"
            " build"
        )
    torch.set_num_threads(threads)
    return function("cuda" if gpus else "cpu", *call)
