"""The search against the full table: the same choice, always, and the work it says it does."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusegpt_ray.importance.racing import surely_above, t_tail
from fusegpt_ray.importance.ranking import Cost, Ranking, Stopped, lowest
from fusegpt_ray.importance.search import Job, search
from fusegpt_ray.recipe.sections import Importance

LENGTH = 7


class Walks:
    """Answers from a full table, and counts what a real walk would cost."""

    def __init__(self, table_WN: np.ndarray, batch: int) -> None:
        self.table_WN = table_WN
        self.parts = np.split(table_WN, range(batch, len(table_WN), batch))
        self.waves = self.cost = 0
        self.asked: list[tuple[int, int]] = []
        """Batch and candidate."""

    def __call__(self, jobs: list[Job]) -> list[np.ndarray]:
        depth = self.table_WN.shape[1]
        self.waves += 1
        self.asked += [(batch, position) for batch, positions in jobs for position in positions]
        for batch, positions in jobs:
            for block in range(depth):
                self.cost += len(self.parts[batch]) * (
                    1 + sum(position < block for position in positions)
                )
        return [self.parts[batch][:, list(positions)] for batch, positions in jobs]

    def search(
        self,
        last: Ranking | None = None,
        kept: list[int] | None = None,
        candidates: list[int] | None = None,
        **importance: object,
    ) -> Ranking:
        kept = kept or list(range(self.table_WN.shape[1]))
        lengths = [LENGTH] * len(self.table_WN)
        sizes, settings = list(map(len, self.parts)), Importance(**importance)
        return search(self, kept, sizes, lengths, settings, last, candidates=candidates)


def whole_table(table_WN: np.ndarray) -> dict[int, float]:
    """Every candidate's mean, written out."""
    return {
        i: math.fsum(column) / (len(column) * LENGTH)
        for i, column in enumerate(table_WN.T.tolist())
    }


def estimates(values: list[float]) -> Ranking:
    return Ranking(dict(enumerate(values)), {}, 1, Cost(0, 0, 0))


SIZES = st.tuples(st.integers(1, 9), st.integers(1, 7))
# Few values make ties; tiny and huge ones make the order of additions matter.
NUMBERS = st.one_of(
    st.sampled_from([0.0, 1.0, 2.0, 0.1, 0.2, 0.3]),
    st.floats(0, 10),
    st.sampled_from([1e-300, 1e-17, 1.0, 1 + 2**-52, 1e16]),
)


@st.composite
def tables(draw: st.DrawFn) -> np.ndarray:
    windows, depth = draw(SIZES)
    values = draw(st.one_of(st.just(NUMBERS), st.just(st.sampled_from([0.0, 1.0]))))
    rows = draw(
        st.lists(
            st.lists(values, min_size=depth, max_size=depth), min_size=windows, max_size=windows
        )
    )
    if draw(st.booleans()):  # exact ties of whole candidates, their windows in another order
        i, j = draw(st.integers(0, depth - 1)), draw(st.integers(0, depth - 1))
        for row, other in zip(rows, draw(st.permutations(range(windows))), strict=True):
            row[j] = rows[other][i] if i != j else row[j]
    return np.array(rows, dtype=np.float64)


