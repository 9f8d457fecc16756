"""This process's place in a Ray cluster: joining one, or starting a Ray where none runs."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import grpc
import ray
from ray._private import ray_constants
from ray._private.gcs_utils import create_gcs_channel

from fusegpt_ray.distributed.nodes import resources
from fusegpt_ray.errors import Terminated, UserError
from fusegpt_ray.recipe.cluster_section import Cluster

UNSEEN = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1"}
"""Has Ray set CUDA_VISIBLE_DEVICES to nothing for processes that asked for no GPU. Left to itself,
Ray lets them see all GPUs of their node, and a library that takes one takes memory from whom it was
given to."""

ANSWER_SECONDS = 20.0
"""In which a cluster answers, if only that it is there."""


@dataclass(frozen=True)
class Connection:
    """What `close` is to undo."""

    made: bool
    """Whether ray.init was called for it; the caller's own Ray is left as it is."""
    own: bool
    """Whether that started a Ray on this machine, which no other joins."""

    @classmethod
    def open(cls, cluster: Cluster, sets: Sequence[Cluster] = ()) -> Self:
        """Join the cluster that the recipe or RAY_ADDRESS names, else start a local Ray on the
        loopback interface; nothing happens where this process is in one already. Processes of this
        run see the GPUs they were given, and no others.

        `sets`: what several sets of processes ask for, for which a local Ray is to have room at the
        same time; none: for one of this `cluster`.

        Raises:
            UserError: no cluster answers at the address.
        """
        if ray.is_initialized():
            return cls(False, False)
        with _own_sigterm():
            return cls._joined(cluster, sets)

    @classmethod
    def _joined(cls, cluster: Cluster, sets: Sequence[Cluster]) -> Self:
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # our display is the only one
        address = cluster.address or os.environ.get("RAY_ADDRESS")
        # What a submitted job sets is here, too, and Ray refuses to be told the same twice.
        unseen = {name: value for name, value in UNSEEN.items() if name not in os.environ}
        quiet = {"logging_level": logging.ERROR, "log_to_driver": False, "configure_logging": True}
        if address:
            try:
                _check_that_it_answers(address)
                ray.init(address=address, runtime_env={"env_vars": unseen}, **quiet)
            except (ConnectionError, ValueError) as error:
                key = "cluster.address" if cluster.address else "RAY_ADDRESS"
                fix = f"check that the cluster runs there, or leave {key} out"
                problem = f"no Ray cluster answers ({error})"
                raise UserError(key, address, problem, fix) from error
            return cls(True, False)
        store = cluster.object_store_gb
        processes = sum(
            max(one.replicas, one.workers) + one.workers + 1 for one in sets or [cluster]
        )
        with _loopback(), _inherited(unseen):
            ray.init(
                address="local",
                _node_ip_address="127.0.0.1",
                # A coordinator mostly waits: on a machine with few cores it must never hold up the
                # work.
                num_cpus=max(4, os.cpu_count() or 1, processes),
                include_dashboard=False,
                object_store_memory=int(store * 1e9) if store else None,
                **quiet,
            )
        return cls(True, True)

    def close(self) -> None:
        if self.made:
            ray.shutdown()


def asked(cluster: Cluster) -> dict[str, float]:
    """What the cluster has that is named, where `cluster.labels` lets processes run; Ray's names.

    Raises:
        UserError: no cluster answers.
    """
    connection = Connection.open(cluster)
    try:
        return resources(cluster)
    finally:
        connection.close()


def gpus_of(cluster: Cluster) -> float:
    """GPUs that each process takes."""
    if cluster.gpus_per_replica is not None:
        return cluster.gpus_per_replica
    return 1.0 if resources(cluster).get("GPU", 0) else 0.0


def _check_that_it_answers(address: str) -> None:
    """Ray would wait for minutes where a port is open and nothing comes from it, or nothing comes
    back at all.

    Raises:
        ConnectionError: nothing at this address (host:port) speaks as a Ray cluster does.
    """
    if "://" in address or ":" not in address:  # "auto", say
        return
    channel = create_gcs_channel(address)
    try:
        grpc.channel_ready_future(channel).result(ANSWER_SECONDS)
    except grpc.FutureTimeoutError:
        raise ConnectionError(f"nothing in {ANSWER_SECONDS:g} s") from None
    finally:
        channel.close()


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Ray takes SIGTERM for itself and would leave without a word; what the program does stays."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as left:  # Ray's handler exits with the signal's number
        if left.code == signal.SIGTERM:
            raise Terminated from left
        raise
    finally:
        mine = threading.current_thread() is threading.main_thread()
        if mine and before not in (signal.SIG_DFL, None):
            signal.signal(signal.SIGTERM, before)


@contextmanager
def _loopback() -> Iterator[None]:
    """A Ray that starts here may call its node 127.0.0.1, and then opens its ports there only.

    Otherwise ray.init takes that name for the machine's own address, and its ports are open on
    every interface. It has to be told, as it is on macOS and Windows, that other machines will
    never join this Ray.
    """
    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _inherited(variables: Mapping[str, str]) -> Iterator[None]:
    """What is started in the meantime has these environment variables, which nobody has set."""
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]
