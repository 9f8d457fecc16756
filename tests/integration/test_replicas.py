"""Replicas as Ray actors: what is lost or slow is taken over by others, and nothing changes by
it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch
from models import open_stack, token_windows
from ray.exceptions import RayActorError

from fusegpt_ray.distributed import replicas as module
from fusegpt_ray.distributed import silence
from fusegpt_ray.distributed.process import RunnerConfig
from fusegpt_ray.distributed.replicas import MAX_LOST, Replicas
from fusegpt_ray.importance.ranking import Ranking
from fusegpt_ray.importance.scoring import score
from fusegpt_ray.importance.sums import Sums
from fusegpt_ray.model.runner import Runner
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.recipe.sections import Importance

pytestmark = pytest.mark.integration

TWO = RunnerConfig(torch.float32, batch_size=2, processes=2, cores=2)
WINDOWS = token_windows(12, 9).numpy()
SETTINGS = Importance(windows=12, batch=2, all=True)


@dataclass
class Pool:
    """Replicas alone, as scoring sees workers."""

    pool: Replicas

    @property
    def replicas(self) -> int:
        return self.pool.count

    @property
    def streams(self) -> bool:
        return self.pool.streams

    def map(self, *arguments: Any) -> Any:
        return self.pool.map(*arguments)


def ranked(pool: Replicas, stack: Stack, sums: Sums) -> Ranking:
    return score(Pool(pool), stack, WINDOWS, SETTINGS, None, sums)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def two(ray_session, checkpoint) -> Iterator[Replicas]:
    ray.cloudpickle.register_pickle_by_value(
        sys.modules[__name__]
    )  # replicas do not find the tests' modules
    replicas = Replicas(open_stack(checkpoint("llama")), TWO, count=2, cpus=1, gpus=0)
    yield replicas
    replicas.close()


def work(runner: Runner, number: int, folder: str, seconds: float, deadly: bool) -> int:
    """Leaves a mark that tells which process did it. A deadly share kills the first process
    that takes it.
    """
    mark = Path(folder) / f"{number}-{os.getpid()}"
    first = not list(Path(folder).glob(f"{number}-*"))
    mark.touch()
    if deadly and first:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(seconds)
    return 10 * number


def tasks(
    folder: Path, count: int, seconds: float = 0.05, deadly: tuple[int, ...] = ()
) -> list[tuple[int, str, float, bool]]:
    return [(number, str(folder), seconds, number in deadly) for number in range(count)]


def pids(folder: Path, number: int) -> list[int]:
    return [
        int(mark.name.split("-")[1])
        for mark in sorted(folder.glob(f"{number}-*"), key=lambda mark: mark.stat().st_mtime_ns)
    ]


def test_every_task_is_done_once_and_both_work(two, tmp_path) -> None:
    found = dict(two.map(work, tasks(tmp_path, 8, 0.3), 2))
    assert found == {number: 10 * number for number in range(8)}
    by = [pids(tmp_path, number) for number in range(8)]
    assert all(len(own) == 1 for own in by)
    assert len({own[0] for own in by}) == 2


def test_replicas_live_on_between_calls(two, tmp_path) -> None:
    for _ in range(2):
        dict(two.map(work, tasks(tmp_path, 2, 0.3), 2))
    assert len(list(tmp_path.iterdir())) <= 4
    assert len({pid for number in range(2) for pid in pids(tmp_path, number)}) == 2


def test_a_lost_replicas_task_is_done_by_another(two, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(
        module, "SLOW_SECONDS", 120.0
    )  # a replacement that starts slowly is not taken for overdue
    found = dict(two.map(work, tasks(tmp_path, 6, deadly=(1, 4)), 2))
    assert found == {number: 10 * number for number in range(6)}
    assert [len(pids(tmp_path, number)) for number in range(6)] == [1, 2, 1, 1, 2, 1]
    assert dict(two.map(work, tasks(tmp_path, 2), 2)) == {0: 0, 1: 10}


def test_a_task_that_kills_every_replica_is_given_up(two, tmp_path) -> None:
    with pytest.raises(RayActorError):
        list(two.map(_kill, [(str(tmp_path),)], 2))
    assert len(list(tmp_path.iterdir())) == MAX_LOST + 1
    assert dict(two.map(work, tasks(tmp_path, 2), 2)) == {0: 0, 1: 10}


def _kill(runner: Runner, folder: str) -> None:
    (Path(folder) / str(os.getpid())).touch()
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_replica_whose_gpu_fails_is_replaced(two, tmp_path) -> None:
    """Nothing that it would do later succeeded."""
    found = dict(two.map(_break, [(str(tmp_path), number) for number in range(4)], 2))
    assert found == {number: 10 * number for number in range(4)}
    (broken,) = pids(tmp_path, 0)
    two.offload()  # the other one has started
    by = set(dict(two.map(_pid, [(0.3,)] * 8, 2)).values())
    assert len(by) == 2 and broken not in by


def _break(runner: Runner, folder: str, number: int) -> int:
    """The first process that is given task 0 does nothing more."""
    mark = Path(folder) / f"0-{os.getpid()}"
    if mark.exists() or (number == 0 and not list(Path(folder).iterdir())):
        mark.touch()
        raise torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered")
    return 10 * number


def _pid(runner: Runner, seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def test_a_task_that_breaks_every_gpu_is_given_up_and_memory_is_no_such_fault(
    two, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(module, "MAX_LOST", 1)
    for error, processes in (("device-side assert triggered", 2), ("out of memory", 1)):
        folder = tmp_path / error
        folder.mkdir()
        with pytest.raises(torch.AcceleratorError, match=error):
            list(two.map(_fails_on_gpu, [(str(folder), f"CUDA error: {error}")], 2))
        assert len(list(folder.iterdir())) == processes
    assert dict(two.map(work, tasks(tmp_path, 2), 2)) == {0: 0, 1: 10}


def _fails_on_gpu(runner: Runner, folder: str, error: str) -> None:
    (Path(folder) / str(os.getpid())).touch()
    raise torch.AcceleratorError(error)


def test_replicas_that_are_lost_before_training_are_replaced(two) -> None:
    two.offload()  # both are there
    lost = set(dict(two.map(_pid, [(0.3,)] * 8, 2)).values())
    ray.kill(two._idle[0])
    for _ in range(2):  # the second time, the new one has started
        two.offload()
    by = set(dict(two.map(_pid, [(0.3,)] * 8, 2)).values())
    assert len(by) == 2 and len(by & lost) == 1


def test_a_replica_that_does_not_make_room_is_replaced(two, monkeypatch, caplog) -> None:
    """SIGSTOP: Ray takes it for alive."""
    two.offload()  # both are there
    before = set(dict(two.map(_pid, [(0.3,)] * 8, 2)).values())
    stopped = psutil.Process(min(before))
    monkeypatch.setattr(silence, "TIMEOUT", 3.0)
    stopped.suspend()
    try:
        two.offload()
        stopped.wait(30)  # else its GPU would not be free
    finally:
        if stopped.is_running():
            stopped.resume()
    (said,) = [text for text in caplog.messages if "has not answered for 3 s" in text]
    assert re.match("a replica on node [0-9a-f]{56} has not answered .*: another takes", said)
    monkeypatch.undo()
    two.offload()  # the new one is there
    after = set(dict(two.map(_pid, [(0.3,)] * 8, 2)).values())
    assert len(after) == 2 and after & before == before - {stopped.pid}


@pytest.mark.parametrize(("device", "room"), [("cuda", 500), ("cpu", 250)])
def test_a_replica_has_its_part_of_a_device(monkeypatch, device: str, room: int) -> None:
    """With `gpus_per_replica: 0.5`, another one has the other half."""
    monkeypatch.setattr(module, "device_bytes", lambda _: 1000)
    monkeypatch.setattr(module, "hardware", lambda *_: {})
    asked = {"resident": True, "compiled": False, "memory_share": 0.5, "host_share": 0.25}
    told = module._tell(SimpleNamespace(device=torch.device(device), **asked))  # type: ignore[arg-type]
    assert told.device_bytes == room


def test_a_stopped_replicas_task_is_taken_over(two, tmp_path, monkeypatch) -> None:
    """SIGSTOP: alive for Ray, but it does nothing any more."""
    monkeypatch.setattr(module, "SLOW_SECONDS", 1.0)
    dict(two.map(_fail, [(1,), (2,), (3,), (4,)], 2))  # both are there
    stopped: list[int] = []

    def stop() -> None:
        while not (found := pids(tmp_path, 1)):
            time.sleep(0.01)
        os.kill(found[0], signal.SIGSTOP)
        stopped.append(found[0])

    thread = threading.Thread(target=stop)
    thread.start()
    try:
        found = dict(two.map(work, tasks(tmp_path, 5, 0.5), 2))
        assert found == {number: 10 * number for number in range(5)}
        assert len(pids(tmp_path, 1)) == 2, "the other replica did it as well"
        thread.join()
        assert dict(two.map(work, tasks(tmp_path, 2), 2)) == {0: 0, 1: 10}, (
            "the stopped one is not waited for"
        )
    finally:
        thread.join()
        psutil.Process(stopped[0]).resume()
    time.sleep(1)
    assert dict(two.map(work, tasks(tmp_path, 4), 2)) == {
        number: 10 * number for number in range(4)
    }


def test_errors_come_through_and_the_replicas_go_on(two, tmp_path) -> None:
    with pytest.raises(ZeroDivisionError):
        list(two.map(_fail, [(1,), (0,)], 2))
    assert dict(two.map(work, tasks(tmp_path, 2), 2)) == {0: 0, 1: 10}


def _fail(runner: Runner, number: int) -> float:
    return 1 / number


class Sent:
    """Counts how often it is pickled here; a replica gets a word in its place."""

    times = 0

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        Sent.times += 1
        return str, ("sent",)


def test_what_all_tasks_share_is_sent_once(two, monkeypatch) -> None:
    """A large model's stack is an argument of hundreds of tasks."""
    monkeypatch.setattr(module, "SLOW_SECONDS", 120.0)  # no task is given out a second time
    shared, mine = Sent(), [Sent(), Sent()]
    found = dict(two.map(_given, [(n, shared, -n, mine[n % 2]) for n in range(6)], 2))
    assert found == {n: (2, n, "sent", -n, "sent") for n in range(6)}
    assert Sent.times == 1 + 6


