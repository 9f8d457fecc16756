"""The paired bootstrap against one written with loops, and where its answer is known."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from fusegpt_ray.measuring import bootstrap
from fusegpt_ray.measuring.bootstrap import FEWEST, paired_difference, resampled_means


@pytest.fixture
def noise() -> np.random.Generator:
    return np.random.default_rng(7)


def by_hand(differences: list[float], weights: list[int], resamples: int) -> tuple[float, float]:
    """The interval, by drawing whole windows with a generator of another kind."""
    draw = random.Random(3)
    means = []
    for _ in range(resamples):
        drawn = [draw.randrange(len(weights)) for _ in weights]
        total = sum(differences[window] * weights[window] for window in drawn)
        means.append(total / sum(weights[window] for window in drawn))
    means.sort()
    return means[round(0.025 * resamples)], means[round(0.975 * resamples)]


@pytest.mark.parametrize("even", [True, False])
def test_it_is_one_written_with_loops(noise: np.random.Generator, even: bool) -> None:
    windows = 12
    first_W = noise.normal(3.0, 1.0, windows)
    second_W = first_W + noise.normal(0.1, 0.2, windows)
    targets_W = np.full(windows, 11) if even else noise.integers(1, 30, windows)
    found = paired_difference(first_W, second_W, targets_W)
    differences = (second_W - first_W).tolist()
    weights = targets_W.tolist()
    mean = sum(d * w for d, w in zip(differences, weights, strict=True)) / sum(weights)
    assert found.mean == pytest.approx(mean, rel=1e-12)
    low, high = by_hand(differences, weights, 20_000)
    # Two such intervals of other draws differ by some percent of their width.
    assert found.interval == pytest.approx((low, high), abs=0.06 * (high - low))
    assert found.ratio == pytest.approx(math.exp(mean))


def test_every_mean_is_that_of_the_drawn_windows(noise: np.random.Generator) -> None:
    values_W, weights_W = noise.normal(size=9), noise.integers(1, 5, 9).astype(float)
    found_R = resampled_means(values_W * weights_W, weights_W, 50, seed=5)
    drawn_RW = np.random.default_rng(5).integers(9, size=(50, 9))
    expected = [
        sum(values_W[window] * weights_W[window] for window in drawn)
        / sum(weights_W[window] for window in drawn)
        for drawn in drawn_RW
    ]
    assert found_R.tolist() == pytest.approx(expected, rel=1e-12)


def test_drawing_a_few_at_a_time_changes_nothing(
    noise: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    values_W, weights_W = noise.normal(size=7), np.ones(7)
    whole_R = resampled_means(values_W, weights_W, 1000, seed=1)
    monkeypatch.setattr(bootstrap, "_AT_ONCE", 7 * 33)
    assert np.array_equal(resampled_means(values_W, weights_W, 1000, seed=1), whole_R)


def test_of_many_windows_it_is_the_normal_interval(noise: np.random.Generator) -> None:
    windows, spread = 4000, 0.5
    first_W = noise.normal(3.0, 2.0, windows)
    second_W = first_W + noise.normal(0.02, spread, windows)
    found = paired_difference(first_W, second_W, np.full(windows, 2047))
    assert found.interval is not None
    low, high = found.interval
    half = 1.96 * np.std(second_W - first_W) / math.sqrt(windows)
    assert (low, high) == pytest.approx((found.mean - half, found.mean + half), abs=0.05 * half)


def test_what_is_the_same_everywhere_is_certain_and_its_opposite_the_other_way_round(
    noise: np.random.Generator,
) -> None:
    first_W = noise.normal(3.0, 1.0, 20)
    targets_W = noise.integers(1, 9, 20)
    found = paired_difference(first_W, first_W + 0.25, targets_W)
    assert (found.mean, *(found.interval or ())) == pytest.approx((0.25, 0.25, 0.25))
    assert found.distinguishable and found.ratio == pytest.approx(math.exp(0.25))
    there = paired_difference(first_W, first_W[::-1], targets_W)
    back = paired_difference(first_W[::-1], first_W, targets_W)
    assert there.mean == -back.mean
    assert there.interval and back.interval
    assert there.interval == pytest.approx((-back.interval[1], -back.interval[0]), rel=1e-9)


def test_a_model_is_not_distinguishable_from_itself(noise: np.random.Generator) -> None:
    losses_W = noise.normal(3.0, 1.0, 20)
    found = paired_difference(losses_W, losses_W.copy(), np.full(20, 5))
    assert (found.mean, found.interval, found.distinguishable) == (0.0, (0.0, 0.0), False)


def test_noise_is_seldom_taken_for_a_difference(noise: np.random.Generator) -> None:
    """And a difference as large as its standard error's fourfold seldom for noise."""
    taken, found = 0, 0
    for _ in range(100):
        first_W = noise.normal(3.0, 1.0, 60)
        change_W = noise.normal(0.0, 0.1, 60)
        targets_W = np.full(60, 9)
        taken += bool(paired_difference(first_W, first_W + change_W, targets_W).distinguishable)
        moved_W = first_W + change_W + 4 * 0.1 / math.sqrt(60)
        found += bool(paired_difference(first_W, moved_W, targets_W).distinguishable)
    assert taken <= 15 and found >= 90


@pytest.mark.parametrize("windows", [1, FEWEST - 1])
def test_of_too_few_windows_nothing_is_said(windows: int) -> None:
    found = paired_difference(np.zeros(windows), np.ones(windows), np.full(windows, 4))
    assert (found.mean, found.interval, found.distinguishable) == (1.0, None, None)
    assert found.to_json()["ratio_interval"] is None


def test_a_window_without_targets_plays_no_part(noise: np.random.Generator) -> None:
    first_W, second_W = noise.normal(size=8), noise.normal(size=8)
    targets_W = np.array([3, 4, 5, 6, 7, 8, 9, 2])
    with_one = paired_difference(
        np.append(first_W, np.nan), np.append(second_W, np.nan), np.append(targets_W, 0)
    )
    assert with_one == paired_difference(first_W, second_W, targets_W)
