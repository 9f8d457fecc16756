"""A Ray Train job whose workers are killed, or stop, ends with the same bytes; what they had learned
until a savepoint is not learned again."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from models import token_windows
from test_training import BATCH, EPOCHS, LENGTH, REPLICA, WINDOWS, learn_in_torch, task

from fusegpt_ray.distributed import scoring, training
from fusegpt_ray.distributed.replicas import Replicas
from fusegpt_ray.distributed.states import datasets, group_states_of_workers
from fusegpt_ray.distributed.training import Workers
from fusegpt_ray.training.checkpoints import Savepoints

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("ray_session"),
]

TWO = Workers(count=2, cpus=1, gpus=0, threads=1, dtype=torch.float32, zero_stage=1, micro_batch=2)
KILLED = 4
"""The epoch at whose beginning a worker is killed."""


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every block file."""
    found = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.glob("*.safetensors")
    }
    assert len(found) == 6
    return found


Fit = Callable[..., tuple[list[float], list[int]]]


@pytest.fixture(scope="module")
def fit(ray_session, checkpoint) -> Fit:
    """Two workers train the group; `change` wraps the first one's data. The losses, the epochs heard of.

    `minutes`: between savepoints, if there are any.
    """
    dense = task(checkpoint("llama"), "batch_kl", 0, 1).job
    replicas = Replicas(dense.dense, REPLICA)
    states = datasets(
        group_states_of_workers(
            dense, token_windows(WINDOWS, LENGTH).numpy(), TWO.count, replicas, BATCH
        )
    )
    first = states.pop("states-0").repartition(1).materialize()
    contexts = scoring.contexts(TWO.micro_batch, LENGTH, replicas)
    replicas.close()

    def fit(
        out: Path,
        change: Callable[[ray.data.Dataset], ray.data.Dataset] = lambda data: data,
        minutes: float | None = None,
        say: Callable[[str], None] = print,
        workers: Workers = TWO,
    ) -> tuple[list[float], list[int]]:
        job = replace(dense, folder=str(out))
        kept = (
            None
            if minutes is None
            else Savepoints.of(job, minutes, TWO.micro_batch, **training.setup(TWO))
        )
        heard: list[int] = []

        def epoch(number: int, _: float) -> None:
            heard.append(number)

        shards = {"states-0": change(first), **states}
        saved, losses = training.finetune(
            job, contexts, WINDOWS, shards, workers, str(out / "train"), epoch, kept, say
        )
        assert saved.blocks.keys() == {block.dense for block in job.neighbours}
        assert not (out / "train").exists()
        return losses, heard

    return fit


Step = Callable[[dict[str, Any]], dict[str, Any]]


def kill_a_worker(marks: Path, epoch: int, by: signal.Signals = signal.SIGKILL) -> Step:
    """A step of a worker's data that, when this epoch first comes, sends the signal to one of the
    training workers of its own Ray."""
    marks.mkdir()

    def step(batch: dict[str, Any]) -> dict[str, Any]:
        number = len(list(marks.iterdir())) + 1
        (marks / str(number)).touch()
        if number == epoch:
            siblings = psutil.Process(
                os.getppid()
            ).children()  # all workers of a node are its raylet's children
            trainers = [
                process for process in siblings if "RayTrainWorker" in " ".join(process.cmdline())
            ]
            assert len(trainers) == TWO.count, trainers
            trainers[-1].send_signal(by)
        return batch

    return step


@pytest.fixture(scope="module")
def undisturbed(fit: Fit, checkpoint, tmp_path_factory) -> tuple[dict[str, str], list[float]]:
    """Hashes and losses of a job that nobody disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    losses, heard = fit(folder)
    assert heard == [1, 2, 3, 4, 5]
    assert losses == pytest.approx(learn_in_torch(checkpoint("llama"), "batch_kl").losses, rel=1e-5)
    return hashes(folder), losses


def test_without_savepoints_all_is_learned_again(undisturbed, fit: Fit, tmp_path: Path) -> None:
    killer = kill_a_worker(tmp_path / "marks", epoch=2)
    losses, heard = fit(tmp_path, lambda data: data.map_batches(killer, batch_size=None))
    assert heard == [1, 1, 2, 3, 4, 5]
    assert len(list((tmp_path / "marks").iterdir())) == 2 + EPOCHS
    assert (hashes(tmp_path), losses) == undisturbed


def test_a_killed_worker_costs_the_epochs_since_the_last_savepoint(
    undisturbed, fit: Fit, tmp_path: Path
) -> None:
    said: list[str] = []
    killer = kill_a_worker(tmp_path / "marks", epoch=KILLED)
    wrap = lambda data: data.map_batches(killer, batch_size=None)  # noqa: E731
    losses, heard = fit(tmp_path, wrap, minutes=0, say=said.append)
    assert heard == [1, 2, 3, 4, 5]
    assert said == [f"  going on after epoch {KILLED - 1} of {EPOCHS}"]
    assert (
        len(list((tmp_path / "marks").iterdir())) == EPOCHS + 1
    )  # the data were read once for each epoch, and for the broken one
    assert (hashes(tmp_path), losses) == undisturbed


def test_a_worker_that_stops_is_given_up_and_costs_as_much(
    undisturbed, fit: Fit, tmp_path: Path
) -> None:
    """The connection to it stays, and nothing comes from it."""
    said: list[str] = []
    stopper = kill_a_worker(tmp_path / "marks", KILLED, signal.SIGSTOP)
    wrap = lambda data: data.map_batches(stopper, batch_size=None)  # noqa: E731
    began = time.monotonic()
    losses, heard = fit(
        tmp_path, wrap, minutes=0, say=said.append, workers=replace(TWO, patience=8)
    )
    assert time.monotonic() - began < 180
    assert heard == [1, 2, 3, 4, 5]
    warning, going_on = said
    silence = (
        r"WARNING: .*(no sign of life|is silent|no part) for 8 s; this attempt at the group ends"
    )
    assert re.fullmatch(silence, warning)
    assert going_on == f"  going on after epoch {KILLED - 1} of {EPOCHS}"
    assert (hashes(tmp_path), losses) == undisturbed
    stopped = [
        one
        for one in psutil.Process().children(recursive=True)
        if one.status() == psutil.STATUS_STOPPED
    ]
    assert stopped == []


def test_a_run_that_was_given_up_goes_on(
    undisturbed, fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody starts the workers again: the job fails, as if its driver had been killed, and the same is begun by another."""
    said: list[str] = []
    killer = kill_a_worker(tmp_path / "marks", epoch=KILLED)
    wrap = lambda data: data.map_batches(killer, batch_size=None)  # noqa: E731
    monkeypatch.setattr(training, "MAX_FAILURES", 0)
    with pytest.raises(ray.train.TrainingFailedError):
        fit(tmp_path, wrap, minutes=0)
    losses, heard = fit(tmp_path, minutes=1e6, say=said.append)
    assert heard == [4, 5]
    assert said == [f"  going on after epoch {KILLED - 1} of {EPOCHS}"]
    assert (hashes(tmp_path), losses) == undisturbed
