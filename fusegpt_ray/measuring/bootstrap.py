"""Whether two models differ on a text by more than chance: a paired bootstrap over its windows.

Both models predict the same tokens, and windows that are hard are hard for both: the differences of
a window's losses vary far less than the losses do. Windows are drawn with replacement, each with
its difference. What is looked at is how many of its own standard errors each mean that comes of it
is away from the mean of all (the bootstrap-t): the means by themselves vary less than a text's do,
and of six windows would take noise for a difference in 14 % of cases. The interval speaks of other
windows of such a text, not of other texts, and takes windows for independent, which neighbours in
one long document are not quite.

Shapes: W windows, R resamples. No torch.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

RESAMPLES = 10_000
SEED = 0
LEVEL = 0.95
"""Of the interval."""
FEWEST = 6
"""Windows. Of 5, a tenth of the resamples have at most two different ones in them, more than the
interval leaves out: how much these two vary by chance would be its ends. Of 6 it is 2 %."""
ROUNDING = 1e-9
"""A standard error that is so much smaller than that of all windows is none: a resample of a single
window, or of windows that are alike, cannot tell how much windows vary."""
_AT_ONCE = 1 << 22
"""Windows that are drawn in one call: 32 MB for each array of them."""


class Difference(NamedTuple):
    """Between the mean token losses of two models, in nats: the second less the first."""

    mean: float
    interval: tuple[float, float] | None
    """None: of too few windows."""

    @property
    def ratio(self) -> float:
        """Of the perplexities."""
        return math.exp(self.mean)

    @property
    def distinguishable(self) -> bool | None:
        """Whether it is more than noise: the interval leaves out 0. None where there is none."""
        return None if self.interval is None else not self.interval[0] <= 0 <= self.interval[1]

    def to_json(self) -> dict[str, Any]:
        """{"difference", "interval", "ratio", "ratio_interval", "distinguishable", "resamples"}.

        The first two are in nats. Of too few windows, the intervals and "distinguishable" are null.
        """
        ends = None if self.interval is None else list(self.interval)
        return {
            "difference": self.mean,
            "interval": ends,
            "ratio": self.ratio,
            "ratio_interval": ends and [math.exp(end) for end in ends],
            "distinguishable": self.distinguishable,
            "resamples": RESAMPLES,
        }


def paired_difference(
    first_W: np.ndarray,
    second_W: np.ndarray,
    targets_W: np.ndarray,
) -> Difference:
    """Of two models' mean losses on each window, float64 [W], over so many targets, int [W]. A
    window without any plays no part.
    """
    counts = targets_W > 0
    weight_W = targets_W[counts].astype(np.float64)
    weighted_W = (second_W - first_W)[counts] * weight_W
    mean = math.fsum(weighted_W) / math.fsum(weight_W)
    if len(weight_W) < FEWEST:
        return Difference(mean, None)
    centred_W = weighted_W - mean * weight_W
    error = float(means_and_errors(centred_W[None], weight_W[None])[1][0])
    means_R, errors_R = resampled(centred_W, weight_W, RESAMPLES, SEED)
    varies_R = errors_R > ROUNDING * error
    if not varies_R.any():  # all windows differ by as much
        return Difference(mean, (mean, mean))
    away_R = means_R[varies_R] / errors_R[varies_R]
    least, most = np.quantile(away_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    return Difference(mean, (mean - most * error, mean - least * error))


def resampled(
    weighted_W: np.ndarray, weight_W: np.ndarray, resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Weighted means and their standard errors, float64 [R], each over W windows that are drawn
    with replacement.
    """
    draw, windows = np.random.default_rng(seed), len(weight_W)
    step = max(1, _AT_ONCE // windows)
    found = []
    for begin in range(0, resamples, step):
        drawn_RW = draw.integers(windows, size=(min(step, resamples - begin), windows))
        found.append(means_and_errors(weighted_W[drawn_RW], weight_W[drawn_RW]))
    means, errors = zip(*found, strict=True)
    return np.concatenate(means), np.concatenate(errors)


def means_and_errors(
    weighted_RW: np.ndarray, weight_RW: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The weighted mean of each row, [R], and its standard error by how far windows are from it."""
    total_R = weight_RW.sum(axis=1)
    mean_R = weighted_RW.sum(axis=1) / total_R
    apart_RW = weighted_RW - mean_R[:, None] * weight_RW
    return mean_R, np.sqrt(np.square(apart_RW).sum(axis=1)) / total_R
