"""Whether two models differ on a text by more than chance: a paired bootstrap over its windows.

Both models predict the same tokens, and windows that are hard are hard for both: the differences of
a window's losses vary far less than the losses do. Windows are drawn with replacement, each with
its difference, and the interval holds the middle of the mean differences that come of it. It speaks
of other windows of such a text, not of other texts, and takes windows for independent, which
neighbours in one long document are not quite.

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
"""Windows. With fewer, differences that are chance alone have all the same sign more often than an
interval may be wrong: 2 × ½⁵ > 1 − LEVEL."""
_AT_ONCE = 1 << 22
"""Windows that are drawn in one call: 32 MB of their numbers."""


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
    means_R = resampled_means(weighted_W, weight_W, RESAMPLES, SEED)
    low, high = np.quantile(means_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    return Difference(mean, (low, high))


def resampled_means(
    weighted_W: np.ndarray, weight_W: np.ndarray, resamples: int, seed: int
) -> np.ndarray:
    """Weighted means, float64 [R], each over W windows that are drawn with replacement."""
    draw, windows = np.random.default_rng(seed), len(weight_W)
    step = max(1, _AT_ONCE // windows)
    means = []
    for begin in range(0, resamples, step):
        drawn_RW = draw.integers(windows, size=(min(step, resamples - begin), windows))
        means.append(weighted_W[drawn_RW].sum(axis=1) / weight_W[drawn_RW].sum(axis=1))
    return np.concatenate(means)
