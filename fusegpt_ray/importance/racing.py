"""The paired test by which racing gives up a candidate before the exact bound does."""

from __future__ import annotations

import math
from collections.abc import Sequence


def surely_above(
    candidate: Sequence[float], leader: Sequence[float], windows: int, error: float
) -> bool:
    """Whether the candidate's sum over all `windows` windows is above the leader's, seen on the
    first n of them.

    A one-sided paired t-test on the differences of the n windows' sums, at the level `error`. The
    comparison meant is that over the finite set of all windows, of which n are known: hence the
    factor 1 − n / `windows` on the variance of their mean.

    Assumes that windows are in random order (calibration draws them at random) and that their
    differences are about normal; few windows are guarded by the t-distribution's tails. Differences
    that are all alike and above 0 are taken as sure.
    """
    n = len(candidate)
    differences = [a - b for a, b in zip(candidate, leader, strict=True)]
    mean = math.fsum(differences) / n
    if n < 2 or mean <= 0:
        return False
    variance = math.fsum((value - mean) ** 2 for value in differences) / (n - 1)
    spread = math.sqrt(variance / n * (1 - n / windows))
    return spread == 0 or t_tail(mean / spread, n - 1) < error


def t_tail(t: float, freedom: int) -> float:
    """P(T > t) for t ≥ 0 and Student's t with a whole number of degrees of freedom (Abramowitz and
    Stegun, 26.7.3 and 26.7.4).
    """
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = total = cosine if odd else 1.0
    for k in range(3 if odd else 2, freedom - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    if odd:
        inside = 2 / math.pi * (angle + (sine * total if freedom > 1 else 0.0))
    else:
        inside = sine * total
    return (1 - inside) / 2