def _given(runner: Runner, *arguments: Any) -> tuple[Any, ...]:
    return (runner.batch_size, *arguments)


def test_scores_do_not_depend_on_replicas_nor_on_how_they_hold_weights(two: Replicas) -> None:
    config = replace(TWO, weights="streamed")
    streamed = Replicas(two.dense, config, count=1, cpus=1, gpus=0)
    assert streamed.streams and not two.streams
    assert ranked(streamed, two.dense, Sums()).scores == ranked(two, two.dense, Sums()).scores
    streamed.close()


def test_sums_come_as_they_are_measured_and_are_not_measured_again(two) -> None:
    stack = two.dense
    sums, changes = Sums(), []
    sums.changed = lambda: changes.append(len(sums.known))
    ranking = ranked(two, stack, sums)
    assert changes == [1, 2, 3, 4, 5, 6]
    known = dict(list(Sums.known_from(json.loads(json.dumps(sums.to_json()))).items())[:4])
    again = Sums(dict(known), lambda: changes.append(-1))
    assert ranked(two, stack, again) == ranking
    assert changes.count(-1) == 2
    assert all(np.array_equal(again.known[key], sums.known[key]) for key in sums.known)


def test_a_task_is_overdue_by_its_own_cost(monkeypatch) -> None:
    """Tasks of cost 1 take 10 s. After 30 s one of cost 1 is overdue (30 > 2 · 10), one of
    cost 2 is not (30 < 2 · 20).
    """
    monkeypatch.setattr(module.time, "monotonic", lambda: 30.0)
    replicas = Replicas(None, TWO, 2, 1, 0)  # type: ignore[arg-type]
    replicas._calls = {name: module._Call(None, task, 0.0) for task, name in enumerate("ab")}  # type: ignore[misc]
    waiting: deque[int] = deque()
    assert replicas._next(waiting, [2.0, 1.0], [10.0, 10.0]) == 1
    assert replicas._next(waiting, [2.0, 2.0], [10.0]) is None
    assert replicas._next(waiting, [1.0, 1.0], []) is None, (
        "none is done: nobody knows what it should take"
    )
    replicas._calls["c"] = module._Call(None, 1, 29.0)  # type: ignore[index]
    assert replicas._next(waiting, [2.0, 1.0], [10.0]) is None, "not a third time"
    assert replicas._next(deque([7]), [1.0] * 8, []) == 7


def test_a_few_tasks_are_spread_over_the_nodes() -> None:
    """Six replicas, of which one has done nothing yet; the last one of the list was asked last."""
    replicas = Replicas(None, TWO, 6, 1, 0)  # type: ignore[arg-type]
    replicas._idle = ["new", "b1", "b2", "a1", "a2", "a3"]
    replicas._nodes = {name: name[0] for name in replicas._idle[1:]}
    given = []
    while replicas._idle:
        given.append(replicas._take())
        replicas._calls[given[-1]] = module._Call(given[-1], 0, 0.0)
    assert given == ["a3", "b2", "a2", "b1", "a1", "new"]
