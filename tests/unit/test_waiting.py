"""Which job is next, where several work at the same time: by priority, by what fits, and by the
workers that are open.
"""

from __future__ import annotations

import random
import threading
import time

import pytest

from fusegpt_ray.scheduling.waiting import Entry, Waiting
from fusegpt_ray.workers.room import Need

PATIENCE = 60
FOUR = Need(gpus=4, cpus=100)


def entry(job: str, group: int = 0, gpus: float = 1, priority: int = 0) -> Entry[str]:
    return Entry(job, group, Need(gpus, 1), priority)


def taken(waiting: Waiting[str]) -> Entry[str]:
    found = waiting.take()
    assert found
    return found


def test_the_highest_priority_goes_first_and_then_the_order_that_was_given() -> None:
    waiting = Waiting([entry("a"), entry("b", 1, priority=2), entry("c", 2), entry("d", 3)], FOUR)
    assert [taken(waiting).job for _ in range(4)] == ["b", "a", "c", "d"]
    assert waiting.take() is None


def test_groups_without_workers_go_first() -> None:
    waiting = Waiting([entry("a1"), entry("a2"), entry("b1", 1), entry("a3"), entry("b2", 1)], FOUR)
    assert [taken(waiting).job for _ in range(4)] == ["a1", "b1", "a2", "b2"]


def test_workers_are_kept_for_what_can_use_them_unless_more_urgent_work_waits() -> None:
    entries = [entry("a1"), entry("b", 1), entry("a2"), entry("c", 2, priority=1)]
    waiting = Waiting(entries, FOUR)
    first = taken(waiting)
    assert first.job == "c" and waiting.next_like(first) is None
    second = taken(waiting)
    assert second.job == "a1"
    kept = waiting.next_like(second)
    assert kept and kept.job == "a2" and waiting.next_like(kept) is None
    third = Waiting([entry("a"), entry("a2"), entry("c", 2, priority=1)], FOUR)
    assert third.next_like(entry("a0")) is None, "c goes before a2"


def test_what_fits_goes_before_what_does_not_and_nothing_is_taken_from_the_more_urgent() -> None:
    waiting = Waiting([entry("a", 0, 3), entry("b", 1, 2), entry("c", 2, 1)], FOUR)
    assert [taken(waiting).job, taken(waiting).job] == ["a", "c"]
    urgent = Waiting(
        [entry("a", 0, 3, priority=2), entry("b", 1, 2, priority=1), entry("c", 2, 1)], FOUR
    )
    first, got = taken(urgent), list[str]()
    thread = threading.Thread(target=lambda: got.append(taken(urgent).job))
    thread.start()
    assert urgent._fitting(urgent.of_group(2)) and len(urgent) == 2, "c would fit"
    urgent.release(first)
    thread.join(PATIENCE)
    assert got == ["b"]


def test_one_that_needs_more_than_there_is_works_alone() -> None:
    waiting = Waiting([entry("small"), entry("huge", 1, 8), entry("last", 2)], FOUR)
    small, last = taken(waiting), taken(waiting)
    assert (small.job, last.job) == ("small", "last"), "it waits until nobody else works"
    waiting.release(small)
    waiting.release(last)
    huge = taken(waiting)
    assert waiting.alone(huge) and not waiting.alone(small)
    waiting.give_back(small)
    assert waiting._fitting([small]) is None
    waiting.release(huge)
    assert taken(waiting) is small


def test_nobody_is_beside_one_that_leaves_no_room_for_any() -> None:
    half, most = entry("half", 0, 2), entry("most", 1, 3)
    assert Waiting([most, half], FOUR).alone(most)
    waiting = Waiting([half, most, entry("other", 2, 2)], FOUR)
    assert waiting.alone(most) and not waiting.alone(half)
    assert Waiting([half], FOUR).alone(half), "there is no other"


def test_one_that_only_publishes_leaves_its_workers_to_others() -> None:
    publisher = Need(gpus=1, cpus=1)
    entries = [
        Entry(f"{name}", group, Need(3, 1), publisher=publisher) for group, name in enumerate("abc")
    ]
    waiting = Waiting(entries, FOUR)
    first = taken(waiting)
    assert waiting.put_off(first), "b waits for its GPUs"
    assert waiting.next_like(first) is None
    later = taken(waiting)
    assert (later.job, later.need, later.publishes) == ("a", publisher, True), "b does not fit"
    assert not waiting.put_off(later)
    waiting.release(first)
    second = taken(waiting)
    assert second.job == "b" and second.group != later.group and not second.publishes
    waiting.release(second)
    third = taken(waiting)
    assert third.job == "c" and not waiting.put_off(third), "nobody waits"
    alike = Waiting([Entry("d", 0, publisher, publisher=publisher), entry("e", 1)], FOUR)
    assert not alike.put_off(taken(alike)), "its own workers are no more than that"


def test_a_group_that_was_given_up_is_left_to_others() -> None:
    waiting = Waiting([entry("a"), entry("b", 1)], FOUR)
    first = taken(waiting)
    waiting.give_back(first)
    waiting.release(first)
    other = waiting.take({0})
    assert other and other.job == "b" and waiting.take({0}) is None
    assert taken(waiting).job == "a"


@pytest.mark.parametrize("seed", range(5))
def test_all_is_done_once_and_never_more_at_once_than_there_is_room_for(seed: int) -> None:
    """Jobs of random needs and groups, done by four threads that keep workers where they can."""
    rng = random.Random(seed)
    needs = [rng.choice([1, 2, 3, 4, 6]) for _ in range(5)]
    entries = [
        entry(f"{number}", group := rng.randrange(5), needs[group], rng.randrange(2))
        for number in range(40)
    ]
    waiting, lock = Waiting(entries, FOUR), threading.Lock()
    open_sets, done, wrong = list[Entry[str]](), list[str](), list[list[Entry[str]]]()

    def work() -> None:
        while first := waiting.take():
            with lock:
                open_sets.append(first)
                if len(open_sets) > 1 and sum(one.need.gpus for one in open_sets) > FOUR.gpus:
                    wrong.append([*open_sets])
            now: Entry[str] | None = first
            while now:
                time.sleep(0.0005)
                done.append(now.job)
                now = waiting.next_like(now)
            with lock:
                open_sets.remove(first)
            waiting.release(first)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert wrong == [] and sorted(done, key=int) == [str(number) for number in range(40)]
