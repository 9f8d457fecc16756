"""Ridge regression of y on x from sums alone, in float64:

    W, b = argmin Σ ‖x W + b − y‖² + λ ‖W‖²        (b, where there is one, is not regularised)

Shapes: n rows (tokens), F features of x, K of y.

Notable:
- sums of disjoint rows are added, so rows may be anywhere, and are seen once;
- the error on other rows follows from their sums as well, so λ is chosen without a second pass;
- with b, the sums are centred first: that is the regression with a column of ones appended to x.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import torch

GRID = tuple(10.0**power for power in range(0, -7, -1))
"""The λ that are tried, relative to the mean of the diagonal of xᵀx; and infinity, which is W = 0
and b = 0."""


@dataclass(frozen=True)
class Moments:
    """Sums over rows, float64; as arrays, which travel between processes without being copied."""

    rows: int
    x_F: np.ndarray
    y_K: np.ndarray
    xx_FF: np.ndarray
    xy_FK: np.ndarray
    yy: float
    """Of all squares of y."""

    @classmethod
    def of(cls, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Self:
        """Of x [n, F] and y [n, K], batch after batch, in this order; at least one batch.

        They are multiplied in float64 where they lie. For F inputs and K outputs that takes 2 F (F
        + K) FLOP a row and (F² + F K) · 8 bytes: 1.3 GB for LLaMA-2-7B (11008 and 4096).
        """
        rows, sums = 0, None
        for x, y in batches:
            x_nF, y_nK = x.double(), y.double()
            if sums is None:
                features, outputs = x_nF.shape[1], y_nK.shape[1]
                shapes = ((features,), (outputs,), (features, features), (features, outputs), ())
                sums = [x_nF.new_zeros(shape) for shape in shapes]
            rows += len(x_nF)
            sums[0] += x_nF.sum(0)
            sums[1] += y_nK.sum(0)
            sums[2].addmm_(x_nF.T, x_nF)
            sums[3].addmm_(x_nF.T, y_nK)
            sums[4] += y_nK.square().sum()
        assert sums is not None, "no rows"
        x_F, y_K, xx_FF, xy_FK, yy = (value.cpu().numpy() for value in sums)
        return cls(rows, x_F, y_K, xx_FF, xy_FK, float(yy))

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.rows + other.rows,
            self.x_F + other.x_F,
            self.y_K + other.y_K,
            self.xx_FF + other.xx_FF,
            self.xy_FK + other.xy_FK,
            self.yy + other.yy,
        )


class Fit(NamedTuple):
    """y ≈ x W + b."""

    weight_FK: torch.Tensor
    bias_K: torch.Tensor
    """Zero where none is fitted."""


class Choice(NamedTuple):
    """The fit whose error on held-out rows is the least."""

    fit: Fit
    ridge: float
    """λ, relative to the mean of the diagonal of xᵀx; infinity where no fit is better than none."""
    left: float
    """The squared error on the held-out rows by that of no fit."""


class Regression:
    """The regression of the rows that were summed, on a device."""

    def __init__(
        self, moments: Moments, intercept: bool, device: torch.device | str = "cpu"
    ) -> None:
        """`intercept`: whether there is a b."""
        m = moments
        self.x_F, self.y_K, self.xx_FF, self.xy_FK = (
            torch.tensor(value, device=device) for value in (m.x_F, m.y_K, m.xx_FF, m.xy_FK)
        )
        self.rows, self.yy, self.intercept = m.rows, m.yy, intercept

    def fits(self, ridges: Iterable[float]) -> Iterable[tuple[float, Fit]]:
        """The fit for each λ, relative to the mean of the diagonal of xᵀx (centred, if there is a
        b), by one Cholesky decomposition each: F³/3 + 2 F² K multiplications.

        A λ with which xᵀx + λ is not positive definite in float64 is left out.
        """
        gram_FF, target_FK = self.xx_FF.clone(), self.xy_FK
        mean_F, mean_K = self.x_F / self.rows, self.y_K / self.rows
        if self.intercept:
            gram_FF.addr_(self.x_F, mean_F, alpha=-1)
            target_FK = target_FK.addr(self.x_F, mean_K, alpha=-1)
        diagonal_F = gram_FF.diagonal().clone()
        for ridge in ridges:
            gram_FF.diagonal().copy_(diagonal_F + ridge * diagonal_F.mean())
            lower_FF, failed = torch.linalg.cholesky_ex(gram_FF)
            if failed:
                continue
            weight_FK = torch.cholesky_solve(target_FK, lower_FF)
            bias_K = mean_K - mean_F @ weight_FK if self.intercept else torch.zeros_like(mean_K)
            yield ridge, Fit(weight_FK, bias_K)

    def squared_error(self, fit: Fit) -> float:
        """Σ ‖x W + b − y‖² over these rows."""
        w, b = fit
        of_weight = (w * (self.xx_FF @ w - 2 * self.xy_FK)).sum()
        of_bias = b @ (2 * (self.x_F @ w - self.y_K) + self.rows * b)
        return self.yy + float(of_weight + of_bias)


def best_fit(
    fitted: Moments, held_out: Moments, intercept: bool, device: torch.device | str = "cpu"
) -> Choice:
    """The fit to the rows in `fitted` with the λ that serves the held-out rows best.

    Raises:
        FloatingPointError: a sum is not finite.
    """
    regression, judge = (Regression(m, intercept, device) for m in (fitted, held_out))
    nothing = Fit(torch.zeros_like(regression.xy_FK), torch.zeros_like(regression.y_K))
    sums = [part.xx_FF.sum() + part.xy_FK.sum() + part.yy for part in (regression, judge)]
    if not all(map(torch.isfinite, sums)):
        raise FloatingPointError("the sums of a least-squares fit are not finite")
    best, ridge, least = nothing, math.inf, judge.yy
    for candidate, fit in regression.fits(GRID):
        error = judge.squared_error(fit)
        if error < least:
            best, ridge, least = fit, candidate, error
    return Choice(best, ridge, least / judge.yy if judge.yy else 1.0)
