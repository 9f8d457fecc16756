"""How long training workers wait for each other: real processes, slow, stopped (SIGSTOP), hung, or
never there."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fusegpt_ray.distributed.meeting import Meeting, lost_worker
from fusegpt_ray.training.batch import LossBatch

pytestmark = pytest.mark.integration

TIMEOUT = 3.0
LOADED = 5
"""Times as long as it should take, on a machine that is busy."""
Part = Callable[[int, int, Path], None]
"""What a worker does, given its rank, their number and a folder for what it tells."""


def meet(folder: Path, where: str, rank: int, count: int) -> None:
    """By files, for what the tests themselves need."""
    (folder / f"{where}-{rank}").touch()
    while len(list(folder.glob(f"{where}-*"))) < count:
        time.sleep(0.01)


def work(part: Part, rank: int, count: int, port: int, folder: Path, started: int) -> None:
    """One worker. It stays until it is killed, as Ray keeps those of a group until all are done."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
    os.environ["DS_ACCELERATOR"] = "cpu"  # also where there is a GPU
    os.environ["FUSEGPT_RETRY_SECONDS"] = "0"
    meet(folder, "started", rank, started)  # on a busy machine they need not begin together
    began = time.monotonic()
    try:
        bound = timedelta(seconds=TIMEOUT)
        where = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", where, bound, count, rank)
        began = time.monotonic()
        part(rank, count, folder)
        error = ""
    except Exception as caught:
        error = str(lost_worker(caught, TIMEOUT) or f"{type(caught).__name__}: {caught}")
    note = folder / f"{rank}.part"
    note.write_text(json.dumps([error, time.monotonic() - began]))
    note.rename(folder / f"{rank}.json")
    time.sleep(600)


@pytest.fixture
def group(free_port, tmp_path: Path) -> Iterator[Callable[..., dict[int, tuple[str, float]]]]:
    """Run `part` in processes of these ranks; the error and the seconds of each that is to end."""
    started: list[BaseProcess] = []

    def run(
        part: Part, ranks: list[int], ending: list[int], count: int = 3
    ) -> dict[int, tuple[str, float]]:
        context, port = multiprocessing.get_context("spawn"), free_port()
        for rank in ranks:
            given = (part, rank, count, port, tmp_path, len(ranks))
            started.append(context.Process(target=work, args=given, daemon=True))
            started[-1].start()
        notes = {rank: tmp_path / f"{rank}.json" for rank in ending}
        until = time.monotonic() + 100
        while not all(note.exists() for note in notes.values()):
            assert time.monotonic() < until, sorted(path.name for path in tmp_path.iterdir())
            time.sleep(0.05)
        return {rank: tuple(json.loads(note.read_text())) for rank, note in notes.items()}

    yield run
    for process in started:
        process.kill()
        process.join()


def slow(rank: int, count: int, folder: Path) -> None:
    """Between collectives, the last one reads and then the first one writes, for longer than anyone
    may be silent."""
    with Meeting.of_group(TIMEOUT) as meeting:
        time.sleep(TIMEOUT * 1.5 if rank == count - 1 else 0)
        meeting.wait()
        dist.all_reduce(torch.ones(1))
        time.sleep(TIMEOUT * 3 if rank == 0 else 0)
        meeting.wait(moved=100_000_000)
        dist.all_reduce(torch.ones(1))


def test_slow_work_of_one_is_waited_for(group) -> None:
    ended = group(slow, [0, 1, 2], [0, 1, 2])
    assert [error for error, _ in ended.values()] == ["", "", ""]
    assert all(4.5 * TIMEOUT <= seconds < 4.5 * TIMEOUT * LOADED for _, seconds in ended.values())


def stop(who: int, rank: int, folder: Path) -> None:
    """Stop ourselves, once the others have nothing left to ask that we would have to answer."""
    meet(folder, "here", rank, 3)
    if rank == who:
        os.kill(os.getpid(), signal.SIGSTOP)


