"""Real processes that try to own one name, on a machine that has more to do than it can."""

from __future__ import annotations

import multiprocessing as mp
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Barrier
from typing import Any

RACERS = 3


def racer(uri: str, races: int, start: Barrier, results: Any) -> None:
    """Race for `races` names; (race, who won it or what the loser was told) into `results`."""
    import psutil

    from fusegpt_ray.run import lease

    me = str(psutil.Process().pid)
    for race in range(races):
        start.wait()
        try:
            with lease.Lease.take(f"{uri}/{race}.run", lambda _: None) as owned:
                owned.fence.check()
                results.put((race, "won", me))
                start.wait()  # all have tried
                owned.fence.check()
        except lease.OwnedByAnother as error:
            results.put((race, str(error), me))
            start.wait()


def race(uri: str, races: int, busy: int) -> dict[int, dict[str, str]]:
    """Race → process → "won", or what the loser was told; `busy` others have the machine."""
    context = mp.get_context("spawn")
    start, results = context.Barrier(RACERS), context.SimpleQueue()
    arguments = (uri, races, start, results)
    racers = [context.Process(target=racer, args=arguments) for _ in range(RACERS)]
    for process in racers:
        process.start()
    found: dict[int, dict[str, str]] = {race: {} for race in range(races)}
    with load(busy):
        for _ in range(RACERS * races):
            number, told, who = results.get()
            found[number][who] = told
    for process in racers:
        process.join(60)
        assert process.exitcode == 0
    return found


@contextmanager
def load(busy: int) -> Iterator[None]:
    """So many processes that only take time."""
    context = mp.get_context("spawn")
    spinning = [context.Process(target=_spin, daemon=True) for _ in range(busy)]
    for process in spinning:
        process.start()
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.join()


def _spin() -> None:
    while True:
        pass


def assert_one_owner_each(found: dict[int, dict[str, str]]) -> None:
    for number, told in found.items():
        assert len(told) == RACERS
        (winner,) = [who for who, what in told.items() if what == "won"]
        losers = [what for what in told.values() if what != "won"]
        for what in losers:
            assert what.startswith(f"output.name = '{number}': a run of this name is at work on ")
            assert f"(process {winner}, since " in what
            assert "Fix: wait for it (fusegpt status " in what
