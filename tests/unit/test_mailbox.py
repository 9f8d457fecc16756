"""The mailbox between the driver and the training workers, in one event loop without Ray."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Coroutine
from typing import Any

import pytest

from fusegpt_ray.distributed.mailbox import MAX_FAILURES, Outcome, _Mailbox

TASK: list[Any] = ["a reference"]
NEXT: list[Any] = ["another one"]
PROCESS = "a process"
SOON = 5.0
"""Seconds that `outcome` may wait where there is news already, so it never does."""


async def begun(coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """Started, and as far as it comes without anyone else."""
    task = asyncio.create_task(coroutine)
    for _ in range(5):
        await asyncio.sleep(0)
    return task


def raised(outcome: Outcome) -> Exception:
    assert outcome.error and outcome.results is None
    error: Exception = pickle.loads(outcome.error)
    return error


def test_every_worker_takes_each_task_and_results_come_by_rank() -> None:
    async def run() -> None:
        mailbox = _Mailbox(2)
        for task, number in ((TASK, 1), (NEXT, 2)):
            assert await mailbox.post(task) == number
            assert await mailbox.take(number - 1, 1, PROCESS) == (number, task)
            await mailbox.finish(number, 1, f"{number} by one")
            assert (await mailbox.outcome(0.0)).results is None, "one result is missing"
            assert await mailbox.take(number - 1, 0, PROCESS) == (number, task)
            await mailbox.finish(number, 0, f"{number} by nought")
            outcome = await mailbox.outcome(SOON)
            assert outcome == Outcome([f"{number} by nought", f"{number} by one"])

    asyncio.run(asyncio.wait_for(run(), 10))


def test_a_worker_waits_for_the_task_that_follows_its_last() -> None:
    async def run() -> None:
        mailbox = _Mailbox(1)
        first = await begun(mailbox.take(0, 0, PROCESS))
        assert not first.done()
        await mailbox.post(TASK)
        assert await first == (1, TASK)
        second = await begun(mailbox.take(1, 0, PROCESS))
        await mailbox.finish(1, 0, None)
        assert not second.done()
        await mailbox.post(NEXT)
        assert await second == (2, NEXT)

    asyncio.run(asyncio.wait_for(run(), 10))


def test_workers_that_start_again_take_the_unfinished_task_and_its_results_stay() -> None:
    async def run() -> None:
        mailbox = _Mailbox(2)
        await mailbox.post(TASK)
        await mailbox.take(0, 0, PROCESS)
        await mailbox.take(0, 1, PROCESS)
        await mailbox.finish(1, 0, "before the loss")
        assert await mailbox.take(0, 0, PROCESS) == await mailbox.take(0, 1, PROCESS) == (1, TASK)
        await mailbox.finish(1, 1, "after it")
        assert (await mailbox.outcome(SOON)).results == ["before the loss", "after it"]

    asyncio.run(asyncio.wait_for(run(), 10))


def test_workers_that_start_again_after_a_finished_task_wait_for_the_next() -> None:
    async def run() -> None:
        mailbox = _Mailbox(1)
        await mailbox.post(TASK)
        await mailbox.take(0, 0, PROCESS)
        await mailbox.finish(1, 0, None)
        again = await begun(mailbox.take(0, 0, PROCESS))
        assert not again.done()
        await mailbox.post(NEXT)
        assert await again == (2, NEXT)

    asyncio.run(asyncio.wait_for(run(), 10))


@pytest.mark.parametrize("known", [False, True], ids=["lost in silence", "lost with a reason"])
def test_a_task_is_given_up_after_so_many_attempts_and_the_next_begins_anew(known: bool) -> None:
    async def run() -> None:
        mailbox = _Mailbox(2)
        await mailbox.post(TASK)
        for _ in range(MAX_FAILURES + 1):
            for rank in (1, 0):  # only rank 0 counts attempts
                assert await mailbox.take(0, rank, PROCESS) == (1, TASK)
            if known:
                await mailbox.fail(1, pickle.dumps(ConnectionError("worker 1 is silent")), False)
        await mailbox.outcome(SOON if known else 0.0)
        waiting = await begun(mailbox.take(0, 0, PROCESS))
        assert not waiting.done()
        error = raised(await mailbox.outcome(SOON))
        if known:
            assert isinstance(error, ConnectionError) and "worker 1 is silent" in str(error)
        else:
            assert isinstance(error, RuntimeError) and f"{MAX_FAILURES + 1} times" in str(error)
        await mailbox.post(NEXT)
        assert await waiting == (2, NEXT)
        assert await mailbox.take(0, 0, PROCESS) == (2, NEXT), "attempts are counted for each task"
        assert await mailbox.outcome(0.0) == Outcome()

    asyncio.run(asyncio.wait_for(run(), 10))


def test_attempts_are_counted_anew_once_a_training_has_come_further() -> None:
    async def run() -> None:
        mailbox = _Mailbox(1)
        await mailbox.post(TASK)
        for part in (1, 2):
            for _ in range(MAX_FAILURES):
                await mailbox.take(0, 0, PROCESS)
            await mailbox.report((part, 0.5, None))
        for _ in range(MAX_FAILURES):  # the same part again is no further
            assert await mailbox.take(0, 0, PROCESS) == (1, TASK)
            await mailbox.report((2, 0.5, None))
        await mailbox.outcome(SOON)
        await begun(mailbox.take(0, 0, PROCESS))
        assert isinstance(raised(await mailbox.outcome(SOON)), RuntimeError)

    asyncio.run(asyncio.wait_for(run(), 10))


def test_workers_hear_that_they_are_to_end() -> None:
    async def run() -> None:
        mailbox = _Mailbox(1)
        waiting = await begun(mailbox.told_to_end())
        await mailbox.post(TASK)
        assert not waiting.done()
        await mailbox.end()
        await waiting
        await mailbox.told_to_end()

    asyncio.run(asyncio.wait_for(run(), 10))


def test_a_call_that_a_lost_worker_left_behind_is_no_attempt() -> None:
    """Its process is gone, and nobody hears what it is given."""

    async def run() -> None:
        mailbox = _Mailbox(1)
        left = await begun(mailbox.take(0, 0, "lost"))
        await begun(mailbox.take(0, 0, "its successor"))
        await mailbox.post(TASK)
        assert await left is None
        assert mailbox.attempts == 1

    asyncio.run(run())


def test_a_final_failure_ends_the_task_and_later_results_do_not_count() -> None:
    async def run() -> None:
        mailbox = _Mailbox(1)
        await mailbox.post(TASK)
        await mailbox.take(0, 0, PROCESS)
        waiting = await begun(mailbox.outcome(SOON))
        await mailbox.fail(1, pickle.dumps(FloatingPointError("the loss is nan")), True)
        assert isinstance(raised(await waiting), FloatingPointError)
        await mailbox.finish(1, 0, "too late")
        await mailbox.fail(1, pickle.dumps(MemoryError()), True)
        assert isinstance(raised(await mailbox.outcome(SOON)), FloatingPointError)

    asyncio.run(asyncio.wait_for(run(), 10))


def test_a_failure_that_is_not_final_is_told_and_the_task_goes_on() -> None:
    async def run() -> None:
        mailbox = _Mailbox(1)
        await mailbox.post(TASK)
        await mailbox.take(0, 0, PROCESS)
        await mailbox.fail(1, pickle.dumps(ConnectionError("worker 1 is silent")), False)
        outcome = await mailbox.outcome(SOON)
        (line,) = outcome.news
        assert line == (
            "WARNING: ConnectionError: worker 1 is silent; this attempt at the group ends"
        )
        assert not outcome.error and outcome.results is None
        assert await mailbox.take(0, 0, PROCESS) == (1, TASK)

    asyncio.run(asyncio.wait_for(run(), 10))


def test_what_concerns_an_earlier_task_does_not_count() -> None:
    async def run() -> None:
        mailbox = _Mailbox(1)
        await mailbox.post(TASK)
        await mailbox.post(NEXT)
        await mailbox.finish(1, 0, "of the earlier task")
        await mailbox.fail(1, pickle.dumps(MemoryError()), True)
        assert await mailbox.outcome(0.0) == Outcome()

    asyncio.run(asyncio.wait_for(run(), 10))


def test_news_comes_at_once_in_order_and_once() -> None:
    async def run() -> None:
        mailbox = _Mailbox(1)
        await mailbox.post(TASK)
        waiting = await begun(mailbox.outcome(SOON))
        assert not waiting.done()
        await mailbox.report((1, 0.5, None))
        assert (await waiting).news == [(1, 0.5, None)]
        await mailbox.report((2, 0.25, 0.5))
        await mailbox.report("a line")
        assert (await mailbox.outcome(SOON)).news == [(2, 0.25, 0.5), "a line"]
        assert await mailbox.outcome(0.01) == Outcome()

    asyncio.run(asyncio.wait_for(run(), 10))


def test_workers_end_once_it_is_closed() -> None:
    async def run() -> None:
        mailbox = _Mailbox(2)
        waiting = await begun(mailbox.take(0, 0, PROCESS))
        await mailbox.close()
        assert await waiting is None
        await mailbox.post(TASK)
        assert await mailbox.take(0, 1, PROCESS) is None

    asyncio.run(asyncio.wait_for(run(), 10))