@settings(max_examples=400, deadline=None)
@given(tables(), st.integers(1, 10), st.data())
def test_chooses_what_the_full_table_chooses(
    table_WN: np.ndarray, batch: int, data: st.DataObject
) -> None:
    windows, depth = table_WN.shape
    guess = data.draw(st.none() | st.lists(st.floats(0, 3), min_size=depth, max_size=depth))
    walks = Walks(table_WN, batch)
    found = walks.search(guess and estimates(guess))
    expected = whole_table(table_WN)

    assert found.lowest == lowest(expected)
    assert found.windows == windows
    assert found.scores == {i: expected[i] for i in found.scores}  # to the last bit
    assert found.scores.keys() | found.stopped.keys() == expected.keys()
    for dense, item in found.stopped.items():
        assert found.scores[found.lowest] < item.at_least <= expected[dense]
        assert item.windows < windows
        assert item.mean == pytest.approx(item.at_least * windows / item.windows)
    # The work, counted independently, and its bounds.
    assert found.cost == Cost(walks.cost, windows * depth * (depth + 1) // 2, windows * depth**2)
    assert walks.cost <= found.cost.single_walk + 2 * depth * windows
    assert walks.waves <= (4 if guess is None else 3)
    assert len(walks.asked) == len(set(walks.asked))  # nothing is walked twice
    assert all(
        {batch for batch, p in walks.asked if p == i} == set(range(n))
        for i, n in reached(walks).items()
    )


def reached(walks: Walks) -> dict[int, int]:
    """How many batches each candidate has walked."""
    return {
        i: 1 + max(batch for batch, p in walks.asked if p == i)
        for i in range(walks.table_WN.shape[1])
    }


@settings(max_examples=50, deadline=None)
@given(tables(), st.integers(1, 10))
def test_all_walks_everything_once(table_WN: np.ndarray, batch: int) -> None:
    walks = Walks(table_WN, batch)
    found = walks.search(all=True)
    assert found.scores == whole_table(table_WN)
    assert (found.stopped, walks.waves) == ({}, 1)
    assert walks.cost == found.cost.done == found.cost.single_walk


@settings(max_examples=200, deadline=None)
@given(tables(), st.integers(1, 10), st.data())
def test_only_candidates_are_walked(table_WN: np.ndarray, batch: int, data: st.DataObject) -> None:
    """And the one found is the lowest of them in the full table."""
    windows, depth = table_WN.shape
    blocks = st.lists(st.integers(0, depth - 1), min_size=1, unique=True)
    candidates = data.draw(blocks)
    options = data.draw(st.sampled_from([{}, {"all": True}]))
    walks = Walks(table_WN, batch)
    found = walks.search(candidates=candidates, **options)
    table = whole_table(table_WN)
    assert found.lowest == lowest({dense: table[dense] for dense in sorted(candidates)})
    assert found.estimates.keys() == {*candidates} == {p for _, p in walks.asked}
    single = windows * (depth + sum(depth - 1 - position for position in candidates))
    assert found.cost == Cost(walks.cost, single, windows * depth * len(candidates))


@settings(max_examples=50, deadline=None)
@given(tables(), st.randoms())
def test_the_order_of_windows_changes_nothing(table_WN: np.ndarray, random: random.Random) -> None:
    rows = table_WN.tolist()
    random.shuffle(rows)
    one, other = Walks(table_WN, 2).search(), Walks(np.array(rows), 3).search()
    assert one.lowest == other.lowest
    assert one.scores[one.lowest] == other.scores[other.lowest]


@pytest.mark.parametrize("descending", [False, True])
def test_a_leader_that_changes(descending: bool) -> None:
    """Each candidate looks the better the longer the search cannot see it: the first windows
    tell the opposite of the rest.
    """
    depth, windows = 6, 12
    table_WN = np.tile(np.arange(1.0, depth + 1), (windows, 1))
    table_WN[:2] = table_WN[0, ::-1]
    if descending:
        table_WN = table_WN[:, ::-1]
    found = Walks(table_WN, 2).search()
    assert found.lowest == (depth - 1 if descending else 0)


def test_dense_numbers_are_kept_and_an_equal_sum_goes_to_the_earlier_block() -> None:
    table_WN = np.array([[3.0, 1.0, 2.0], [3.0, 2.0, 1.0], [3.0, 1.0, 1.0]])
    found = Walks(table_WN, 1).search(kept=[2, 5, 9])
    assert (found.lowest, set(found.scores)) == (5, {5, 9})
    assert found.stopped == {2: Stopped(6.0 / 21, 3.0 / LENGTH, 2)}


def test_hopeless_candidates_cost_one_batch() -> None:
    table_WN = np.tile([10.0, 1.0, 10.0, 10.0], (8, 1))
    walks = Walks(table_WN, 1)
    found = walks.search()
    assert reached(walks) == {0: 1, 1: 8, 2: 1, 3: 1}
    assert found.cost.done == (4 + 3 + 2 + 1) + 7 * (4 + 2)


def test_the_last_round_saves_a_wave() -> None:
    table_WN = np.tile([4.0, 1.0, 2.0, 4.0], (8, 1))
    first, again = Walks(table_WN, 1), Walks(table_WN, 1)
    found = first.search()
    assert again.search(found) == found
    assert (first.waves, again.waves) == (2, 1)
    # With one block gone, the numbers of the others still name them; a block that it does not know
    # makes it useless.
    shorter = Walks(table_WN[:, 1:], 1)
    assert shorter.search(found, kept=[1, 2, 3]).lowest == 1
    assert shorter.waves == 1
    stranger = Walks(table_WN, 1)
    stranger.search(found, kept=[1, 2, 3, 4])
    assert stranger.waves == 2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("importance", [{}, {"all": True}, {"racing": 0.05}])
def test_a_sum_that_is_not_finite_ends_the_search(
    bad: float, importance: dict[str, object]
) -> None:
    table_WN = np.ones((4, 3))
    table_WN[0, 1] = bad
    with pytest.raises(FloatingPointError, match="1 of 3 blocks, such as block 7, are nan"):
        Walks(table_WN, 2).search(kept=[6, 7, 8], **importance)


def test_a_ranking_survives_its_record() -> None:
    found = Walks(np.random.default_rng(0).random((8, 5)) + np.arange(5), 2).search()
    assert found.stopped
    assert Ranking.from_record(found.to_record()) == found


# --- racing ---


@settings(max_examples=200, deadline=None)
@given(tables(), st.integers(1, 10))
def test_racing_ends_with_a_choice_and_does_no_more(table_WN: np.ndarray, batch: int) -> None:
    windows, depth = table_WN.shape
    walks = Walks(table_WN, batch)
    found = walks.search(racing=0.05)
    assert found.cost.done == walks.cost <= found.cost.single_walk + 2 * depth * windows
    assert found.lowest in found.scores
    assert found.scores.keys() | found.stopped.keys() == set(range(depth))
    assert found.windows == windows or len(found.scores) == 1  # the one left in the race


def random_table(generator: np.random.Generator, spread: float) -> np.ndarray:
    """32 windows of 12 candidates whose true scores are close, with noise common to all and
    noise of each.
    """
    true_N = 1 + spread * generator.random(12)
    return true_N * generator.gamma(20, 1 / 20, (32, 1)) * generator.gamma(400, 1 / 400, (32, 12))


@pytest.mark.parametrize("spread", [0.02, 0.1, 1.0])
def test_racing_seldom_differs_and_saves_work(spread: float) -> None:
    generator, differ, exact, raced = np.random.default_rng(1), 0, 0, 0
    for _ in range(200):
        walks = Walks(random_table(generator, spread), 4)
        one, other = walks.search(), walks.search(racing=0.05)
        differ += one.lowest != other.lowest
        exact, raced = exact + one.cost.done, raced + other.cost.done
    assert differ / 200 <= 0.05  # the stated probability; Bonferroni leaves far less
    assert raced < exact


@pytest.mark.parametrize(
    ("t", "freedom", "tail"),  # from printed tables of Student's t
    [
        (0.0, 5, 0.5),
        (6.314, 1, 0.05),
        (2.920, 2, 0.05),
        (3.182, 3, 0.025),
        (10.215, 3, 0.001),
        (2.776, 4, 0.025),
        (2.040, 31, 0.025),
    ],
)
def test_tail_of_students_t(t: float, freedom: int, tail: float) -> None:
    assert t_tail(t, freedom) == pytest.approx(tail, rel=2e-3)


def test_the_paired_test_by_hand() -> None:
    # Differences 1, 2, 3 of 3 among 12 windows: mean 2, variance 1, t = 2 ÷ √(1/3 · 3/4) = 4 with 2
    # degrees of freedom.
    candidate, leader = [2.0, 4.0, 6.0], [1.0, 2.0, 3.0]
    tail = float((1 - Fraction(4) / Fraction(18) ** Fraction(1, 2)) / 2)  # (1 − t / √(2 + t²)) / 2
    assert surely_above(candidate, leader, 12, tail * 1.001)
    assert not surely_above(candidate, leader, 12, tail * 0.999)
    assert not surely_above(leader, candidate, 12, 0.5)
    assert not surely_above([9.0], [1.0], 12, 0.5)  # one window tells nothing of the spread
    assert surely_above([2.0, 3.0], [1.0, 2.0], 12, 1e-9)
