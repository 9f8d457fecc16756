"""Which job is next, where several work at the same time: by priority, by what fits, and by the
workers that are open.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest

from fusegpt_ray.scheduling.waiting import Entry, Waiting
from fusegpt_ray.workers.room import Need, Room

PATIENCE = 60
FOUR = Need(gpus=4, cpus=100)


def entry(job: str, group: int = 0, gpus: float = 1, priority: int = 0) -> Entry[str]:
    return Entry(job, group, Need(gpus, 1), priority)


def line(entries: Sequence[Entry[str]], total: Need = FOUR) -> Waiting[str]:
    room = Room([entry.need for entry in entries], len(entries), total)
    return Waiting(entries, lambda: room)


def taken(waiting: Waiting[str]) -> Entry[str]:
    found = waiting.take()
    assert found
    return found


def test_the_highest_priority_goes_first_and_then_the_order_that_was_given() -> None:
    waiting = line([entry("a"), entry("b", 1, priority=2), entry("c", 2), entry("d", 3)])
    assert [taken(waiting).job for _ in range(4)] == ["b", "a", "c", "d"]
    assert waiting.take() is None


def test_groups_without_workers_go_first() -> None:
    waiting = line([entry("a1"), entry("a2"), entry("b1", 1), entry("a3"), entry("b2", 1)])
    assert [taken(waiting).job for _ in range(4)] == ["a1", "b1", "a2", "b2"]


def test_workers_are_kept_for_what_can_use_them_unless_more_urgent_work_waits() -> None:
    entries = [entry("a1"), entry("b", 1), entry("a2"), entry("c", 2, priority=1)]
    waiting = line(entries)
    first = taken(waiting)
    assert first.job == "c" and waiting.next_like(first) is None
    second = taken(waiting)
    assert second.job == "a1"
    kept = waiting.next_like(second)
    assert kept and kept.job == "a2" and waiting.next_like(kept) is None
    third = line([entry("a"), entry("a2"), entry("c", 2, priority=1)])
    assert third.next_like(entry("a0")) is None, "c goes before a2"


def test_what_fits_goes_before_what_does_not_and_nothing_is_taken_from_the_more_urgent() -> None:
    waiting = line([entry("a", 0, 3), entry("b", 1, 2), entry("c", 2, 1)])
    assert [taken(waiting).job, taken(waiting).job] == ["a", "c"]
    urgent = line([entry("a", 0, 3, priority=2), entry("b", 1, 2, priority=1), entry("c", 2, 1)])
    first, got = taken(urgent), list[str]()
    thread = threading.Thread(target=lambda: got.append(taken(urgent).job))
    thread.start()
    assert urgent._fitting(urgent.of_group(2)) and len(urgent) == 2, "c would fit"
    urgent.release(first)
    thread.join(PATIENCE)
    assert got == ["b"]


def test_one_that_needs_more_than_there_is_works_alone() -> None:
    waiting = line([entry("small"), entry("huge", 1, 8), entry("last", 2)])
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
    assert line([most, half]).alone(most)
    waiting = line([half, most, entry("other", 2, 2)])
    assert waiting.alone(most) and not waiting.alone(half)
    assert line([half]).alone(half), "there is no other"


def test_one_that_only_publishes_leaves_its_workers_to_others() -> None:
    publisher = Need(gpus=1, cpus=1)
    entries = [
        Entry(f"{name}", group, Need(3, 1), publisher=publisher) for group, name in enumerate("abc")
    ]
    waiting = line(entries)
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
    alike = line([Entry("d", 0, publisher, publisher=publisher), entry("e", 1)])
    assert not alike.put_off(taken(alike)), "its own workers are no more than that"


def test_a_group_that_was_left_is_for_the_last_one() -> None:
    waiting = line([entry("a"), entry("b", 1), entry("a2")])
    first = taken(waiting)
    waiting.give_back(first, leave=True)
    waiting.release(first)
    other = taken(waiting)
    assert other.job == "b" and waiting.take() is None
    kept = waiting.next_like(first)
    assert kept and kept.job == "a", "workers of its group that are open can have it"
    last = waiting.take(last=True)
    assert last and last.job == "a2"


def test_one_that_was_given_back_is_taken_by_another_before_its_workers_are_closed() -> None:
    waiting = line([entry("a")])
    first = taken(waiting)
    waiting.give_back(first)
    second = taken(waiting)
    waiting.release(first)
    waiting.release(second)
    assert second == first and not waiting._taken


# --- a room that changes ---


@dataclass
class Changing:
    """A room of one GPU at first, and what is asked for in it."""

    gpus: float = 1
    roomy: bool = False
    asked: list[list[str]] = field(default_factory=list)

    def line(self, entries: Sequence[Entry[str]]) -> Waiting[str]:
        needs = [entry.need for entry in entries]

        def room() -> Room:
            return Room(needs, len(needs), Need(self.gpus, 100), self.roomy)

        return Waiting(entries, room, self.ask)

    def ask(self, entries: Sequence[Entry[str]]) -> None:
        self.asked.append([entry.job for entry in entries])


def test_what_joins_lets_one_that_waits_begin() -> None:
    changing, got = Changing(), list[str]()
    waiting = changing.line([entry("a"), entry("b", 1, 2), entry("c", 2)])
    taken(waiting)
    thread = threading.Thread(target=lambda: got.append(taken(waiting).job))
    thread.start()
    assert waiting.take_now() is None and not got
    changing.gpus = 3  # nobody tells it
    thread.join(PATIENCE)
    assert got == ["b"], "in its turn, now that there is room for it"
    assert waiting.take_now() is None


def test_what_is_lost_lets_fewer_begin_and_one_in_any_case() -> None:
    changing = Changing(gpus=3)
    waiting = changing.line([entry("a", 0, 2), entry("b", 1, 2), entry("c", 2), entry("d", 3)])
    first, third = taken(waiting), taken(waiting)
    assert (first.job, third.job) == ("a", "c")
    changing.gpus = 1
    waiting.release(third)
    assert waiting.take_now() is None, "a alone holds more than there is"
    waiting.release(first)
    fourth = taken(waiting)
    assert fourth.job == "d", "b does not fit"
    waiting.release(fourth)
    assert taken(waiting).job == "b", "whose workers wait for what they need"


def test_whether_workers_take_turns_is_decided_by_the_room_when_they_are_opened() -> None:
    """What those that do not take turns hold is counted, however large the room becomes."""
    changing = Changing(gpus=4, roomy=True)
    entries = [replace(entry(name, group), both=Need(2, 1)) for group, name in enumerate("abcd")]
    waiting = changing.line(entries[:2])
    first, second = taken(waiting), taken(waiting)
    assert [waiting.beside(one) for one in (first, second)] == [(2, True)] * 2
    waiting = changing.line(entries)
    first = taken(waiting)
    assert waiting.beside(first) == (4, True)
    changing.roomy, changing.gpus = False, 3
    second = taken(waiting)
    assert waiting.beside(second) == (3, False)
    assert waiting.take_now() is None, "the first one holds two"
    waiting.release(first)
    third = taken(waiting)
    changing.gpus = 1
    assert waiting.beside(third) == (1, False)


def test_nodes_are_asked_for_while_any_waits_and_no_longer() -> None:
    changing = Changing(gpus=2)
    waiting = changing.line([entry("a"), entry("b", 1), entry("low", 2), entry("c", 3, priority=1)])
    c, a = taken(waiting), taken(waiting)
    assert changing.asked.pop() == ["c", "a", "b", "low"], "those at work, and then by priority"
    waiting.release(c)
    assert changing.asked.pop() == ["a", "b", "low"]
    b = taken(waiting)
    assert waiting.next_like(replace(b, group=2))
    assert changing.asked.pop() == [], "none waits, though two are at work"
    waiting.give_back(b, leave=True)
    assert changing.asked.pop() == [], "nor is it asked for what could not be opened"
    waiting.give_back(a)
    assert changing.asked.pop() == ["a", "b", "a"]
    assert waiting.remove(a)
    assert changing.asked.pop() == []


@pytest.mark.parametrize("seed", range(5))
def test_all_is_done_once_and_never_more_at_once_than_there_is_room_for(seed: int) -> None:
    """Jobs of random needs and groups, done by four threads that keep workers where they can."""
    rng = random.Random(seed)
    needs = [rng.choice([1, 2, 3, 4, 6]) for _ in range(5)]
    entries = [
        entry(f"{number}", group := rng.randrange(5), needs[group], rng.randrange(2))
        for number in range(40)
    ]
    waiting, lock = line(entries), threading.Lock()
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
