"""What a person reads of a round: nothing in it needs to be guessed."""

from __future__ import annotations

from stopped_runs import Watching

from fusegpt_ray.importance.ranking import Cost, Ranking, Stopped


def test_an_estimate_is_called_one_where_it_stands() -> None:
    stopped = {5: Stopped(0.01, 0.0125, 8)}
    told = Ranking({4: 0.0078}, stopped, 16, Cost(61, 100, 200)).in_words("MI")
    assert "5: ~0.0125" in told and "(61% of the full table's work; ~: an estimate)" in told
    told = Ranking({4: 0.0078, 5: 0.0125}, {}, 16, Cost(100, 100, 200)).in_words("MI")
    assert "~" not in told and told.endswith("(100% of the full table's work)")


def test_the_time_left_is_that_of_rounds() -> None:
    show = Watching()
    for number in (1, 2):
        show.round_begins(number, 2, 5)
        show.round_ends(number, 2, {"losses": []}, 0)
    ends = [line for line in show.said if line.startswith("  ")]
    assert "of rounds left" in ends[0] and "left" not in ends[1]