def last_stops(rank: int, count: int, folder: Path) -> None:
    with Meeting.of_group(TIMEOUT) as meeting:
        meeting.wait()
        stop(2, rank, folder)
        meeting.wait(moved=10**12)


def first_stops(rank: int, count: int, folder: Path) -> None:
    """By whose store they meet."""
    with Meeting.of_group(TIMEOUT) as meeting:
        meeting.wait()
        stop(0, rank, folder)
        meeting.wait(moved=10**12)


@pytest.mark.parametrize(
    ("part", "left", "said"),
    [
        (last_stops, [0, 1], "training worker 2 sent no heartbeat for 3 s"),
        (first_stops, [1, 2], "training worker 0, in whose store all meet, is silent for 3 s"),
    ],
)
def test_a_stopped_worker_is_given_up_within_the_bound(
    group, part: Part, left: list[int], said: str
) -> None:
    for error, seconds in group(part, [0, 1, 2], left).values():
        assert error == said
        assert TIMEOUT <= seconds < LOADED * TIMEOUT


def hangs(rank: int, count: int, folder: Path) -> None:
    with Meeting.of_group(TIMEOUT) as meeting:
        meeting.wait()
        time.sleep(600 if rank == 1 else 0)
        meeting.wait(moved=1_000_000)


def test_a_worker_that_lives_and_hangs_is_given_up_after_the_time_of_a_slow_store(group) -> None:
    for error, seconds in group(hangs, [0, 1, 2], [0, 2]).values():
        assert error == "training worker 1 lives, but did not come to the others for 7 s"
        assert 2 * TIMEOUT + 1 <= seconds < LOADED * (2 * TIMEOUT + 1)


def joins(rank: int, count: int, folder: Path) -> None:
    pass


def test_a_worker_that_never_joins_ends_the_group_within_the_bound(group) -> None:
    for error, seconds in group(joins, [0, 1], [0, 1]).values():
        assert error == "a training worker has taken no part for 3 s"
        assert seconds < LOADED * TIMEOUT


def step(rank: int, count: int, folder: Path) -> None:
    """Steps of DeepSpeed, between two of which the last worker stops."""
    # Imported here, because each process imports this file.
    from fusegpt_ray.model.recorder import Context
    from fusegpt_ray.training.deepspeed_stepper import DeepSpeedStepper
    from fusegpt_ray.training.masters import Masters
    from fusegpt_ray.training.span import Learned, Span
    from fusegpt_ray.training.stepper import TrainingConfig
    from fusegpt_ray.workers.base import TrainingWorker

    block = torch.nn.Sequential(OrderedDict(layer=torch.nn.Linear(8, 8)))
    values = {name: value.detach().clone() for name, value in block.layer.named_parameters()}
    learned = Learned([{"layer": Masters(values, torch.float32)}])
    span = Span([block], learned, [Context((), {})])
    groups = [{"params": list(learned.parameters()), "lr": 0.01}]
    config = TrainingConfig("batch_kl", batch=8, epochs=1)
    worker = TrainingWorker(
        rank, count, torch.device("cpu"), 2, None, lambda _: None, timeout=TIMEOUT
    )
    stepper = DeepSpeedStepper.make(span, groups, config, 2, worker, None)
    batch = LossBatch(torch.ones(4, 3, 8), torch.zeros(4, 3, 8))
    stepper.step(batch)
    meet(folder, "here", rank, count)
    if rank:
        os.kill(os.getpid(), signal.SIGSTOP)
    began = time.monotonic()
    try:
        stepper.step(batch)
    finally:
        (folder / "step").write_text(str(time.monotonic() - began))


def test_a_step_waits_no_longer_for_a_stopped_worker(group, tmp_path) -> None:
    (ended,) = group(step, [0, 1], [0], count=2).values()
    assert ended[0] == "a training worker has taken no part for 3 s"
    assert float((tmp_path / "step").read_text()) < LOADED * TIMEOUT
