"""When runs work, foretold: by hand for a few, and that a room says what sets of workers take."""

from __future__ import annotations

from math import inf

import pytest

from fusegpt_ray.recipe.cluster_section import Cluster
from fusegpt_ray.scheduling.schedule import Work, schedule
from fusegpt_ray.scheduling.waiting import Entry
from fusegpt_ray.workers.room import Need, Room

ONE, CPUS = Need(1), inf


def work(name: str, seconds: float = 10, publishing: float = 2) -> Work:
    return Work(name, seconds, 2 * seconds, publishing, put_off=publishing + 1)


def entries(gpus: dict[str, float], publisher: Need | None = None) -> list[Entry[Work]]:
    return [
        Entry(work(name), number, Need(of), publisher=publisher)
        for number, (name, of) in enumerate(gpus.items())
    ]


def test_side_by_side_they_take_turns_with_their_own_gpus_and_alone_they_need_not() -> None:
    jobs = entries({"a": 1, "b": 1, "whole": 2})
    found = schedule(jobs, Room([job.need for job in jobs], 2, Need(2)))
    spans = {name: (span.begins, span.ends) for name, span in found.spans.items()}
    assert spans == {"a": (0, 22), "b": (0, 22), "whole": (22, 34)}
    assert (found.seconds, found.most_gpus) == (34, 2)
    assert [span.gpu_seconds for span in found.spans.values()] == [22, 22, 24]
    roomy = schedule(jobs, Room([job.need for job in jobs], 2, Need(2), roomy=True))
    assert roomy.seconds == 24


def test_what_is_put_off_is_done_beside_others_and_at_the_same_time() -> None:
    """Three runs that take both GPUs: two of them publish while, and after, the third works."""
    jobs = entries({"a": 2, "b": 2, "c": 2}, publisher=ONE)
    found = schedule(jobs, Room([job.need for job in jobs], 3, Need(2), publishers=[ONE] * 3))
    spans = {name: (span.begins, span.leaves, span.ends) for name, span in found.spans.items()}
    assert spans == {"a": (0, 10, 33), "b": (10, 20, 33), "c": (20, 30, 36)}
    one_by_one = schedule(entries({"a": 2, "b": 2, "c": 2}), Room([Need(2)] * 3, 1, Need(2)))
    spans = {name: (span.begins, span.leaves, span.ends) for name, span in one_by_one.spans.items()}
    assert spans == {"a": (0, 12, 12), "b": (12, 24, 24), "c": (24, 36, 36)}


def test_workers_stay_for_the_next_one_that_can_use_them() -> None:
    jobs = [Entry(work(name), group, ONE) for name, group in (("a", 0), ("b", 0), ("c", 1))]
    found = schedule(jobs, Room([ONE] * 3, 1, ONE))
    assert [span.begins for span in found.spans.values()] == [0, 12, 24]


@pytest.mark.parametrize(
    ("gpu", "trains", "turns", "both"), [(1, True, 4, 6), (1, False, 2, 2), (0.5, True, 4, 6)]
)
def test_what_a_set_takes(gpu: float, trains: bool, turns: float, both: float) -> None:
    cluster = Cluster(replicas=2, workers=4)
    assert Need.of(cluster, trains, gpu).gpus == turns
    assert Need.of(cluster, trains, gpu, at_once=True).gpus == both
    assert Need.of(cluster, trains, 0) == Need(0, 5 if trains else 3)


def test_a_room_has_as_many_sets_as_find_gpus_and_says_whether_they_must_take_turns() -> None:
    needs, both = [Need(1, 2), Need(1, 2), Need(2, 3)], [Need(2, 3), Need(2, 3), Need(4, 5)]
    for asked, quota, free, sets, gpus, roomy, late in (
        (None, None, 8, 3, 8, True, True),
        (None, None, 6, 3, 6, False, True),
        (None, 5, 8, 3, 5, False, True),
        (None, 3, 8, 2, 3, False, True),
        (2, 5, 8, 2, 5, False, False),
        (2, None, 8, 2, inf, True, False),
    ):
        there = Need(free, CPUS)
        room = Room.of(needs, both, [ONE] * 3, asked, quota, there, there)
        assert (room.sets, room.total.gpus, room.roomy) == (sets, gpus, roomy)
        assert room.at_once == (asked or 3), "however much there is"
        assert any(room.publishers) == late
    cpus = [Need(0, 2)] * 3
    room = Room.of(cpus, cpus, [Need(0, 2)] * 3, None, None, Need(0, 4), Need(0, 4))
    assert room.at_once == 1 and not any(room.publishers), "sets would share cores and memory"
