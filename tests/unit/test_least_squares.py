"""Ridge regression from sums, against torch's least squares on the rows themselves."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fusegpt_ray.fusion.least_squares import GRID, Moments, Regression, best_fit

ROWS, FEATURES, OUTPUTS = 200, 12, 5


def drawn(seed: int = 0, rows: int = ROWS, noise: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of one linear law with means that are not zero, and noise."""
    law = torch.Generator().manual_seed(1)
    own = torch.Generator().manual_seed(seed)
    true = torch.randn(FEATURES, OUTPUTS, generator=law, dtype=torch.float64)
    x = 2 + torch.randn(rows, FEATURES, generator=own, dtype=torch.float64)
    y = x @ true - 3 + noise * torch.randn(rows, OUTPUTS, generator=own, dtype=torch.float64)
    return x, y


def by_rows(
    x: torch.Tensor, y: torch.Tensor, ridge: float, intercept: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """λ as rows √λ · 1 with aim 0, and b as a column of ones that these rows do not have."""
    centred = x - x.mean(0) if intercept else x
    penalty = math.sqrt(ridge * float(centred.square().sum()) / x.shape[1])
    more = penalty * torch.eye(x.shape[1], dtype=x.dtype)
    ones = torch.cat([torch.ones(len(x), 1), torch.zeros(len(more), 1)]).to(x.dtype)
    rows = torch.cat([torch.cat([x, more]), ones], 1) if intercept else torch.cat([x, more])
    aims = torch.cat([y, torch.zeros(len(more), y.shape[1], dtype=y.dtype)])
    found = torch.linalg.lstsq(rows, aims).solution
    return found[: x.shape[1]], found[-1] if intercept else torch.zeros(y.shape[1], dtype=x.dtype)


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("ridge", [0.0, 1e-6, 1e-2, 1.0])
def test_a_fit_is_that_of_the_rows(ridge: float, intercept: bool) -> None:
    x, y = drawn()
    moments = Moments.of([(x[:70], y[:70]), (x[70:], y[70:])])
    ((_, fit),) = Regression(moments, intercept).fits([ridge])
    weight, bias = by_rows(x, y, ridge, intercept)
    torch.testing.assert_close(fit.weight_FK, weight, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fit.bias_K, bias, rtol=1e-9, atol=1e-9)


def test_the_error_on_other_rows_follows_from_their_sums() -> None:
    x, y = drawn()
    other_x, other_y = drawn(seed=5, rows=50)
    for _, fit in Regression(Moments.of([(x, y)]), True).fits(GRID):
        error = Regression(Moments.of([(other_x, other_y)]), True).squared_error(fit)
        real = (other_x @ fit.weight_FK + fit.bias_K - other_y).square().sum()
        assert error == pytest.approx(float(real), rel=1e-9)


def test_sums_of_parts_are_the_sums_of_all() -> None:
    x, y = drawn()
    parts = [Moments.of([(x[i : i + 50], y[i : i + 50])]) for i in range(0, ROWS, 50)]
    together, all_at_once = sum(parts[1:], parts[0]), Moments.of([(x, y)])
    for name, value in vars(all_at_once).items():
        assert vars(together)[name] == pytest.approx(value, rel=1e-12), name


@pytest.mark.parametrize("rows", [FEATURES + 2, ROWS])
def test_the_ridge_is_the_one_that_serves_other_rows_best(rows: int) -> None:
    """With hardly more rows than features and much noise, more than the least is needed."""
    x, y = drawn(rows=rows, noise=3.0 if rows < ROWS else 0.01)
    other_x, other_y = drawn(seed=5)
    choice = best_fit(Moments.of([(x, y)]), Moments.of([(other_x, other_y)]), True)
    errors = {}
    for ridge in GRID:
        weight, bias = by_rows(x, y, ridge, True)
        errors[ridge] = float((other_x @ weight + bias - other_y).square().sum())
    assert choice.ridge == min(errors, key=errors.__getitem__)
    assert (choice.ridge > 1e-3) == (rows < ROWS)
    assert choice.left == pytest.approx(min(errors.values()) / float(other_y.square().sum()))


def test_nothing_is_better_than_a_fit_that_harms() -> None:
    x, y = drawn()
    choice = best_fit(Moments.of([(x, y)]), Moments.of([(x, -y)]), True)
    assert (choice.ridge, choice.left) == (math.inf, 1.0)
    assert not choice.fit.weight_FK.any() and not choice.fit.bias_K.any()


def test_features_that_are_always_zero_and_no_features_at_all() -> None:
    x, y = drawn()
    x[:, 3] = 0
    moments = Moments.of([(x, y)])
    assert not best_fit(moments, moments, False).fit.weight_FK[3].any()
    nothing = Moments.of([(0 * x, y)])
    assert best_fit(nothing, nothing, False).ridge == math.inf


def test_sums_that_are_not_finite_are_no_fit() -> None:
    moments = Moments.of([drawn()])
    with pytest.raises(FloatingPointError):
        best_fit(moments, replace(moments, yy=math.nan), True)
